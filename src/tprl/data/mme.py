"""MME: two yes-or-no questions about every image, one of each answer, in fourteen subtasks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import Benchmark, text_of
from tprl.data.taking import BadRow
from tprl.types import Sample

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
INSTRUCTION = "Answer the question using a single word or phrase."
_OWN_INSTRUCTION = re.compile(r"\s*Please answer yes or no\.")


class MME(Benchmark):
    """Perception (at most 2,000), cognition (800) and total; per subtask accuracy, accuracy+ and
    their sum.

    Source: "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models" (Fu et
    al., arXiv 2306.13394) and its released evaluation tool. Accuracy is over questions, accuracy+
    over images, of which both answers must be right; a subtask scores the sum of both percentages,
    and perception and cognition sum their subtasks. Either is nan unless all its subtasks were
    asked, as a partial sum would be another number. An image of which one question was lost or cut
    off by `limit` does not count in accuracy+.

    The prompt is that of LLaVA-1.5: its instruction stands in place of "Please answer yes or no."
    """

    name = "mme"
    hub = "lmms-lab/MME"
    splits: ClassVar = {"test": "test"}
    protocol = (
        "MME perception: accuracy + accuracy+ summed over its 10 subtasks (cognition and "
        "total apart); 'yes' or 'no' in the first four characters, any other answer is wrong"
    )
    headline = "perception"

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        # A row that cannot be scored by this protocol counts as damaged.
        answer = text_of(row["answer"], "no answer").lower()
        if answer not in ("yes", "no"):
            raise BadRow("no answer")
        if row["category"] not in SUBTASKS:
            raise BadRow("unknown subtask")
        # MME's instruction would contradict that of LLaVA-1.5, which replaces it.
        question = text_of(_OWN_INSTRUCTION.sub("", row["question"] or ""), "empty question")
        key = row["question_id"]  # of both questions about an image
        image = self.image(row["image"], key)
        return Sample(
            self.uid(key, index), (image,), f"{question}\n{INSTRUCTION}", (answer,), row["category"]
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return float(read(prediction) == sample.answers[0])

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each subtask: right, asked."""
        # A pair (right, asked) per subtask; a question fills the pair of its subtask.
        counts = [0.0] * 2 * len(SUBTASKS)
        place = 2 * SUBTASKS.index(sample.family)
        counts[place : place + 2] = self.score(sample, prediction), 1.0
        return counts

    def per_image(self, facts: Float[Tensor, "N F"]) -> Float[Tensor, " G"]:
        """For each subtask: right, asked, images with both questions right, images with both
        asked."""
        # Both questions about an image share a subtask: accuracy+ counts images with 2 of 2.
        right, asked = facts.sum(0).unflatten(-1, (len(SUBTASKS), 2)).unbind(-1)
        return torch.stack([right, asked, (asked == 2) & (right == 2), asked == 2], -1).flatten()

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        # [... subtasks] each; a subtask that was not asked is nan, and so are its sums.
        right, asked, both, images = total.unflatten(-1, (len(SUBTASKS), 4)).unbind(-1)
        accuracy, plus = 100 * right / asked, 100 * both / images
        score = accuracy + plus
        # SUBTASKS lists perception first, so the scores split at its length.
        perception, cognition = (
            part.sum(-1) for part in score.split([len(PERCEPTION), len(COGNITION)], -1)
        )
        numbers = {
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
        }
        for name, values in {"score": score, "accuracy": accuracy, "accuracy_plus": plus}.items():
            numbers |= {
                f"{name}/{subtask}": values[..., place] for place, subtask in enumerate(SUBTASKS)
            }
        return numbers


def read(prediction: str) -> str:
    """ "yes", "no" or "other", by the rule of the released tool, which looks for "yes" first."""
    start = prediction.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
