"""The question's ids in a prompt whose images are not expanded, and the BOS in a chat template."""

import copy
from typing import Any

import pytest
import torch

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.questions import QuestionFinder
from tprl.serving.question import Questions
from tprl.serving.template import with_bos


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


def prompt(lvlm: FrozenLVLM, question: str, images: int = 1) -> list[int]:
    return lvlm.tokenizer("USER: " + "<image>\n" * images + f"{question} ASSISTANT:")["input_ids"]


class TestQuestions:
    @pytest.mark.parametrize("images", [1, 2])
    def test_it_is_the_one_that_prune_finds_behind_all_tokens(
        self, lvlm: FrozenLVLM, images: int
    ) -> None:
        ids = prompt(lvlm, "what color is the large circle?", images)
        image = lvlm.image_token
        expanded = torch.tensor(
            [[token for item in ids for token in [item] * (144 if item == image else 1)]]
        )
        mask = QuestionFinder(lvlm.processor, image)(
            expanded, torch.ones_like(expanded, dtype=torch.bool)
        )
        result = Questions(lvlm.processor, image)(ids)
        assert result == tuple(expanded[mask].tolist())
        assert lvlm.tokenizer.decode(list(result)) == "what color is the large circle ?"

    def test_none_in_texts_and_in_what_measures_memory(
        self, lvlm: FrozenLVLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        find = Questions(lvlm.processor, lvlm.image_token)
        assert find(prompt(lvlm, "is there a circle?", 0)) == ()
        assert find([1, lvlm.image_token]) == ()
        assert find([]) == ()
        assert not caplog.records


class TestTemplate:
    def render(self, lvlm: FrozenLVLM, template: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": "is there a circle?"}]
        turns: Any = [{"role": "user", "content": content}]
        text = lvlm.tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]

    def test_it_writes_what_the_tokenizer_adds(self, lvlm: FrozenLVLM) -> None:
        template = with_bos(lvlm.processor)
        assert template is not None
        assert self.render(lvlm, template) == prompt(lvlm, "is there a circle?")

    def test_not_twice(self, lvlm: FrozenLVLM) -> None:
        processor = copy.copy(lvlm.processor)
        processor.chat_template = with_bos(lvlm.processor)
        assert with_bos(processor) == processor.chat_template

    def test_nothing_where_the_tokenizer_adds_nothing(self) -> None:
        lvlm = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
        assert with_bos(lvlm.processor) == lvlm.processor.chat_template
