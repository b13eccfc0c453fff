"""Multiple choice: how options are shown, and which option an answer means."""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tprl.data.benchmark import Benchmark, text_of
from tprl.data.taking import BadRow
from tprl.data.values import shortened
from tprl.types import Sample

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
RULE = "the option's letter or full text, anything else is wrong (nothing is guessed)"
_LEAD = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*", re.IGNORECASE)
_AFTER_LEAD = re.compile(r"\(?([A-Z])(?![\w'’-])")
_AT_START = re.compile(r"\(([a-z])\)|([a-z])(?=[.:),]?\s*(?:\n|$)|[.:)]\s)", re.IGNORECASE)


class MultipleChoice(Benchmark):
    """A benchmark of questions with options "A. ..., B. ...", in LLaVA-1.5's prompt (see `means`
    for answers).

    Evaluations elsewhere differ for answers that name no option: VLMEvalKit asks a language model
    and then draws an option at random, lmms-eval compares the first letter, SEED-Bench's own ranks
    the options by likelihood.
    """

    def posed(
        self,
        uid: str,
        image: Image.Image,
        question: Any,
        options: Sequence[Any],
        right: Any,
        family: str = "",
    ) -> Sample:
        """The question with its options; the answers are the letter and the text of option number
        `right`.

        Raises:
            BadRow: empty question, fewer than two options, an empty option, or `right` is none of
                them.
        """
        if len(options) < 2:
            raise BadRow("no options", f"got {shortened(options)}, write a list of two or more")
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
            raise BadRow(
                "no answer", f"got {shortened(right)}, and there are {len(options)} options"
            )
        # Letter and text of the right option are answers; the letter teaches.
        texts = [text_of(option, "empty option") for option in options]
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        prompt = "\n".join([text_of(question, "empty question"), *lines, INSTRUCTION])
        return Sample(uid, (image,), prompt, (LETTERS[right], texts[right]), family)

    def score(self, sample: Sample, prediction: str) -> float:
        letter, text = sample.answers
        return float(means(prediction, letter, text))


def number_of(value: Any) -> int:
    """The number of the option that a letter names, counted from 0.

    Raises:
        BadRow: the value is not one of the letters.
    """
    letter = value.strip() if isinstance(value, str) else ""
    if len(letter) != 1 or letter not in LETTERS:
        raise BadRow(
            "no answer", f"got {shortened(value)}, write the letter of an option" if value else ""
        )
    return LETTERS.index(letter)


def means(prediction: str, letter: str, text: str) -> bool:
    """Whether an answer chooses the option with this letter and text.

    1. What follows the last "answer is" or "answer:" counts, if the answer has one of these, and
        else all of it.
    2. If that is the option's full text, but for case, white space and a full stop at the end, it
       is chosen. An option that is a single character can only be chosen by its letter.
    3. A letter is named by an answer that is one, or starts with one in brackets ("(B) dog"), with
       one before a full stop, colon or bracket ("B. dog", "b: dog", "B) dog"), or with one on a
       line of its own. After "answer is" or "answer:" a capital that is a word will do ("The answer
       is B because ..."). Case does not count otherwise. What follows the letter does not count:
       "B. cat" chooses B where A is the cat.
    4. Any other answer chooses nothing, "A dog and a cat" or "I think B" for example.
    """
    # The rules of the docstring, 1 to 3 in order.
    reply = _LEAD.split(prediction)[-1].strip()
    if len(text) > 1 and _plain(text) in (_plain(reply), _plain(prediction)):
        return True
    match = _AFTER_LEAD.match(reply) if _LEAD.search(prediction) else None
    match = match or _AT_START.match(reply)
    return match is not None and next(group for group in match.groups() if group).upper() == letter


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
