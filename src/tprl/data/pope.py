"""POPE: is an object in the image? Negatives are random, popular, or adversarial (co-occurring)
objects."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import Benchmark, text_of
from tprl.data.taking import BadRow
from tprl.types import Sample

CATEGORIES = ("random", "popular", "adversarial")
PROMPT = "{question}\nAnswer the question using a single word or phrase."


class Pope(Benchmark):
    """Accuracy, precision, recall, F1 and yes-rate, percent; positive is "yes".

    Source: "Evaluating Object Hallucination in Large Vision-Language Models" (Li et al., arXiv
    2305.10355). As in its released evaluation an answer is "no" if its first sentence has the word
    "No", "no" or "not", and else "yes" (see `read`). The headline is F1 over all 9,000 questions;
    each number is also there per category, as some papers print it.
    """

    name = "pope"
    hub = "lmms-lab/POPE"
    splits: ClassVar = {"test": "test"}
    protocol = (
        "POPE F1 over all three categories; 'No', 'no' or "
        "'not' in the first sentence is no, anything else yes"
    )
    headline = "f1"

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        answer = text_of(row["answer"], "no answer").lower()
        if answer not in ("yes", "no"):
            raise BadRow("no answer")
        if row["category"] not in CATEGORIES:
            raise BadRow("unknown category")
        image = row["image_source"]
        uid = self.uid(image, f"{row['category']}-{row['question_id']}")
        question = PROMPT.format(question=text_of(row["question"], "empty question"))
        return Sample(uid, (self.image(row["image"], image),), question, (answer,), row["category"])

    def score(self, sample: Sample, prediction: str) -> float:
        return float(read(prediction) == sample.answers[0])

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """Counts of (true and answered), a block per category: yes yes, no yes, yes no, no no."""
        counts = [0.0] * 4 * len(CATEGORIES)
        positive, true = read(prediction) == "yes", sample.answers[0] == "yes"
        counts[4 * CATEGORIES.index(sample.family) + 2 * (not positive) + (not true)] = 1.0
        return counts

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        # Counts are summed before rates are taken: F1 over all is not a mean of three F1.
        blocks = total.unflatten(-1, (len(CATEGORIES), 4))
        numbers = _numbers(blocks.sum(-2))
        for place, category in enumerate(CATEGORIES):
            numbers |= {
                f"{name}/{category}": value
                for name, value in _numbers(blocks[..., place, :]).items()
            }
        return numbers


def read(prediction: str) -> str:
    """ "yes" or "no", by the rule of the released evaluation, to the letter: what stands before the
    first full stop, commas removed, is split at blanks, and case counts ("NO", "Not sure" and "no!"
    are yes). White space around the answer is removed before."""
    words = prediction.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _numbers(counts: Float[Tensor, "... 4"]) -> dict[str, Float[Tensor, "..."]]:
    """Percent; 0 where nothing was counted (the released evaluation divides by zero there)."""
    hit, false_alarm, miss, rejection = counts.unbind(-1)
    total = counts.sum(-1)
    return {
        "accuracy": _percent(hit + rejection, total),
        "precision": _percent(hit, hit + false_alarm),
        "recall": _percent(hit, hit + miss),
        "f1": _percent(2 * hit, 2 * hit + false_alarm + miss),
        "yes_rate": _percent(hit + false_alarm, total),
    }


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    return 100 * torch.where(whole > 0, part / whole, torch.zeros_like(whole))
