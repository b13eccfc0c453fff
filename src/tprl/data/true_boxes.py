"""Boxes that rows give as the right answer: in which unit and form they are written, and which
cannot be right."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

from tprl.data.boxes import Size, in_pixels, iou, unit
from tprl.data.taking import BadRow
from tprl.data.values import shortened
from tprl.errors import UserError
from tprl.types import Box

UNITS = {
    "absolute": "pixels",
    "relative": "fractions between 0 and 1",
    "thousand": "numbers from 0 to 1000",
}
FORMS = {"corners": "[x1, y1, x2, y2]", "size": "[x, y, width, height]"}
HIGHEST = {"relative": 1.0, "thousand": 1000.0}
ROUNDING = 1.02  # by which a value may exceed its unit's highest
SMALL = 8  # pixels of an image in which a box may be a single pixel
INSIDE = 0.5  # share of a box that must lie in its image; what is outside is clipped
# boxes, and their share of all, that tell a wrong unit from single damaged rows
COUNT, SHARE = 3, 0.2


@dataclass(frozen=True)
class BoxReader:
    """How the boxes of rows are written.

    Args:
        unit: a key of `UNITS`.
        form: a key of `FORMS`.

    Raises:
        UserError: an unknown unit or form.
    """

    unit: str = "absolute"
    form: str = "corners"

    def __post_init__(self) -> None:
        for key, value, known in (("box_unit", self.unit, UNITS), ("box_form", self.form, FORMS)):
            if value not in known:
                listed = ", ".join(f"{name} ({meaning})" for name, meaning in known.items())
                raise UserError(f"dataset.{key} must be one of {listed}, got {value}.")

    def read(self, value: Any, size: Size, column: str = "box") -> tuple[Box, bool]:
        """A box in pixels of an image of `size`, and whether something outside of the image was
        clipped.

        Raises:
            BadRow: no four numbers, corners that are not in order, another unit, or less than half
                of it in the image.
        """
        source = f"{column}={shortened(value)}"
        # From the shape of the value to its place in the image: the first fault is the plainest.
        values = four_numbers(value)
        if values is None:
            raise BadRow("no box", f"{source}; give {FORMS[self.form]} in {UNITS[self.unit]}")
        if not ordered_corners(self._corners(values)):
            raise BadRow("empty box", f"{source}; {self._order()}")
        self._check_unit(values, size, source)
        x1, y1, x2, y2 = in_pixels(self._corners(values), unit(self.unit, size, size))
        box = (x1, y1, x2, y2)
        clipped = clip(box, size)
        if clipped is None:
            raise BadRow(
                "box outside of the image",
                f"{source}, and the image is {size[0]} x {size[1]} pixels",
            )
        # A little outside is rounding; half outside is another image, unit or form.
        if area(clipped) < INSIDE * area(box):
            raise BadRow(
                "box mostly outside of the image",
                f"{source}, and the image is {size[0]} x {size[1]} pixels",
            )
        return clipped, max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > 0.5

    def wrong_for_all(self, values: Sequence[Any], sizes: Sequence[Size]) -> str | None:
        """Why the unit or form cannot be that of a whole file, with the option to set; None where
        it may be.

        Args:
            values: boxes of some rows, as the file has them.
            sizes: of the images that they belong to.
        """
        # One rule for the whole file, before its rows are counted as damaged one by one.
        pairs = [
            (box, size)
            for box, size in zip(map(four_numbers, values), sizes, strict=True)
            if box is not None
        ]
        if len(pairs) < COUNT:
            return None
        tests = (self._fractions(pairs), self._sizes(pairs), self._thousandths(pairs))
        return next((sentence for sentence in tests if sentence), None)

    def _corners(self, values: Sequence[float]) -> Box:
        x, y, a, b = values
        return (x, y, x + a, y + b) if self.form == "size" else (x, y, a, b)

    def _order(self) -> str:
        if self.form == "size":
            return "give [x, y, width, height] with a width and a height above 0"
        return (
            "give [x1, y1, x2, y2] with x1 < x2 and y1 < y2, or "
            "set dataset.box_form=size for [x, y, width, height]"
        )

    def _check_unit(self, values: Sequence[float], size: Size, source: str) -> None:
        highest = HIGHEST.get(self.unit)
        if highest is not None and max(values) > ROUNDING * highest:
            raise BadRow(
                "box in another unit",
                f"{source}; dataset.box_unit={self.unit} is {UNITS[self.unit]}",
            )
        if self.unit != "relative" and max(values) <= 1 and max(size) > SMALL:
            raise BadRow(
                "box in another unit", f"{source} holds fractions; set dataset.box_unit=relative"
            )

    def _fractions(self, pairs: Sequence[tuple[Box, Size]]) -> str | None:
        small = sum(max(box) <= 1 and max(size) > SMALL for box, size in pairs)
        if self.unit == "relative" or not _many(small, len(pairs)):
            return None
        return (
            f"{small} of {len(pairs)} boxes hold numbers "
            "between 0 and 1: set dataset.box_unit=relative"
        )

    def _sizes(self, pairs: Sequence[tuple[Box, Size]]) -> str | None:
        if self.form == "size":
            return None
        swapped = sum(not ordered_corners(box) and min(box[2:]) > 0 for box, _ in pairs)
        if not _many(swapped, len(pairs)):
            return None
        return (
            f"in {swapped} of {len(pairs)} boxes the second corner is not right of and below the "
            "first, as in [x, y, width, height]: set dataset.box_form=size, or mend the boxes"
        )

    def _thousandths(self, pairs: Sequence[tuple[Box, Size]]) -> str | None:
        outside = sum(not _fits(self._corners(box), size) for box, size in pairs)
        highest = max(max(self._corners(box)) for box, _ in pairs)
        if self.unit != "absolute" or not _many(outside, len(pairs)):
            return None
        # All within 1000 speaks for thousandths, more for another size of image.
        if highest <= ROUNDING * HIGHEST["thousand"]:
            remedy = (
                "and none reaches beyond 1000: set dataset.box_unit=thousand "
                "if they are numbers from 0 to 1000"
            )
        else:
            remedy = (
                "so they belong to images of another size: mend "
                "the boxes, or give the images they were drawn on"
            )
        return f"{outside} of {len(pairs)} boxes reach outside of their images {remedy}"


def four_numbers(value: Any) -> Box | None:
    """Four finite numbers; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    for number in value:
        if not isinstance(number, int | float) or isinstance(number, bool) or not isfinite(number):
            return None
    a, b, c, d = map(float, value)
    return (a, b, c, d)


def ordered_corners(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def area(box: Box) -> float:
    return prod(max(0.0, box[i + 2] - box[i]) for i in range(2))


def clip(box: Box, size: Size) -> Box | None:
    """The part of a box that is in the image; None where none is."""
    width, height = map(float, size)
    inner = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    return inner if iou(box, (0.0, 0.0, width, height)) > 0 else None


def _fits(box: Box, size: Size) -> bool:
    return max(box[0::2]) <= ROUNDING * size[0] and max(box[1::2]) <= ROUNDING * size[1]


def _many(count: int, total: int) -> bool:
    return count >= COUNT and count >= SHARE * total
