"""Which visual tokens lie on the region that decides the answer: for analysis and the oracle only."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.types import Box, Sample

MEANINGFUL_SHARE = 0.25  # of a cell's area that a box must cover for the token to count as lying on it


def region_rank(
    samples: Sequence[Sample], grids: Sequence[Sequence[Sequence[tuple[int, int]]]], width: int
) -> Float[Tensor, "B V"]:
    """How central each visual token is to its sample's region; 0 off the region.

    A token is a cell of the grid (rows, columns) stretched over the original image. It lies on a box if the box covers
    at least a quarter of the cell, or if the cell holds the box's center. The tokens on a box are ranked by the
    distance of their cell's center to the box's center, in pixels (ties by lower index), and score 1 / (1 + rank); on
    several boxes the best of the scores counts. So the top tokens alternate among the boxes, however large these are.

    Args:
        samples: the boxes of `region` belong to the last image when there are several; None scores 0 everywhere.
        grids: per sample, image and view, (rows, columns) of its visual tokens; the last view shows the whole image.
        width: V, the padded number of visual tokens.
    """
    scores = torch.zeros(len(samples), width)
    for row, sample, images in zip(scores, samples, grids, strict=True):
        sizes = [view for views in images for view in views]
        if not sample.region or not sizes:
            continue
        end = sum(rows * columns for rows, columns in sizes)
        rows, columns = sizes[-1]
        row[end - rows * columns : end] = torch.stack(
            [_box_rank(box, sample.images[-1].size, rows, columns) for box in sample.region]
        ).amax(0)
    return scores


def _box_rank(box: Box, size: tuple[int, int], rows: int, columns: int) -> Float[Tensor, " N"]:
    """1 / (1 + rank) on the cells that lie on one box; `size` is (width, height) of the image in pixels."""
    x, y = _edges(size[0], columns), _edges(size[1], rows)
    on = (_covered(y, box[1], box[3]).unsqueeze(1) * _covered(x, box[0], box[2])).flatten() >= MEANINGFUL_SHARE
    center_x, center_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    on |= (_holds(y, center_y).unsqueeze(1) & _holds(x, center_x)).flatten()
    off_x, off_y = (x[:-1] + x[1:]) / 2 - center_x, (y[:-1] + y[1:]) / 2 - center_y
    distance = (off_y.square().unsqueeze(1) + off_x.square()).flatten().masked_fill(~on, torch.inf)
    rank = distance.argsort(stable=True).argsort()
    return torch.where(on, 1 / (1 + rank), 0.0)


def _edges(length: int, n: int) -> Float[Tensor, " n1"]:
    """Borders of n equal cells over `length` pixels; float64, so that symmetric cells tie."""
    return torch.arange(n + 1, dtype=torch.float64) * length / n


def _covered(edge: Float[Tensor, " n1"], low: float, high: float) -> Float[Tensor, " n"]:
    """Share of each cell, along one axis, that [low, high) covers."""
    overlap = edge[1:].clamp(max=high) - edge[:-1].clamp(min=low)
    return overlap.clamp(min=0) / (edge[1:] - edge[:-1])


def _holds(edge: Float[Tensor, " n1"], at: float) -> Bool[Tensor, " n"]:
    """The one cell that holds a coordinate; the nearest one where it lies outside the image."""
    inside = min(max(at, 0.0), float(edge[-1]) - 1e-6)
    return (edge[:-1] <= inside) & (inside < edge[1:])
