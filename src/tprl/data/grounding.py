"""What benchmarks share whose answers are boxes."""

import logging
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tprl.data.benchmark import Benchmark
from tprl.data.boxes import (
    COORDINATES,
    Size,
    box_text,
    first_box,
    first_place,
    in_pixels,
    iou,
    unit,
)
from tprl.data.images import MAX_PIXELS
from tprl.data.true_boxes import BoxReader
from tprl.errors import UserError
from tprl.types import Box, Sample

CLIPPED = "boxes clipped to their image"
USUAL = 640, 480  # width and height of the photographs of most benchmarks
log = logging.getLogger(__name__)


class Grounding(Benchmark):
    """Questions about where something is; `Sample.box` is in pixels of the sample's image.

    Numbers in an answer are read by one convention (`boxes.COORDINATES`), whatever their size: 0.5
    is half a pixel where pixels are agreed on. It is that of the LVLM in use, see `reads_boxes_as`,
    unless `coordinates` names another.

    Args:
        coordinates: "absolute", "relative", "thousand" or "resized"; None is how the LVLM writes
            them.
        box_unit, box_form: how rows write the true boxes, see `true_boxes`; None is how this
            dataset publishes them.
        split, limit, source, max_bad_rows, max_pixels: see `Benchmark`.

    Raises:
        UserError: unknown coordinates, unit or form, or `Benchmark`'s reasons.
    """

    answer_tokens = 64  # some models write JSON
    form = "corners"  # of its published boxes, a key of `true_boxes.FORMS`

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        source: str | None = None,
        max_bad_rows: float = 0.01,
        coordinates: str | None = None,
        box_unit: str | None = None,
        box_form: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if coordinates is not None and coordinates not in COORDINATES:
            raise UserError(
                f"dataset.coordinates must be one of {', '.join(COORDINATES)}, "
                f"got {coordinates}; use null for those of the model."
            )
        self._coordinates, self._rule = coordinates, self.protocol
        self._lvlm: Any = None  # what answers, once it is known
        self.reader = BoxReader(box_unit or "absolute", box_form or self.form)
        self._clipped = set[int]()
        self._say()
        super().__init__(split, limit, source, max_bad_rows, max_pixels)

    def reads_boxes_as(self, lvlm: Any) -> None:
        """Ask for boxes, and read them, as this LVLM writes them. To be called before the first
        question is taken."""
        self._lvlm = lvlm
        if self._coordinates is None:
            self._coordinates = lvlm.coordinates or None
        self._say()
        self._warn_of_crops(lvlm)

    def _warn_of_crops(self, lvlm: Any) -> None:
        """Say so where the LVLM sees a part of its images only."""
        if self._coordinates == "absolute" or not hasattr(lvlm, "seen_box"):
            return
        # A photograph of the usual shape tells, before any image is opened.
        width, height = USUAL
        x1, y1, x2, y2 = lvlm.seen_box(width, height)
        # The crop may reach outside, where the processor pads.
        share = (min(x2, width) - max(x1, 0)) * (min(y2, height) - max(y1, 0)) / (width * height)
        if share < 1:
            log.warning(
                (
                    "the processor of %s crops images (of %d x %d pixels it shows %.0f %%): boxes "
                    "of %s are read within what it shows, and those beyond it cannot be answered"
                ),
                *(lvlm.name, width, height, 100 * share, self.name),
            )

    def _say(self) -> None:
        if self._coordinates is not None:
            self.protocol = f"{self._rule}; boxes in {self._coordinates} coordinates"

    @property
    def coordinates(self) -> str:
        """The convention in use.

        Raises:
            UserError: nothing says which.
        """
        if self._coordinates is None:
            raise UserError(
                f"the coordinates of boxes in answers to {self.name} are unknown: set "
                f"dataset.coordinates to one of {', '.join(COORDINATES)}."
            )
        return self._coordinates

    def asked(self, text: str) -> str:
        """A question with the request for a box."""
        return f"{text}\nAnswer with one box [x1, y1, x2, y2] {COORDINATES[self.coordinates]}."

    def written(self, box: Box, image: Image.Image) -> str:
        """A box in pixels as the LVLM would write it."""
        x1, y1, x2, y2 = self._shown(image)
        # What a processor crops away the model cannot point at: its nearest answer ends at the edge
        # of what it sees.
        seen = (
            min(max(box[0], x1), x2),
            min(max(box[1], y1), y2),
            min(max(box[2], x1), x2),
            min(max(box[3], y1), y2),
        )
        return box_text(seen, self.coordinates, *self._unit(image))

    def longest_box(self) -> str:
        """A box as long as any that the LVLM would write, of a screen of four digits; "" where
        nothing says how boxes are written."""
        value = {"relative": 0.888, "thousand": 888.0, None: 0.0}.get(self._coordinates, 8888.0)
        if self._coordinates is None:
            return ""
        return box_text((value, value, value, value), self._coordinates, (1.0, 1.0))

    def references(self, limit: int | None = None) -> Iterator[tuple[str, ...]]:
        """A box for every question, see `longest_box`."""
        boxes = min(limit or len(self), len(self)) if self.longest_box() else 0
        yield from ((self.longest_box(),) for _ in range(boxes))

    def box_in(self, prediction: str, image: Image.Image) -> Box | None:
        """The first box of an answer in pixels; None if there is none."""
        box = first_box(prediction)
        if box is None:
            return None
        x1, y1, x2, y2 = in_pixels(box, *self._unit(image))
        return (x1, y1, x2, y2)

    def place_in(self, prediction: str, image: Image.Image) -> tuple[float, ...] | None:
        """The first box or point of an answer in pixels; None if there is none."""
        place = first_place(prediction)
        return None if place is None else in_pixels(place, *self._unit(image))

    def iou(self, sample: Sample, prediction: str) -> float:
        """Overlap of the answer's first box and the true one; 0 where the answer has none."""
        box = self.box_in(prediction, sample.images[0])
        return 0.0 if box is None or sample.box is None else iou(box, sample.box)

    def true_box(self, value: Any, size: Size, index: int, column: str = "box") -> Box:
        """The box of question `index` as its row has it, in pixels of an image of `size`; what
        reaches outside of the image is clipped and counted in `notes`.

        Raises:
            BadRow: `BoxReader.read`'s reasons.
        """
        box, clipped = self.reader.read(value, size, column)
        if clipped:
            self._clipped.add(index)
        return box

    @property
    def notes(self) -> dict[str, int]:  # type: ignore[override] (rows are still being read)
        """What was changed in rows that were read, and in how many."""
        return {CLIPPED: len(self._clipped)} if self._clipped else {}

    def _shown(self, image: Image.Image) -> Box:
        """The part of an image that the answer's coordinates are of: what the LVLM sees, within the
        image."""
        width, height = image.size
        if self.coordinates == "absolute" or not hasattr(self._lvlm, "seen_box"):
            return 0.0, 0.0, float(width), float(height)
        return self._lvlm.seen_box(width, height)

    def _unit(self, image: Image.Image) -> tuple[tuple[float, float], tuple[float, float]]:
        """Pixels in one unit of x and of y, and where they count from."""
        # Only "resized" depends on what the processor makes of the image.
        seen: Size = image.size
        if self.coordinates == "resized":
            if not hasattr(self._lvlm, "seen_size"):
                name = "no model" if self._lvlm is None else self._lvlm.name
                raise UserError(
                    "dataset.coordinates=resized needs the size at which a model sees an image, "
                    f"and {name} does not say it: use absolute, relative or thousand."
                )
            seen = self._lvlm.seen_size(*image.size)
        x1, y1, x2, y2 = self._shown(image)
        return unit(self.coordinates, (x2 - x1, y2 - y1), seen), (x1, y1)
