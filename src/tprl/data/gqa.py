"""GQA: compositional questions about scenes, with one short answer each."""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tprl.data.benchmark import Benchmark, text_of
from tprl.data.tables import Table, column, read_table
from tprl.data.taking import BadRow
from tprl.types import Sample

PROMPT = "{question}\nAnswer the question using a single word or phrase."
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQA(Benchmark):
    """Accuracy, percent, over the balanced questions.

    Source: "GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question
    Answering" (Hudson and Manning, arXiv 1902.09506). The released evaluation compares strings; as
    in lmms-eval, case and punctuation are ignored on both sides first (LLaVA's script ignores case
    and a full stop at the end of the answer).

    Questions and images are tables of their own, `<split>_balanced_instructions` and
    `<split>_balanced_images`, joined by the image's id; the test split is testdev. A single file as
    `source` holds questions with their `image`.
    """

    name = "gqa"
    hub = "lmms-lab/GQA"
    splits: ClassVar = {"train": "train", "val": "val", "test": "testdev"}
    answer_columns = ("answer",)
    protocol = (
        "GQA accuracy on balanced questions (testdev); exact match but for case and punctuation"
    )

    def read(self, source: str, split: str) -> Table:
        # Ids to places once: questions name their image by id.
        self._images: Table | None = None
        questions = read_table(source, f"{split}_balanced_instructions", split)
        if not Path(source).is_file():
            self._images = read_table(source, f"{split}_balanced_images", split)
            self._places = {key: place for place, key in enumerate(column(self._images, "id"))}
        return questions

    def row(self, index: int) -> Mapping[str, Any]:
        row = super().row(index)
        if self._images is None:
            return row
        if row["imageId"] not in self._places:
            raise BadRow("no image")
        return {**row, "image": self._images[self._places[row["imageId"]]]["image"]}

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        key = row["imageId"]
        question = PROMPT.format(question=text_of(row["question"], "empty question"))
        (answer,) = self.answers_in(row)
        return Sample(
            self.uid(key, row["id"]), (self.image(row["image"], key),), question, (answer,)
        )

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        return (text_of(row["answer"], "no answer"),)

    def score(self, sample: Sample, prediction: str) -> float:
        return float(plain_answer(prediction) == plain_answer(sample.answers[0]))


def plain_answer(text: str) -> str:
    """Lower case, without punctuation and outer spaces."""
    return text.lower().translate(_PUNCTUATION).strip()
