"""Where a question stands in a prompt of each family, and texts that a tokenizer would misread."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tests.lvlm.test_families import FAMILIES, SAMPLES
from tests.lvlm.test_questions import tokenizer

from tprl.build import conf_dir, load_component
from tprl.commands.setup import make_dataset
from tprl.data.taking import take
from tprl.demo.compare import check_question
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.texts import Misreader, Placed, placed, question_mask
from tprl.stages.prompts import PromptStream
from tprl.types import Sample

TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
LAYOUTS = [
    ("{question} <image> end", [SAMPLES[0], SAMPLES[1]]),
    ("USER: <image> {question} <image> ASSISTANT:  ", [TWO]),
    ("{question}<image>b<image> {question} x", [TWO]),
]


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return load_component("model", request.param, pretrained=None, dtype="float32")


def asked(lvlm: FrozenLVLM, samples: list[Sample]) -> list[str]:
    encoded = lvlm.encode(samples)
    assert not (encoded.question & (encoded.input_ids == lvlm.image_token)).any()
    return [
        lvlm.tokenizer.decode(ids[row])
        for ids, row in zip(encoded.input_ids, encoded.question, strict=True)
    ]


class TestQuestion:
    def test_before_between_and_after_images(
        self, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for prompt, samples in LAYOUTS:
            monkeypatch.setattr(lvlm, "prompt", prompt)
            assert asked(lvlm, samples) == [sample.question for sample in samples]

    def test_one_that_the_template_holds_too(self, lvlm: FrozenLVLM) -> None:
        mixed = [
            TWO._replace(question="A"),
            SAMPLES[3]._replace(images=(), question="USER"),
            SAMPLES[0],
        ]
        assert asked(lvlm, mixed) == ["A", "USER", SAMPLES[0].question]

    def test_the_first_word_with_the_space_before_it(self) -> None:
        """As SentencePiece cuts: its offsets begin at the space."""
        tok = tokenizer("metaspace")
        sample = Sample("a", (), "what color is the circle?", ())
        prompt = placed(lambda s: f"USER: <image> {s.question} ASSISTANT:", sample, "toy")
        assert prompt.text[prompt.start : prompt.stop] == sample.question
        long = prompt.text.replace("<image>", "<image>" * 5)
        read = tok([long], return_offsets_mapping=True, return_tensors="pt")
        image = read["input_ids"] == tok.get_vocab()["<image>"]
        mask = question_mask(tok, read["offset_mapping"], image, [prompt], [[5]], "<image>")
        assert str(tok.decode(read["input_ids"][mask])).strip() == sample.question

    def test_none(self) -> None:
        tok = tokenizer("bytes")
        read = tok(["ab"], return_offsets_mapping=True, return_tensors="pt")
        mask = question_mask(
            tok,
            read["offset_mapping"],
            torch.zeros_like(read["input_ids"]).bool(),
            [Placed("ab", 1, 1)],
            [[]],
            "<image>",
        )
        assert not mask.any()


class TestMisread:
    def test_every_special_token_of_every_family(self, lvlm: FrozenLVLM) -> None:
        names = [
            token.content for token in lvlm.tokenizer.added_tokens_decoder.values() if token.special
        ]
        assert len(names) >= 5
        for token in names:
            for field in ({"question": f"what is {token}?"}, {"answers": ("yes", f"{token}no")}):
                bad = lvlm.refusal(SAMPLES[0]._replace(**field))
                assert bad is not None
                assert (
                    bad[0]
                    == f"special token in the {'question' if 'question' in field else 'answer'}"
                )
                assert token in bad[1]
        assert lvlm.refusal(SAMPLES[0]) is None

    @pytest.mark.parametrize(
        ("question", "reason"),
        [
            ("cut \ud83d?", "question is no Unicode text"),
            ("\udc00", "question is no Unicode text"),
            ("a\0b", "NUL character in the question"),
            ("", "empty question"),
            (" \n\t", "empty question"),
            ("\u200b\ufeff", "empty question"),
        ],
    )
    def test_unreadable_texts_are_refused(self, question: str, reason: str) -> None:
        bad = Misreader(tokenizer("bytes")).refuses(Sample("a", (), question, ("yes",)))
        assert bad is not None
        assert bad[0] == reason

    def test_what_the_tokenizer_itself_refuses(self) -> None:
        class Picky:
            all_special_tokens = ("<s>", "!")
            added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012

            def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
                if "x" in text:
                    # as tokenizers raises it
                    raise Exception("WordLevel error: Missing [UNK] token")
                return {"input_ids": [1] if text.strip("?") else []}

        misreader = Misreader(Picky())
        assert misreader.refuses(Sample("a", (), "x", ())) == (
            "the tokenizer refuses the question",
            "question='x' (WordLevel error: Missing [UNK] token)",
        )
        bad = misreader.refuses(Sample("a", (), "?", ()))
        assert bad is not None
        assert bad[0] == "the tokenizer reads nothing in the question"
        assert misreader.refuses(Sample("a", (), "really!", ())) is None  # a letter is text

    def test_encode_refuses_unreadable_texts(self, lvlm: FrozenLVLM) -> None:
        for question in (f"what is {lvlm.placeholder}?", "cut \ud83d?"):
            with pytest.raises(
                UserError, match=r"cannot be asked scenes/.*(special token in|no Unicode)"
            ):
                lvlm.encode([SAMPLES[0]._replace(question=question)])


class TestDamage:
    BAD = (
        {"question": "<image> what is it?"},
        {"answers": ["red", "</s>"]},
        {"question": "cut \ud83d?"},
        {"answers": "\ud83d"},
        {"question": "a\0b"},
        {"question": "\u200b"},
        {"image": "half \ud83d.png"},
    )

    def test_rows_that_cannot_be_asked_are_counted_wherever_they_are_read(
        self, tmp_path: Path
    ) -> None:
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        good = {"image": "a.png", "question": "what is it?", "answers": "red"}
        rows = [good | bad for bad in (*self.BAD, {}, {"id": "half \ud83d"})]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        config = OmegaConf.load(conf_dir() / "dataset" / "custom.yaml")
        assert OmegaConf.is_dict(config)
        config.update({"source": str(tmp_path / "rows.jsonl"), "max_bad_rows": 0.9})
        llava = load_component("model", "llava", pretrained=None, dtype="float32")
        data = make_dataset(config, llava, "all")
        samples = take(data, range(len(data)))
        assert [sample.question for sample in samples] == ["what is it?"] * 2
        assert all(sample.uid.encode() for sample in samples)
        assert llava.encode(samples).question.any(1).all()
        assert data.damage == {  # type: ignore[attr-defined]
            "special token in the question": 1,
            "special token in the answer": 1,
            "question is no Unicode text": 1,
            "answer is no Unicode text": 1,
            "NUL character in the question": 1,
            "empty question": 1,
            "missing image file": 1,
        }
        again = make_dataset(config, llava, "all")
        (batch,) = PromptStream(again, 9, 0, 1)
        assert {sample.question for sample in batch} == {"what is it?"}
        assert again.damage == data.damage  # type: ignore[attr-defined]

    def test_the_demo_answers_in_a_sentence(self) -> None:
        llava = load_component("model", "llava", pretrained=None, dtype="float32")
        for question in ("what is </s>?", "what is \ud83d?"):
            with pytest.raises(
                UserError,
                match=r"llava cannot be asked this, (special token|question is no Unicode)",
            ):
                check_question(llava, question)
        assert check_question(llava, " what? ") == "what?"
