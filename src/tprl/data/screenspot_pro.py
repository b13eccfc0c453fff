"""ScreenSpot-Pro: which element of a professional program's screen does an instruction mean?"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import scaled, text_of
from tprl.data.boxes import Size, inside
from tprl.data.grounding import Grounding
from tprl.data.tables import Table
from tprl.data.taking import BadRow
from tprl.data.text_tables import read_text_table
from tprl.data.values import shortened
from tprl.types import Sample

QUESTION = (
    "Find the element of this screen that the instruction is about.\nInstruction: {instruction}"
)
GROUPS = ("Dev", "Creative", "CAD", "Scientific", "Office", "OS")
TYPES = ("text", "icon")
FAMILIES = tuple(f"{group}-{kind}" for group, kind in product(GROUPS, TYPES))


class ScreenSpotPro(Grounding):
    """Click accuracy, over all questions, per type of element and per group of programs; and mean
    IoU; percent.

    Source: "ScreenSpot-Pro: GUI Grounding for Professional High-Resolution Computer Use" (Li et
    al., arXiv 2504.07981) and its released evaluation: an answer is right if its point, or the
    center of its box, is in the true box, edges included. We ask for a box, since the reward and
    the mean IoU need one; a point has an IoU of 0. The released evaluation asks every model in its
    own words, some for points, so its numbers are not those of this prompt.

    `source` may also be a clone of likaixin/ScreenSpot-Pro, with its folders `annotations` and
    `images`. Screens have up to 20 megapixels, above `MAX_PIXELS`: those are scaled down, with
    their boxes.
    """

    name = "screenspot_pro"
    hub = "lmms-lab/ScreenSpot-Pro"
    splits: ClassVar = {"test": "train"}  # the only split there
    protocol = (
        "ScreenSpot-Pro click accuracy, asked for one box: its "
        "center, or the answer's point, must be in the true box"
    )

    def read(self, source: str, split: str) -> Table:
        # A clone has one json per program; without `annotations` it is a table like any other.
        folder = Path(source)
        if not (folder / "annotations").is_dir():
            return super().read(source, split)
        files = sorted((folder / "annotations").glob("*.json"))
        rows = list(chain.from_iterable(read_text_table(file) for file in files))
        return [{**row, "image": str(folder / "images" / row["img_filename"])} for row in rows]

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        # The family decides where the answer counts, so an unknown family is damage.
        family = f"{row['group']}-{row['ui_type']}"
        if family not in FAMILIES:
            raise BadRow("unknown group or type of element")
        instruction = text_of(row["instruction"], "empty question")
        image = self.image(row["image"], row["img_filename"])
        # The box is drawn on the original screen and scaled to the image that the model gets.
        size = _size(row["img_size"], self.original_size)
        box = scaled(self.true_box(row["bbox"], size, index, "bbox"), size, image)
        # Slashes separate the parts of a uid, so an id must not hold any.
        uid = self.uid(row["img_filename"], str(row["id"]).replace("/", "_"))
        question = self.asked(QUESTION.format(instruction=instruction))
        return Sample(uid, (image,), question, (self.written(box, image),), family, box, (box,))

    def score(self, sample: Sample, prediction: str) -> float:
        assert sample.box is not None
        place = self.place_in(prediction, sample.images[0])
        return float(place is not None and inside(place, sample.box))

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each group and type: right, asked; then IoU."""
        # Pairs (right, asked) in the order of FAMILIES: groups outside, types inside.
        counts = [0.0] * 2 * len(FAMILIES)
        place = 2 * FAMILIES.index(sample.family)
        counts[place : place + 2] = self.score(sample, prediction), 1.0
        return (*counts, self.iou(sample, prediction))

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """Percent; nan for what was not asked."""
        blocks = total[..., :-1].unflatten(-1, (len(GROUPS), len(TYPES), 2))
        overlap = total[..., -1]
        # [... groups types] each.
        right, asked = blocks.unbind(-1)
        # Sums before divisions: a type's accuracy is over its questions, not a mean of groups.
        every = asked.sum((-1, -2))
        numbers = {"accuracy": 100 * right.sum((-1, -2)) / every, "mean_iou": 100 * overlap / every}
        for at, kind in enumerate(TYPES):
            numbers[f"accuracy/{kind}"] = 100 * right[..., at].sum(-1) / asked[..., at].sum(-1)
        for at, group in enumerate(GROUPS):
            count = asked[..., at, :].sum(-1)
            numbers[f"accuracy/{group}"] = 100 * right[..., at, :].sum(-1) / count
        return numbers


def _size(value: Any, stored: Size) -> Size:
    """The size of the screen that boxes were drawn on; the stored image may be a smaller copy of
    it.

    Raises:
        BadRow: no size, or one of another shape than the image's.
    """
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    ):
        raise BadRow("no size of the screen", f"img_size={shortened(value)}; give [width, height]")
    width, height = map(int, value)
    # Rounding of a smaller copy changes either side by less than a pixel.
    if min(width, height) < 1 or abs(width * stored[1] - height * stored[0]) > max(width, height):
        raise BadRow(
            "img_size is not that of the image", f"img_size={value}, and the image has {stored}"
        )
    return width, height
