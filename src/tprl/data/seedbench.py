"""SEED-Bench, its image part: nine kinds of questions about single pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tprl.data.choices import LETTERS, RULE, MultipleChoice, number_of
from tprl.data.tables import Table, column
from tprl.data.taking import BadRow
from tprl.data.values import several
from tprl.types import Sample

TYPES = (
    "scene_understanding",
    "instance_identity",
    "instance_attributes",
    "instance_location",
    "instances_counting",
    "spatial_relation",
    "instance_interaction",
    "visual_reasoning",
    "text_understanding",
)  # question_type_id 1 to 9; 10 to 12 are about videos


class SeedBench(MultipleChoice):
    """Accuracy over all questions about images, and per type of question, percent.

    Source: "SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension" (Li et al.,
    arXiv 2307.16125); the names of the types are those of its repository's DATASET.md. Rows whose
    `data_type` is "video" are no questions of this dataset: they are left out before anything is
    counted, `limit` included.
    """

    name = "seedbench"
    hub = "lmms-lab/SEED-Bench"
    splits: ClassVar = {"test": "test"}
    protocol = f"SEED-Bench accuracy on its image part, generated answers; {RULE}"

    def read(self, source: str, split: str) -> Table:
        rows = super().read(source, split)
        self._images = [
            place for place, kind in enumerate(column(rows, "data_type")) if kind != "video"
        ]
        return rows

    def count(self) -> int:
        return len(self._images)

    def at(self, index: int) -> int:
        return self._images[index]

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        kind, images = int(row["question_type_id"] or 0), several(row["image"])
        if not 1 <= kind <= len(TYPES):
            raise BadRow("unknown type of question")
        if len(images) != 1:
            raise BadRow("no single image")
        options = [row[f"choice_{letter.lower()}"] for letter in LETTERS[:4]]
        right = number_of(row["answer"])
        image = self.image(images[0], row["data_id"])
        uid = self.uid(row["data_id"], row["question_id"])
        return self.posed(uid, image, row["question"], options, right, TYPES[kind - 1])

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each type: right, asked."""
        counts = [0.0] * 2 * len(TYPES)
        place = 2 * TYPES.index(sample.family)
        counts[place : place + 2] = self.score(sample, prediction), 1.0
        return counts

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """Percent; nan for a type that was not asked."""
        right, asked = total.unflatten(-1, (len(TYPES), 2)).unbind(-1)
        numbers = {"accuracy": 100 * right.sum(-1) / asked.sum(-1)}
        return numbers | {
            f"accuracy/{name}": 100 * right[..., i] / asked[..., i] for i, name in enumerate(TYPES)
        }
