"""The question in token ids, for tokenizers that cut text in other ways than those of the small random models."""

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

MARKS = ["<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
QUESTIONS = [
    "what color is the circle?",
    "How many squares are there",
    "list them:\n- red\n- blue",
    "ASSISTANT or USER?",
]
TEMPLATES = {"<image>": USER_ASSISTANT, "<|image_pad|>": CHAT}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """BPE with merges, learnt from the dataset's questions: words with their space ("metaspace", as Llama's) or bytes
    with merges ("bytes", as Qwen's)."""
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
    corpus = [f"USER: \n{data[i].question} ASSISTANT: Yes. user assistant" for i in range(200)] + QUESTIONS
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], initial_alphabet=start)
    backend.train_from_iterator(corpus, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<s>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def prompt(made: PreTrainedTokenizerFast, template: str, *turns: tuple[str, str, int]) -> str:
    messages = [
        {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}
        for role, text, images in turns
    ]
    return str(made.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False))


def found(made: PreTrainedTokenizerFast, finder: QuestionFinder, text: str) -> tuple[str, Tensor]:
    ids = made([text], return_tensors="pt")["input_ids"]
    mask = finder(ids, torch.ones_like(ids, dtype=torch.bool))
    return str(made.decode(ids[mask])).strip(), mask


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("image", list(TEMPLATES))
class TestFinding:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_after_one_or_two_images(self, kind: str, image: str, question: str) -> None:
        made = tokenizer(kind)
        made.chat_template = TEMPLATES[image]
        finder = QuestionFinder(made, made.get_vocab()[image])
        for images in (1, 2):
            text = prompt(made, TEMPLATES[image], ("user", question, images))
            assert found(made, finder, text)[0] == made.decode(made(question, add_special_tokens=False)["input_ids"])

    def test_of_the_last_turn(self, kind: str, image: str) -> None:
        made = tokenizer(kind)
        made.chat_template = TEMPLATES[image]
        finder = QuestionFinder(made, made.get_vocab()[image])
        first = ("user", QUESTIONS[0], 1), ("assistant", "red.", 0)
        text = prompt(made, TEMPLATES[image], *first, ("user", QUESTIONS[1], 0))
        assert found(made, finder, text)[0] == QUESTIONS[1]
        text = prompt(made, TEMPLATES[image], *first, ("user", QUESTIONS[1], 1))
        assert found(made, finder, text)[0] == QUESTIONS[1]

    def test_nowhere_without_an_image(self, kind: str, image: str) -> None:
        made = tokenizer(kind)
        made.chat_template = TEMPLATES[image]
        finder = QuestionFinder(made, made.get_vocab()[image])
        assert not found(made, finder, prompt(made, TEMPLATES[image], ("user", QUESTIONS[0], 0)))[1].any()


def test_a_prompt_that_ignores_the_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer("metaspace")
    made.chat_template = USER_ASSISTANT
    finder = QuestionFinder(made, made.get_vocab()["<image>"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert found(made, finder, "<image> what color is the circle?")[0] == "what color is the circle?"
    assert [record.message for record in caplog.records if "chat template" in record.message] == [
        "a prompt does not end as its chat template does: all text after its image is the question"
    ]


def test_no_template_is_refused() -> None:
    made = tokenizer("metaspace")
    with pytest.raises(UserError, match=r"no chat template.*set processor\.chat_template, or use a pruner"):
        QuestionFinder(made, made.get_vocab()["<image>"])
