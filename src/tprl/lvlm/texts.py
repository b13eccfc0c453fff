"""Texts of users in prompts: where a question stands, and which texts a tokenizer would misread."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Sample

MARK = "Tprl0question0words"  # stands in for a question; no template changes or holds such letters


class Placed(NamedTuple):
    """A prompt as text, images not yet expanded, and where the question's words are in it."""

    text: str
    start: int
    stop: int


def placed(render: Callable[[Sample], str], sample: Sample, name: str) -> Placed:
    """The prompt of a sample, and its question without surrounding white space, which many chat
    templates remove.

    Raises:
        UserError: the template changes the question.
    """
    # A second rendering, with a mark in place of the question, tells what stands around it.
    text = render(sample)
    before, mark, after = render(sample._replace(question=MARK)).rpartition(MARK)
    before = before.replace(MARK, sample.question)  # of a template that shows the question twice
    middle = text[len(before) : len(text) - len(after)]
    unchanged = text == before + middle + after and middle.strip() == sample.question.strip()
    if not mark or not unchanged:
        raise UserError(
            f"the prompt of {name} changes the question of sample {sample.uid}, so its "
            f"words cannot be found: set model.prompt to a template with {{question}}."
        )
    # White space around the question is no word of it.
    start = len(before) + len(middle) - len(middle.lstrip())
    return Placed(text, start, start + len(middle.strip()))


def question_mask(
    tokenizer: Any,
    offsets: Int[Tensor, "B S 2"],
    is_image: Bool[Tensor, "B S"],
    prompts: Sequence[Placed],
    per_image: Sequence[Sequence[int]],
    placeholder: str,
) -> Bool[Tensor, "B S"]:
    """Tokens that hold characters of the question, image tokens excepted.

    A tokenizer may add the space before a word to it, so that overlap counts, not containment.

    Args:
        tokenizer: what made the offsets.
        offsets: first character of each token in the expanded prompt, and the one after its last.
        is_image: True on image tokens.
        prompts: the prompts before expansion.
        per_image: image tokens of each image of a prompt.
        placeholder: what stands for an image in a prompt before expansion.
    """
    # Places of the question move to the right where images before it were expanded.
    first, last = offsets.unbind(-1)
    shifts = [
        _shift(tokenizer, ends, is_image[row], prompts[row], per_image[row], placeholder)
        for row, ends in enumerate(last)
    ]
    start = [prompt.start + shift for prompt, shift in zip(prompts, shifts, strict=True)]
    stop = [prompt.stop + shift for prompt, shift in zip(prompts, shifts, strict=True)]
    begin, end = (torch.tensor(side, device=offsets.device).unsqueeze(1) for side in (start, stop))
    # Overlap of [first, last) with the question; empty tokens and empty questions have none.
    return (first < end) & (last > begin) & (last > first) & (begin < end) & ~is_image


def _shift(
    tokenizer: Any,
    ends: Int[Tensor, " S"],
    is_image: Bool[Tensor, " S"],
    prompt: Placed,
    per_image: Sequence[int],
    placeholder: str,
) -> int:
    """By how many characters the expansion of images moves the question."""
    text = prompt.text
    before = text[: prompt.start].count(placeholder)
    if not before:
        return 0
    # What a processor writes after an image's last token, the same after every image, is measured
    # at the last one: behind it nothing expands.
    columns = is_image.nonzero().squeeze(1)
    tail = len(text) - text.rindex(placeholder) - len(placeholder)
    closing = int(ends.max()) + _uncovered(tokenizer, text) - tail - int(ends[columns[-1]])
    # The last placeholder before the question, in the text and among the tokens.
    place = -1
    for _ in range(before):
        place = text.index(placeholder, place + 1)
    last_token = columns[sum(per_image[:before]) - 1]
    return int(ends[last_token]) + closing - place - len(placeholder)


def _uncovered(tokenizer: Any, text: str) -> int:
    """Characters at the end of a text that no token holds: white space, for some tokenizers."""
    if text == text.rstrip():
        return 0
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return len(text) - max(end for _, end in offsets)


class Misreader:
    """Tells texts that a tokenizer refuses, or reads as something else than text.

    Special tokens are refused rather than escaped: a tokenizer has no exact way to read them as
    text within a prompt whose template needs them.

    Args:
        processor: a stock processor, or a tokenizer.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # What the tokenizer never splits, whoever declared it.
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special or _bracketed(token.content)}
        special |= set(self.tokenizer.all_special_tokens)
        # What the processor itself replaces, such as the placeholder of a video.
        roles = {name: value for name, value in vars(processor).items() if name.endswith("_token")}
        special |= {value for value in roles.values() if isinstance(value, str)}
        # Longest first, so that the message names the whole token and not a part of it.
        self.special = sorted(
            (text for text in special if len(text) > 1), key=lambda s: (-len(s), s)
        )

    def fault(self, text: str, what: str) -> tuple[str, str] | None:
        """The reason why `text`, a sample's question or answer by `what`, cannot be read as it is:
        the same words for every text of its kind, and the details; None if it can."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"{what}={text!r} holds {text[error.start]!r}"
            return f"{what} is no Unicode text", f"{place}, half of a character; write it whole"
        if "\0" in text:
            return f"NUL character in the {what}", f"{what}={text!r}; leave it out"
        # Ordered from what no tokenizer reads to what this one alone refuses.
        token = next((token for token in self.special if token in text), None)
        if token is not None:
            detail = f"{what}={text!r} holds {token}, which the tokenizer does not read as text"
            return f"special token in the {what}", f"{detail}; write it another way"
        try:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # whatever a tokenizer raises, bare Exception included
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            return f"the tokenizer refuses the {what}", f"{what}={text!r} ({reason[0]})"
        if not ids and text:
            return f"the tokenizer reads nothing in the {what}", f"{what}={text!r}"
        return None

    def refuses(self, sample: Sample) -> tuple[str, str] | None:
        """`fault` of a sample: of its question or any of its answers."""
        # Answers may be empty, questions may not.
        if not any(map(_visible, sample.question)):
            return "empty question", f"question={sample.question!r}; write a text"
        if (bad := self.fault(sample.question, "question")) is not None:
            return bad
        faults = (self.fault(answer, "answer") for answer in sample.answers)
        return next((bad for bad in faults if bad is not None), None)


def _visible(letter: str) -> bool:
    """Neither white space nor a control or format character such as a zero-width space. Half of a
    surrogate pair is told apart from nothing: it has a reason of its own."""
    return (letter.isprintable() or "\ud800" <= letter <= "\udfff") and not letter.isspace()


def _bracketed(text: str) -> bool:
    """A token such as <think>, which some tokenizers do not call special and still read whole."""
    return text.startswith("<") and text.endswith(">")
