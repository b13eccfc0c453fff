"""ScienceQA-IMG: school questions, those that come with a picture."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tprl.data.benchmark import plain_text, text_of
from tprl.data.choices import RULE, MultipleChoice
from tprl.data.values import several
from tprl.types import Sample


class ScienceQA(MultipleChoice):
    """Accuracy, percent, over the questions with an image (2,017 in test).

    Source: "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question
    Answering" (Lu et al., arXiv 2209.09513). The prompt is that of LLaVA-1.5: the hint, if there is
    one, as context before the question; the lecture and the solution are not shown. Rows have no
    id, so every row counts as an image of its own.
    """

    name = "scienceqa"
    hub = "lmms-lab/ScienceQA"
    subset = "ScienceQA-IMG"
    splits: ClassVar = {"train": "train", "val": "validation", "test": "test"}
    protocol = f"ScienceQA-IMG accuracy, hint as context, no lecture; {RULE}"

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        question, hint = text_of(row["question"], "empty question"), plain_text(row["hint"]).strip()
        if hint:
            question = f"Context: {hint}\n{question}"
        uid, image = self.uid(index, 0), self.image(row["image"], index)
        right = _number(row["answer"])
        return self.posed(
            uid, image, question, several(row["choices"]), right, plain_text(row["subject"])
        )


def _number(value: Any) -> Any:
    """A whole number also where a file holds it as text or as a fraction without a part behind the
    point."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
