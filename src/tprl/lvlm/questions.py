"""Where the question stands in a prompt that is token ids already."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor

from tprl.errors import UserError

log = logging.getLogger(__name__)
# Different at both ends, in rare and in frequent words: what tokens they share is not theirs.
QUESTIONS = ("What is this ?", "describe it all here", "is the one red", "How many are there", "the colors .")
ANSWERS = ("Yes .", "two of them", "the red one", "A dog")


class QuestionFinder:
    """Finds the text after the last image of the last user turn, template words excluded.

    What the template writes around a question is learnt by rendering it with different questions and answers and
    looking at which token ids stay the same; any chat template that can be rendered will do.

    Args:
        processor: a stock processor, or a tokenizer with a chat template.
        image_token: id of the placeholder that stands for visual tokens.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, processor: Any, image_token: int) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if self.template is None:
            raise UserError(
                "the processor has no chat template, so a question cannot be told from the words around it: set "
                "processor.chat_template, or use a pruner that reads no question."
            )
        self.image_token = image_token
        self.special = set(self.tokenizer.added_tokens_decoder)
        asked = [self._after_image(self._render([("user", question, True)])) for question in QUESTIONS]
        self.tail = _common([ids[::-1] for ids in asked])[::-1]
        self.head = [token for token in _common(asked) if token not in self.special]
        self.next_turn = self._next_turn()
        self._warned = False

    def __call__(self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
        """True on the question of each prompt; nowhere in a prompt without an image."""
        found = torch.zeros_like(attention)
        for row, (line, real) in enumerate(zip(ids.tolist(), attention, strict=True)):
            if self.image_token not in line:
                continue
            after = len(line) - line[::-1].index(self.image_token)
            end = int(real.nonzero()[-1]) + 1
            if line[end - len(self.tail) : end] == self.tail:
                end -= len(self.tail)
            elif not self._warned:
                self._warned = True
                log.warning("a prompt does not end as its chat template does: all text after its image is the question")
            start = self._start(line, after, end)
            found[row, start:end] = True
        return found

    def _start(self, line: Sequence[int], after: int, end: int) -> int:
        """The first token of the question: after the last turn's opening, or after what follows an image."""
        mark = self.next_turn
        if mark:
            for start in range(end - len(mark), after - 1, -1):
                if line[start : start + len(mark)] == mark:
                    return start + len(mark)
        while after < end and line[after] in self.special:
            after += 1
        return after + len(self.head) if line[after : after + len(self.head)] == self.head else after

    def _next_turn(self) -> list[int]:
        """What the template writes between an answer and the next question."""

        def second(answer: str, question: str) -> list[int]:
            return self._render([("user", QUESTIONS[0], True), ("assistant", answer, False), ("user", question, False)])

        try:
            before = _common([second(ANSWERS[0], question) for question in QUESTIONS])
            after = _common([second(answer, QUESTIONS[0])[::-1] for answer in ANSWERS])[::-1]
        except (TemplateError, TypeError) as error:  # raised by the template itself, or by what it does to its parts
            log.warning("the chat template renders no second turn (%s): all text after an image is a question", error)
            return []
        whole = second(ANSWERS[0], QUESTIONS[0])
        return whole[len(whole) - len(after) : len(before)]

    def _render(self, turns: Sequence[tuple[str, str, bool]]) -> list[int]:
        messages = [
            {"role": role, "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}
            for role, text, image in turns
        ]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _after_image(self, ids: list[int]) -> list[int]:
        return ids[len(ids) - ids[::-1].index(self.image_token) :] if self.image_token in ids else ids


def _common(lines: Sequence[list[int]]) -> list[int]:
    """The common beginning."""
    first = min(lines, key=len)
    stop = next((i for i, token in enumerate(first) if any(line[i] != token for line in lines)), len(first))
    return first[:stop]
