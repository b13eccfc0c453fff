"""Raster pictures of the report: what is kept and how likely it was, as PNG data URIs."""

import base64
import io
import math

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tprl.evaluation.pictures import Mask
from tprl.types import Box

PICTURE_BYTES = 1_700_000  # PNG bytes of all pictures together, before base64 adds a third


def picture_side(pictures: int) -> int:
    """Longest side in pixels at which that many noisy 64-color PNGs stay within PICTURE_BYTES."""
    return min(256, int(math.sqrt(PICTURE_BYTES / (0.8 * max(pictures, 1)))))


def plain_picture(image: Image.Image, side: int) -> Image.Image:
    """The image, its longer side scaled to `side` pixels."""
    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def mask_picture(image: Image.Image, keep: Mask, side: int, seen: Box | None = None) -> Image.Image:
    """The image with its pruned patches darkened and faded; `keep` is [rows, columns] over the part
    that is `seen` (pixels of the image; None: all of it), and the rest is black."""
    picture = np.asarray(plain_picture(image, side), dtype=np.float32)
    level, inside = _over_pixels(keep.astype(np.float32), picture.shape, _fractions(image, seen))
    gray = picture.mean(2, keepdims=True)
    dark = (0.26 * (0.45 * picture + 0.55 * gray) + 10) * inside[..., None]
    return Image.fromarray(np.where((level > 0.5)[..., None], picture, dark).astype(np.uint8))


def probability_picture(
    image: Image.Image, probability: NDArray[np.floating], side: int, seen: Box | None = None
) -> Image.Image:
    """A keep-probability map [rows, columns], stretched to its own range, over the gray image;
    `seen` as above."""
    picture = np.asarray(plain_picture(image, side), dtype=np.float32)
    low, high = float(probability.min()), float(probability.max())
    cells = (probability - low) / max(high - low, 1e-9)
    level, inside = _over_pixels(cells, picture.shape, _fractions(image, seen))
    heat = matplotlib.colormaps["inferno"](level)[..., :3] * 255
    blend = 0.3 * picture.mean(2, keepdims=True) + 0.7 * heat
    return Image.fromarray((blend * inside[..., None]).astype(np.uint8))


def _fractions(image: Image.Image, seen: Box | None) -> Box:
    """A box in pixels of the image as fractions of its sides."""
    width, height = image.size
    return (0.0, 0.0, 1.0, 1.0) if seen is None else (
        seen[0] / width, seen[1] / height, seen[2] / width, seen[3] / height
    )  # fmt: skip


def _over_pixels(
    cells: NDArray[np.floating], shape: tuple[int, ...], box: Box
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """[rows, columns] repeated over a box of a picture [height, width]: each pixel reads the cell
    that its center lies in, 0 outside of the box; and which pixels are in the box. The box is in
    fractions of the picture."""

    def cell(length: int, count: int, low: float, high: float) -> NDArray[np.floating]:
        return np.floor(((np.arange(length) + 0.5) / length - low) / (high - low) * count)

    row = cell(shape[0], cells.shape[0], box[1], box[3])
    column = cell(shape[1], cells.shape[1], box[0], box[2])
    inside = ((row >= 0) & (row < cells.shape[0]))[:, None] & (
        (column >= 0) & (column < cells.shape[1])
    )[None, :]
    rows, columns = (
        row.clip(0, cells.shape[0] - 1).astype(int),
        column.clip(0, cells.shape[1] - 1).astype(int),
    )
    return np.where(inside, cells[rows[:, None], columns[None, :]], 0.0), inside


def data_uri(picture: Image.Image, colors: int | None = 256) -> str:
    """A PNG as a data URI, of at most so many colors (None: all of them)."""
    out = io.BytesIO()
    # Median cut, the default, spends its colors on large areas: a small purple square came out
    # gray. An octree is off by 13 of 255 at most, and its files are smaller.
    few = (
        picture
        if colors is None
        else picture.quantize(colors, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    few.save(out, format="PNG", optimize=colors is not None)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
