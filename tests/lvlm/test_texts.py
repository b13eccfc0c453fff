"""Where a question stands in a prompt of each family, and texts that a tokenizer would misread."""

import pytest
import torch
from tests.lvlm.test_families import FAMILIES, SAMPLES
from tests.lvlm.test_questions import tokenizer

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.texts import Misreader, Placed, placed, question_mask
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
    return [lvlm.tokenizer.decode(ids[row]) for ids, row in zip(encoded.input_ids, encoded.question, strict=True)]


class TestQuestion:
    def test_before_between_and_after_images(self, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        for prompt, samples in LAYOUTS:
            monkeypatch.setattr(lvlm, "prompt", prompt)
            assert asked(lvlm, samples) == [sample.question for sample in samples]

    def test_one_that_the_template_holds_too(self, lvlm: FrozenLVLM) -> None:
        mixed = [TWO._replace(question="A"), SAMPLES[3]._replace(images=(), question="USER"), SAMPLES[0]]
        assert asked(lvlm, mixed) == ["A", "USER", SAMPLES[0].question]

    def test_the_first_word_with_the_space_before_it(self) -> None:
        """As SentencePiece cuts: its offsets begin at the space."""
        made = tokenizer("metaspace")
        sample = Sample("a", (), "what color is the circle?", ())
        prompt = placed(lambda s: f"USER: <image> {s.question} ASSISTANT:", sample, "toy")
        assert prompt.text[prompt.start : prompt.stop] == sample.question
        long = prompt.text.replace("<image>", "<image>" * 5)
        read = made([long], return_offsets_mapping=True, return_tensors="pt")
        image = read["input_ids"] == made.get_vocab()["<image>"]
        mask = question_mask(made, read["offset_mapping"], image, [prompt], [[5]], "<image>")
        assert str(made.decode(read["input_ids"][mask])).strip() == sample.question

    def test_none(self) -> None:
        made = tokenizer("bytes")
        read = made(["ab"], return_offsets_mapping=True, return_tensors="pt")
        mask = question_mask(
            made,
            read["offset_mapping"],
            torch.zeros_like(read["input_ids"]).bool(),
            [Placed("ab", 1, 1)],
            [[]],
            "<image>",
        )
        assert not mask.any()


class TestMisread:
    def test_every_special_token_of_every_family(self, lvlm: FrozenLVLM) -> None:
        names = [token.content for token in lvlm.tokenizer.added_tokens_decoder.values() if token.special]
        assert len(names) >= 5
        for token in names:
            for field in ({"question": f"what is {token}?"}, {"answers": ("yes", f"{token}no")}):
                bad = lvlm.refuses(SAMPLES[0]._replace(**field))
                assert bad is not None
                assert bad[0] == f"special token in the {'question' if 'question' in field else 'answer'}"
                assert token in bad[1]
        assert lvlm.refuses(SAMPLES[0]) is None

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
    def test_texts_that_are_none(self, question: str, reason: str) -> None:
        bad = Misreader(tokenizer("bytes")).refuses(Sample("a", (), question, ("yes",)))
        assert bad is not None
        assert bad[0] == reason

    def test_what_the_tokenizer_itself_refuses(self) -> None:
        class Picky:
            all_special_tokens = ("<s>", "!")
            added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012

            def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
                if "x" in text:
                    raise Exception("WordLevel error: Missing [UNK] token")  # as tokenizers raises it
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

    def test_encode_says_it_in_a_sentence(self, lvlm: FrozenLVLM) -> None:
        for question in (f"what is {lvlm.placeholder}?", "cut \ud83d?"):
            with pytest.raises(UserError, match=r"cannot be asked scenes/.*(special token in|no Unicode)"):
                lvlm.encode([SAMPLES[0]._replace(question=question)])
