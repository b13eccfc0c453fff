"""RefCOCO, RefCOCO+ and RefCOCOg: which region of a photograph does an expression mean?"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import scaled, text_of
from tprl.data.grounding import Grounding
from tprl.data.tables import Table, column
from tprl.data.values import several
from tprl.errors import UserError
from tprl.types import Sample

QUESTION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}"
)
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {  # hub repository, splits
    "refcoco": ("lmms-lab/RefCOCO", {"val": "val", "test": "testA"}),
    "refcoco_plus": ("lmms-lab/RefCOCOplus", {"val": "val", "test": "testA"}),
    "refcocog": ("lmms-lab/RefCOCOg", {"val": "val", "test": "test"}),
}


class RefCOCO(Grounding):
    """Acc@0.5 (the answer's box overlaps the true one by an IoU of at least 0.5) and mean IoU,
    percent.

    Source: "ReferItGame" (Kazemzadeh et al., EMNLP 2014), "Modeling Context in Referring
    Expressions" (Yu et al., arXiv 1608.00272), "Generation and Comprehension of Unambiguous Object
    Descriptions" (Mao et al., arXiv 1511.02283).

    A row is a region with its expressions in `answer`; each of them is a question. "test" is testA
    (people) where there are two; split=testB is the other. In the hub's RefCOCO, `val` has 5,000
    regions more than the 3,811 of the usual split, and `test` is another division of the same
    images: report testA and testB.

    Args:
        variant: "refcoco", "refcoco_plus" or "refcocog".
        split, options: see `Grounding`.

    Raises:
        UserError: unknown variant, or `Grounding`'s reasons.
    """

    form = "size"

    def __init__(self, variant: str = "refcoco", split: str = "test", **options: Any) -> None:
        if variant not in VARIANTS:
            raise UserError(f"dataset.variant must be one of {', '.join(VARIANTS)}, got {variant}.")
        self.name = variant
        self.protocol = (
            f"{variant} Acc@0.5 of the answer's first box, "
            "asked for one per expression; no box is wrong"
        )
        self.hub, self.splits = VARIANTS[variant]  # type: ignore[misc]
        super().__init__(split, **options)

    def read(self, source: str, split: str) -> Table:
        rows = super().read(source, split)
        expressions = column(rows, "answer")
        # A question per expression; a region without any is one question, and a damaged one.
        self._places = []
        for place, some in enumerate(expressions):
            count = len(several(some) or [""])
            self._places += [(place, number) for number in range(count)]
        return rows

    def count(self) -> int:
        return len(self._places)

    def at(self, index: int) -> int:
        return self._places[index][0]

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        place, number = self._places[index]
        expression = text_of((several(row["answer"]) or [""])[number], "empty question")
        # of the image; the last number is the region's
        key = re.sub(r"(_\d{12})_\d+", r"\1", row["file_name"])
        image = self.image(row["image"], key)
        # Published as [x, y, width, height] of the original picture.
        true_box = self.true_box(row["bbox"], self.original_size, index, "bbox")
        box = scaled(true_box, self.original_size, image)
        question = self.asked(QUESTION.format(expression=expression))
        uid, answer = self.uid(key, f"{place}-{number}"), self.written(box, image)
        return Sample(uid, (image,), question, (answer,), box=box, region=(box,))

    def score(self, sample: Sample, prediction: str) -> float:
        return float(self.iou(sample, prediction) >= 0.5)

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """Right, IoU, asked."""
        overlap = self.iou(sample, prediction)
        return (float(overlap >= 0.5), overlap, 1.0)

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        right, overlap, asked = total.unbind(-1)
        return {"accuracy": 100 * right / asked, "mean_iou": 100 * overlap / asked}
