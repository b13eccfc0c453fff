"""Boxes and points in free text, and the coordinates that they are written in."""

import re
from collections.abc import Iterator, Sequence

from tprl.types import Box

# How a model writes coordinates, and how it is asked for them.
COORDINATES = {
    "absolute": "in pixels",  # of the image
    "relative": "as fractions of the image's width and height, between 0 and 1",
    "thousand": "on a scale from 0 to 1000 for the image's width and height",
    "resized": "in pixels",  # of what the processor makes of the image
}
Size = tuple[int, int]  # width, height

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_COMMA = r"(?:\s*,\s*|\s+)"
_PAIR = _NUMBER + _COMMA + _NUMBER
_FOUR = _PAIR + _COMMA + _PAIR
_PLACE = re.compile(
    "|".join(
        (
            rf"[\[(]\s*{_FOUR}\s*[\])]",  # [x1, y1, x2, y2], also as a value of JSON
            rf"[\[(]\s*{_PAIR}\s*[\])]\s*,?\s*[\[(]\s*{_PAIR}\s*[\])]",  # (x1,y1),(x2,y2)
            rf"(?<=<box>)\s*{_FOUR}\s*(?=</box>)",
            rf"^\s*{_FOUR}\s*\.?\s*$",  # nothing but a box
            rf"[\[(]\s*{_PAIR}\s*[\])]",  # (x, y)
            rf"(?<=<point>)\s*{_PAIR}\s*(?=</point>)",
            rf"^\s*{_PAIR}\s*\.?\s*$",
        )
    )
)


def first_place(text: str) -> tuple[float, ...] | None:
    """The first box (x1, y1, x2, y2) or point (x, y) in a text, corners in order; None if there is
    none.

    Boxes are [x1, y1, x2, y2] or (x1, y1, x2, y2), as in {"bbox_2d": [...]}; (x1,y1),(x2,y2);
    <box>...</box>; or four numbers that are the whole text. Points are (x, y) or [x, y],
    <point>...</point>, or two numbers that are the whole text. Numbers in other company, and boxes
    that are not complete, are none.
    """
    return next(_places(text), None)


def first_box(text: str) -> Box | None:
    """The same of boxes alone: points are passed over."""
    box = next((place for place in _places(text) if len(place) == 4), None)
    return None if box is None else ordered(box)


def _places(text: str) -> Iterator[tuple[float, ...]]:
    for match in _PLACE.finditer(text):
        values = [float(number) for number in re.findall(_NUMBER, match.group())]
        yield (values[0], values[1]) if len(values) == 2 else ordered(values)


def ordered(box: Sequence[float]) -> Box:
    """The same box with its upper left corner first."""
    x1, y1, x2, y2 = box
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    # Union: both areas, less what they share.
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area


def unit(coordinates: str, size: Size | tuple[float, float], seen: Size) -> tuple[float, float]:
    """Pixels of an image, or of the part of it that is seen, of `size` in one unit of x and of y;
    `seen` is its size after the processor's resize."""
    width, height = size
    return {
        "absolute": (1.0, 1.0),
        "relative": (float(width), float(height)),
        "thousand": (width / 1000, height / 1000),
        "resized": (width / seen[0], height / seen[1]),
    }[coordinates]


def in_pixels(
    place: Sequence[float], pixels: tuple[float, float], origin: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, ...]:
    """A box or point in units of `pixels` (see `unit`) from `origin` on, in pixels."""
    return tuple(value * pixels[i % 2] + origin[i % 2] for i, value in enumerate(place))


def box_text(
    box: Box,
    coordinates: str,
    pixels: tuple[float, float],
    origin: tuple[float, float] = (0.0, 0.0),
) -> str:
    """A box in pixels as a model would write it: three decimals of a fraction, whole numbers of
    anything else."""
    values = [(value - origin[i % 2]) / pixels[i % 2] for i, value in enumerate(box)]
    return (
        f"[{', '.join(f'{v:.3f}' if coordinates == 'relative' else str(round(v)) for v in values)}]"
    )


def inside(place: Sequence[float], box: Box) -> bool:
    """Whether a point, or the center of a box, is in a box; its edges belong to it."""
    x, y = place if len(place) == 2 else ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]
