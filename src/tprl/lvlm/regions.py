"""Which visual tokens lie on the region that decides the answer: for analysis and the oracle
only."""

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.types import Box, Sample

# of a cell's area that a box must cover for the token to count as lying on it
MEANINGFUL_SHARE = 0.25


def region_rank(
    samples: Sequence[Sample],
    grids: Sequence[Sequence[Sequence[tuple[int, int]]]],
    width: int,
    seen: Sequence[Sequence[Box]] = (),
) -> Float[Tensor, "B V"]:
    """How central each visual token is to its sample's region; 0 off the region.

    A token is a cell of the grid (rows, columns) over the part of the original image that the model
    sees. It lies on a box if the box covers at least a quarter of the cell, or if the cell holds
    the box's center. The tokens on a box are ranked by the distance of their cell's center to the
    box's center, in pixels (ties by lower index), and score 1 / (1 + rank); on several boxes the
    best of the scores counts. So the top tokens alternate among the boxes, however large these are.
    No token lies on a box of which the model sees nothing.

    Args:
        samples: the boxes of `region` belong to the last image when there are several; None scores
            0 everywhere.
        grids: per sample, image and view, (rows, columns) of its visual tokens; the last view shows
            the whole image.
        width: V, the padded number of visual tokens.
        seen: see `Encoded.seen`; () where every image is seen whole.
    """
    scores = torch.zeros(len(samples), width)
    frames = seen or [_frames(sample) for sample in samples]
    for row, sample, images, views in zip(scores, samples, grids, frames, strict=True):
        # Only the last view, which shows the whole image, has places in the box's image.
        sizes = list(chain.from_iterable(images))
        if not sample.region or not sizes:
            continue
        end = sum(rows * columns for rows, columns in sizes)
        rows, columns = sizes[-1]
        ranks = [_box_rank(box, views[-1], rows, columns) for box in sample.region]
        row[end - rows * columns : end] = torch.stack(ranks).amax(0)
    return scores


def _box_rank(box: Box, seen: Box, rows: int, columns: int) -> Float[Tensor, " N"]:
    """1 / (1 + rank) on the cells that lie on one box; the grid lies over `seen`."""
    # Borders of the cells in pixels of the image: [columns + 1], [rows + 1].
    x, y = _edges(seen[0], seen[2], columns), _edges(seen[1], seen[3], rows)
    if not _meets(box, seen):
        return torch.zeros(rows * columns)
    # Covered area is the product of both axes' shares; small boxes have the cell of their center.
    share = _covered(y, box[1], box[3]).unsqueeze(1) * _covered(x, box[0], box[2])
    on = share.flatten() >= MEANINGFUL_SHARE
    center_x, center_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    on |= (_holds(y, center_y).unsqueeze(1) & _holds(x, center_x)).flatten()
    # Squared distances rank as distances do; cells off the box come last.
    off_x, off_y = (x[:-1] + x[1:]) / 2 - center_x, (y[:-1] + y[1:]) / 2 - center_y
    distance = (off_y.square().unsqueeze(1) + off_x.square()).flatten().masked_fill(~on, torch.inf)
    # The order of the order is each cell's rank.
    rank = distance.argsort(stable=True).argsort()
    return torch.where(on, 1 / (1 + rank), 0.0)


def _frames(sample: Sample) -> list[Box]:
    """Every image of a sample whole."""
    return [_whole(image.size) for image in sample.images]


def _whole(size: tuple[int, int]) -> Box:
    return 0.0, 0.0, float(size[0]), float(size[1])


def _meets(box: Box, seen: Box) -> bool:
    """Whether a box lies on what is seen with more than an edge; one without area does where it
    stands."""
    across, down = (
        box[axis] < seen[axis + 2] and (box[axis + 2] > seen[axis] or box[axis] >= seen[axis])
        for axis in (0, 1)
    )
    return across and down


def _edges(low: float, high: float, n: int) -> Float[Tensor, " n1"]:
    """Borders of n equal cells over [low, high]; float64, so that symmetric cells tie."""
    return low + torch.arange(n + 1, dtype=torch.float64) * (high - low) / n


def _covered(edge: Float[Tensor, " n1"], low: float, high: float) -> Float[Tensor, " n"]:
    """Share of each cell, along one axis, that [low, high) covers."""
    overlap = edge[1:].clamp(max=high) - edge[:-1].clamp(min=low)
    return overlap.clamp(min=0) / (edge[1:] - edge[:-1])


def _holds(edge: Float[Tensor, " n1"], at: float) -> Bool[Tensor, " n"]:
    """The one cell that holds a coordinate; the nearest one where it lies outside of all."""
    # A center on the last border belongs to the last cell.
    inside = min(max(at, float(edge[0])), float(edge[-1]) - 1e-6)
    return (edge[:-1] <= inside) & (inside < edge[1:])
