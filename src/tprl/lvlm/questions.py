"""Where the question stands in a prompt that is token ids already."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor

from tprl.errors import UserError

log = logging.getLogger(__name__)
# Different at both ends, in rare and in frequent words: what tokens they share is not theirs.
QUESTIONS = (
    "What is this ?",
    "describe it all here",
    "is the one red",
    "How many are there",
    "the colors .",
)
ANSWERS = ("Yes .", "two of them", "the red one", "A dog")
SYSTEMS = ("Be brief .", "you see well", "Answer in French !", "no more than a word")
IMAGE = None  # among the parts of a turn: an image; the others are texts


class QuestionFinder:
    """Finds the user's words of the last user turn of a prompt with an image: before, between or
    after its images, template words and placeholders excluded.

    What the template writes around a question is learned by rendering it with different questions,
    answers and system texts, and looking at which token ids stay the same; any chat template that
    can be rendered will do. A warning says once where a prompt is not written as the template
    does, and once where it has no question.

    Args:
        processor: a stock processor, or a tokenizer with a chat template.
        image_token: id of the placeholder that stands for visual tokens.
        written: what the template writes in the place of an image; None: that placeholder.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, processor: Any, image_token: int, written: str | None = None) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.mark: str = self.tokenizer.convert_ids_to_tokens(image_token)
        self.written = written or self.mark
        self.template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if self.template is None:
            raise UserError(
                "the processor has no chat template, so a question cannot be told from the words "
                "around it: set processor.chat_template, or use a pruner that reads no question."
            )
        self.image_token = image_token
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = {number for number, token in added if token.special} | {image_token}
        self._blank: dict[int, bool] = {}
        self._warned: set[str] = set()
        self._learn_turn()
        later = (self._next_turn(), self._after_system())
        self.openings = [opening for opening in later if self._has_words(opening)]

    def __call__(
        self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"]
    ) -> Bool[Tensor, "B S"]:
        """True on the question of each prompt; nowhere in a prompt without an image."""
        # Row by row on the host: templates are matched token by token.
        question = torch.zeros_like(attention)
        for row, real in enumerate(attention):
            columns = real.nonzero().squeeze(1)
            line = ids[row, columns].tolist()
            if self.image_token not in line:
                continue
            words = self._words(line)
            if not words:
                self._warn(
                    "a prompt with an image has no words of a user in its last turn: a "
                    "pruner that reads the question keeps the same tokens whatever is "
                    "asked elsewhere; write the question into the turn of the image"
                )
            question[row, columns[words]] = True
        return question

    # --- in a prompt ------------------------------------------------------------------------------

    def _words(self, line: Sequence[int]) -> list[int]:
        """Places of the question's tokens in a prompt without padding."""
        start = self._start(line)
        if start is None:  # not the template's: words before an image may be anybody's
            last_image = len(line) - line[::-1].index(self.image_token)
            words = self._segments(line, last_image, self._stop(line, last_image, "its image"))
            return words or self._segments(line, 0, len(line))
        return self._segments(line, start, self._stop(line, start, "the opening of its last turn"))

    def _start(self, line: Sequence[int]) -> int | None:
        """Behind the opening of the last user turn; None where there is none."""
        # A later turn opens behind an answer or a system text; the first one opens the prompt.
        ends = [_last(line, opening, 0) for opening in self.openings]
        # A BOS, or the lack of one, may differ from the template's: compared without specials.
        begin = next((at for at, token in enumerate(line) if token not in self.special), 0)
        first = [token for token in self.first if token not in self.special]
        if line[: len(self.first)] == self.first:
            ends.append(len(self.first))
        elif first and line[begin : begin + len(first)] == first:
            ends.append(begin + len(first))
        known = [end for end in ends if end is not None]
        return max(known) if known else _last(line, self.first, 0)

    def _stop(self, line: Sequence[int], start: int, begin: str) -> int:
        """Where the turn that starts at `start` ends."""
        # The prompt ends with the opening of an answer, or where the turn is shut.
        for ending in (self.tail, self.shut):
            end = _last(line, ending, start) if self._has_words(ending) else None
            if end is not None:
                return end - len(ending)
        if begin == "its image" or self._has_words(self.tail):
            self._warn(
                "a prompt does not end as its chat template "
                f"does: all text after {begin} is the question"
            )
        return len(line)

    def _segments(self, line: Sequence[int], start: int, stop: int) -> list[int]:
        """Places in [start, stop) of words: text between special tokens, less what the template
        writes beside an image, and less white space around it."""
        words: list[int] = []
        begin = start
        for at in range(start, stop + 1):
            if at < stop and line[at] not in self.special:
                continue
            # What stands between two special tokens, white space aside.
            first, last = self._trimmed(line, begin, at)
            if self._image_before(line, first) and line[first:last][: len(self.head)] == self.head:
                first += len(self.head)
            # What the template writes before an image is no word of the user either.
            if at < stop and self.lead and line[first:last][-len(self.lead) :] == self.lead:
                last -= len(self.lead)
            first, last = self._trimmed(line, first, last)
            words += range(first, last)
            begin = at + 1
        return words

    def _image_before(self, line: Sequence[int], place: int) -> bool:
        """Whether what stands before a place, special tokens aside, is an image."""
        while place and (line[place - 1] in self.special or self._is_blank(line[place - 1])):
            place -= 1
            if line[place] == self.image_token:
                return True
        return False

    def _trimmed(self, line: Sequence[int], first: int, last: int) -> tuple[int, int]:
        """[first, last) without white space at its ends."""
        while first < last and self._is_blank(line[first]):
            first += 1
        while first < last and self._is_blank(line[last - 1]):
            last -= 1
        return first, last

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            blank = token not in self.special and not self.tokenizer.decode([token]).strip()
            self._blank[token] = blank
        return self._blank[token]

    def _has_words(self, ids: Sequence[int]) -> bool:
        """A mark of white space alone would be met anywhere."""
        return not all(map(self._is_blank, ids))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message)

    # --- the template -----------------------------------------------------------------------------

    def _learn_turn(self) -> None:
        """What the template writes around one turn, and beside an image in it."""
        # Renderings that differ in the question alone: what they share is the template's.
        asked = [self._render([("user", [IMAGE, question])]) for question in QUESTIONS]
        ended = [self._render([("user", [question])], ends=True) for question in QUESTIONS]
        before = [self._render([("user", [question, IMAGE])]) for question in QUESTIONS]
        alone = [self._render([("user", [question])]) for question in QUESTIONS]
        self.tail = self._bare(self._after_image(_common_end(asked)))
        self.shut = self._bare(_common_end(ended))
        self.first = self._bare(_common(alone))
        self.head = self._bare(self._plain(_common([self._after_image(ids) for ids in asked])))
        # Words that the template puts before an image, where users may write before one.
        leads = [ids[: ids.index(self.image_token)] for ids in before if self.image_token in ids]
        same = not leads or all(ids == leads[0] for ids in leads)  # the image stands first anyway
        self.lead = [] if same else self._bare(self._plain(_common_end(leads)))

    def _next_turn(self) -> list[int]:
        """What the template writes between an answer and the next question."""

        def second(answer: str, question: str) -> list[int]:
            turns = [
                ("user", [IMAGE, QUESTIONS[0]]),
                ("assistant", [answer]),
                ("user", [question]),
            ]
            return self._render(turns)

        try:
            # Same up to the question, same from behind the answer on: the overlap lies between.
            before = _common([second(ANSWERS[0], question) for question in QUESTIONS])
            after = _common_end([second(answer, QUESTIONS[0]) for answer in ANSWERS])
        # by the template, or by what it does to its parts
        except (TemplateError, TypeError) as error:
            log.warning(
                (
                    "the chat template renders no second turn "
                    "(%s): all text after an image is a question"
                ),
                error,
            )
            return []
        whole = second(ANSWERS[0], QUESTIONS[0])
        return self._bare(whole[len(whole) - len(after) : len(before)], ends_only=True)

    def _after_system(self) -> list[int]:
        """What the template writes between a system text and the first question."""

        def asked(system: str, question: str) -> list[int]:
            return self._render([("system", [system]), ("user", [question])])

        try:
            # As in `_next_turn`, with a system text in place of the answer.
            before = _common([asked(SYSTEMS[0], question) for question in QUESTIONS])
            after = _common_end([asked(system, QUESTIONS[0]) for system in SYSTEMS])
        except (TemplateError, TypeError):  # a template without system texts has no place for them
            return []
        whole = asked(SYSTEMS[0], QUESTIONS[0])
        if len(after) == len(whole):  # the template drops the system text
            return []
        return self._bare(whole[len(whole) - len(after) : len(before)], ends_only=True)

    def _bare(self, ids: list[int], ends_only: bool = False) -> list[int]:
        """Without white space at its ends, which depends on what stands beside; or at its end."""
        first, last = self._trimmed(ids, 0, len(ids))
        return ids[0 if ends_only and first < last else first : last]

    def _plain(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token not in self.special]

    def _render(
        self, turns: Sequence[tuple[str, list[str | None]]], ends: bool = False
    ) -> list[int]:
        """Ids of a conversation of (role, parts); with `ends` nothing opens the answer."""
        contents = [self._parts(parts) for _, parts in turns]
        if self._of_texts:
            contents = []
            for _, parts in turns:
                contents.append("\n".join(part or self.mark for part in parts))
        return self._ids(turns, contents, ends)

    def _parts(self, parts: Sequence[str | None]) -> Any:
        """The content of a turn as processors take it."""
        return [
            {"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in parts
        ]

    @cached_property
    def _of_texts(self) -> bool:
        """Whether the template knows texts alone: images are placeholders that users write into
        them."""
        turn = [("user", [IMAGE, QUESTIONS[0]])]
        contents = [self._parts(parts) for _, parts in turn]
        return self.image_token not in self._ids(turn, contents, ends=False)

    def _ids(
        self, turns: Sequence[tuple[str, Any]], contents: Sequence[Any], ends: bool
    ) -> list[int]:
        messages = [
            {"role": role, "content": content}
            for (role, _), content in zip(turns, contents, strict=True)
        ]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=not ends, tokenize=False
        )
        # What the processor would write there instead, as far as it is no white space.
        if self.written != self.mark:
            text = text.replace(self.written, f"{self.written}{self.mark}")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _after_image(self, ids: list[int]) -> list[int]:
        return (
            ids[len(ids) - ids[::-1].index(self.image_token) :] if self.image_token in ids else ids
        )


def _common(lines: Sequence[list[int]]) -> list[int]:
    """The common beginning."""
    first = min(lines, key=len)
    for i, token in enumerate(first):
        if any(line[i] != token for line in lines):
            return first[:i]
    return first


def _common_end(lines: Sequence[list[int]]) -> list[int]:
    return _common([line[::-1] for line in lines])[::-1]


def _last(line: Sequence[int], mark: Sequence[int], start: int) -> int | None:
    """Where the last occurrence of `mark` from `start` on ends."""
    if not mark:
        return None
    for place in range(len(line) - len(mark), start - 1, -1):
        if line[place : place + len(mark)] == mark:
            return place + len(mark)
    return None
