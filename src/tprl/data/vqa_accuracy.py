"""Soft accuracy of VQA, where ten people answered every question, and the normalization before
comparing."""

import re
from collections import Counter
from collections.abc import Sequence

# Words whose spelling without one of their apostrophes is mended; where there are two, either may
# be missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: at.start()] + word[at.end() :]: word
    for word in _CONTRACTIONS.split()
    for at in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalized(answer: str) -> str:
    """An answer as VQA compares it.

    Source: the released evaluation of "VQA: Visual Question Answering" (Antol et al., arXiv
        1505.00468), with its
    oddities: punctuation next to a space vanishes and elsewhere becomes a space, but all of it
    vanishes where a number has a comma; a full stop stays only before a digit. Then lower case,
    words for numbers up to ten as digits, no articles, and apostrophes mended.
    """
    # Marks are looked for in the text before any is replaced, as the released script does.
    text = " ".join(answer.split())
    together = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        gone = together or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if gone else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalized_text(answer: str) -> str:
    """An answer as TextVQA compares it: commas and question marks go first, and 's is a word.

    Source: the evaluation of "Iterative Answer Prediction with Pointer-Augmented Multimodal
    Transformers for TextVQA" (Hu et al., arXiv 1911.06258), which LLaVA uses.
    """
    return normalized(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3) averaged over the ways to leave one of the answers out; all texts as they
    are.

    With fewer than four answers three matches cannot be left: all that are left must match then,
    and a single answer must be met exactly.
    """
    # Of n ways to leave one out, `matches` leave out a match, and the others none.
    matches = Counter(answers)[prediction]
    if len(answers) == 1:
        return float(matches)
    enough = min(3, len(answers) - 1)
    left_out, kept = matches, len(answers) - matches  # how often a match is the one left out
    total = left_out * min(1.0, (matches - 1) / enough) + kept * min(1.0, matches / enough)
    return total / len(answers)


def by_frequency(answers: Sequence[str]) -> tuple[str, ...]:
    """All answers, the most frequent first, then by first mention; empty ones last."""
    counts = Counter(answers)

    def key(answer: str) -> tuple[bool, int, int]:
        return not answer.strip(), -counts[answer], answers.index(answer)

    return tuple(sorted(answers, key=key))
