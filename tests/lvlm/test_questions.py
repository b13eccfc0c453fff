"""The question in token ids, for tokenizers that cut text in other ways than those of the small
random models."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.blueprint import USER_ASSISTANT
from tprl.lvlm.questions import QuestionFinder
from tprl.lvlm.qwen2_5_vl import CHAT

MARKS = [
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
QUESTIONS = [
    "what color is the circle?",
    "How many squares are there",
    "list them:\n- red\n- blue",
    "ASSISTANT or USER?",
]
TEMPLATES = {"<image>": USER_ASSISTANT, "<|image_pad|>": CHAT}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """BPE with merges, learned from the dataset's questions: words with their space ("metaspace",
    as Llama's) or bytes with merges ("bytes", as Qwen's)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    start: list[str] = []
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        start = pre_tokenizers.ByteLevel.alphabet()
    data = Scenes("val")
    corpus = [
        f"USER: \n{data[i].question} ASSISTANT: Yes. user assistant" for i in range(200)
    ] + QUESTIONS
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>"], initial_alphabet=start
    )
    backend.train_from_iterator(corpus, trainer)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<s>"
    )
    tok.add_special_tokens({"additional_special_tokens": MARKS})
    return tok


def prompt(tok: PreTrainedTokenizerFast, template: str, *turns: tuple[str, str, int]) -> str:
    messages = [
        {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}
        for role, text, images in turns
    ]
    return str(
        tok.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    )


def located(tok: PreTrainedTokenizerFast, finder: QuestionFinder, text: str) -> tuple[str, Tensor]:
    ids = tok([text], return_tensors="pt")["input_ids"]
    mask = finder(ids, torch.ones_like(ids, dtype=torch.bool))
    return str(tok.decode(ids[mask])).strip(), mask


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("image", list(TEMPLATES))
class TestFinding:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_after_one_or_two_images(self, kind: str, image: str, question: str) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        finder = QuestionFinder(tok, tok.get_vocab()[image])
        for images in (1, 2):
            text = prompt(tok, TEMPLATES[image], ("user", question, images))
            assert located(tok, finder, text)[0] == tok.decode(
                tok(question, add_special_tokens=False)["input_ids"]
            )

    def test_of_the_last_turn(self, kind: str, image: str) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        finder = QuestionFinder(tok, tok.get_vocab()[image])
        first = ("user", QUESTIONS[0], 1), ("assistant", "red.", 0)
        text = prompt(tok, TEMPLATES[image], *first, ("user", QUESTIONS[1], 0))
        assert located(tok, finder, text)[0] == QUESTIONS[1]
        text = prompt(tok, TEMPLATES[image], *first, ("user", QUESTIONS[1], 1))
        assert located(tok, finder, text)[0] == QUESTIONS[1]

    def test_nowhere_without_an_image(self, kind: str, image: str) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        finder = QuestionFinder(tok, tok.get_vocab()[image])
        assert not located(tok, finder, prompt(tok, TEMPLATES[image], ("user", QUESTIONS[0], 0)))[
            1
        ].any()


def test_a_prompt_that_ignores_the_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tok = tokenizer("metaspace")
    tok.chat_template = USER_ASSISTANT
    finder = QuestionFinder(tok, tok.get_vocab()["<image>"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (
                located(tok, finder, "<image> what color is the circle?")[0]
                == "what color is the circle?"
            )
    assert [record.message for record in caplog.records if "chat template" in record.message] == [
        "a prompt does not end as its chat template does: all text after its image is the question"
    ]


def test_no_template_is_refused() -> None:
    tok = tokenizer("metaspace")
    with pytest.raises(
        UserError, match=r"no chat template.*set processor\.chat_template, or use a pruner"
    ):
        QuestionFinder(tok, tok.get_vocab()["<image>"])


IMAGE = {"type": "image"}
BY_TYPE = "{% for part in turn.content | selectattr('type', 'equalto', "
# What checkpoints ship with: images first whatever the order (LLaVA-1.5), brackets (Mistral), texts
# alone (Vicuna).
OTHERS = {
    "images first": (
        "{% for turn in messages %}{{ turn.role | upper }}: "
        f"{BY_TYPE}'image') %}}<image>\n{{% endfor %}}{BY_TYPE}'text') %}}"
        "{{ part.text }} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "brackets": (
        "<s>{% for turn in messages %}"
        "{% if turn.role == 'system' %}{{ raise_exception('no system') }}"
        "{% elif turn.role == 'user' %}[INST] {% for part in turn.content %}"
        "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %} [/INST]"
        "{% else %} {{ turn.content[0].text }}</s>{% endif %}{% endfor %}"
    ),
    "texts alone": (
        "{% for turn in messages %}{{ turn.role | upper }}: {{ turn.content }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "said beside": (
        "{% for turn in messages %}{{ turn.role | upper }}: {% for part in turn.content %}"
        "{{ 'Picture: <image> shown. ' if part.type == 'image' else part.text }}"
        "{% endfor %} {% endfor %}ASSISTANT:"
    ),
}


def output(role: str, *parts: str | None) -> dict[str, object]:
    """A turn; None is an image."""
    return {
        "role": role,
        "content": [IMAGE if part is None else {"type": "text", "text": part} for part in parts],
    }


def words(
    tok: PreTrainedTokenizerFast, template: str, image: str, *turns: dict[str, object]
) -> list[str]:
    """The question of a conversation, blank-separated."""
    tok.chat_template = template
    finder = QuestionFinder(tok, tok.get_vocab()[image])
    texts = any(isinstance(turn["content"], str) for turn in turns)
    text = tok.apply_chat_template(
        list(turns), chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert texts or image in text
    ids = tok([text], return_tensors="pt")["input_ids"]
    mask = finder(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    assert not (mask & (ids[0] == tok.get_vocab()[image])).any()
    runs = torch.tensor_split(
        torch.arange(len(mask))[mask],
        (torch.arange(len(mask))[mask].diff() > 1).nonzero()[:, 0] + 1,
    )
    return " ".join(str(tok.decode(ids[0, run])) for run in runs).split()


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("image", list(TEMPLATES))
class TestAnywhereInTheTurn:
    @pytest.mark.parametrize(
        "parts",
        [
            (QUESTIONS[0], None),
            ("How many", None, "squares are there", None),
            (None, "How many", None, "are there"),
            ("what color is", None, None),
        ],
    )
    def test_before_between_and_after_images(
        self, kind: str, image: str, parts: tuple[str | None, ...]
    ) -> None:
        expected = " ".join(part for part in parts if part is not None).split()
        assert words(tokenizer(kind), TEMPLATES[image], image, output("user", *parts)) == expected

    def test_after_other_turns_and_a_system_text(self, kind: str, image: str) -> None:
        before = (
            output("system", "what color is"),
            output("user", None, QUESTIONS[0]),
            output("assistant", "red."),
        )
        expected = QUESTIONS[1].split()
        for last in (
            output("user", QUESTIONS[1], None),
            output("user", QUESTIONS[1]),
            output("user", None, QUESTIONS[1]),
        ):
            assert words(tokenizer(kind), TEMPLATES[image], image, *before, last) == expected
        only = output("system", "what color is"), output("user", QUESTIONS[1], None)
        assert words(tokenizer(kind), TEMPLATES[image], image, *only) == expected

    def test_before_an_answer_that_has_begun(self, kind: str, image: str) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        text = prompt(tok, TEMPLATES[image], ("user", QUESTIONS[1], 1)) + " what color"
        assert located(tok, QuestionFinder(tok, tok.get_vocab()[image]), text)[0] == QUESTIONS[1]

    def test_no_words_are_said_once(
        self, kind: str, image: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        finder = QuestionFinder(tok, tok.get_vocab()[image])
        text = prompt(tok, TEMPLATES[image], ("user", "", 2))
        with caplog.at_level(logging.WARNING):
            assert not any(located(tok, finder, text)[1].any() for _ in range(2))
        assert len([r for r in caplog.records if "no words of a user" in r.message]) == 1

    def test_a_batch_of_mixed_layouts_padded_on_either_side(self, kind: str, image: str) -> None:
        tok = tokenizer(kind)
        tok.chat_template = TEMPLATES[image]
        turns = [
            output("user", None, QUESTIONS[0]),
            output("user", QUESTIONS[1], None),
            output("user", QUESTIONS[0]),
        ]
        texts = [
            str(tok.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
            for turn in turns
        ]
        finder = QuestionFinder(tok, tok.get_vocab()[image])
        for side in ("left", "right"):
            batch = tok(texts, padding=True, padding_side=side, return_tensors="pt")
            mask = finder(batch["input_ids"], batch["attention_mask"].bool())
            asked = [
                str(tok.decode(ids[row])).split()
                for ids, row in zip(batch["input_ids"], mask, strict=True)
            ]
            assert asked == [QUESTIONS[0].split(), QUESTIONS[1].split(), []]


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_templates_of_other_kinds(kind: str, name: str) -> None:
    for parts in ((None, QUESTIONS[0]), (QUESTIONS[0], None), (QUESTIONS[0], None, None)):
        turn = output("user", *parts)
        if name == "texts alone":
            turn["content"] = "\n".join("<image>" if part is None else part for part in parts)
        assert words(tokenizer(kind), OTHERS[name], "<image>", turn) == QUESTIONS[0].split()
