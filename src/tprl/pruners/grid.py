"""Geometry of a grid of visual tokens: where k windows lie on it, and which tokens spread evenly
over it.

Pure functions of (rows, columns, k), cached: they know nothing of a batch. A token is one cell;
cells are counted from 0 in raster order and cell (r, c) covers [r, r + 1) x [c, c + 1).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def layout(rows: int, columns: int, k: int) -> tuple[int, ...]:
    """How many windows each horizontal band of the grid holds; the k windows cover the grid.

    All bands are equally high. If k = m x c with windows whose sides differ by at most a factor of
    2, every band has c windows (the squarest such pair; of two equally square ones the one with
    more bands, so 24 x 24 gives 16 x 12 for k = 192). Else the number of bands is the one nearest
    to square windows, and the k windows are dealt out as evenly as integers allow: band i of m gets
    floor((i + 1) k / m) - floor(i k / m).

    Raises:
        ValueError: k is not in 1..rows * columns.
    """
    if not 1 <= k <= rows * columns:
        raise ValueError(f"cannot lay {k} windows on a grid of {rows} x {columns} tokens.")
    # Bands of equally many windows, if none of these is stretched by more than 2.
    exact = [m for m in range(min(rows, k), 0, -1) if k % m == 0 and k // m <= columns]
    best = min(exact, key=lambda m: _stretch(rows, columns, m, k), default=None)
    if best is not None and _stretch(rows, columns, best, k) <= math.log(2) + 1e-9:
        return (k // best,) * best
    # Else as many bands as make windows squarest, and the k windows dealt out evenly.
    fitting = range(min(rows, k), math.ceil(k / columns) - 1, -1)
    m = min(fitting, key=lambda m: _stretch(rows, columns, m, k))
    return tuple((i + 1) * k // m - i * k // m for i in range(m))


def _stretch(rows: int, columns: int, m: int, k: int) -> float:
    """|log of height / width| of a window when k windows lie in m bands; 0 is square. Rounded, so
    that ties tie."""
    return round(abs(math.log((rows / m) / (columns * m / k))), 9)


@lru_cache(maxsize=512)
def centers(rows: int, columns: int, k: int) -> Int[Tensor, " K"]:
    """The cell that holds the center of each of the k windows: distinct and ascending."""
    bands = layout(rows, columns, k)
    cells = []
    for i, count in enumerate(bands):
        # Row (i + 1/2) rows / bands and column (j + 1/2) columns / count, in integers.
        row = (2 * i + 1) * rows // (2 * len(bands))
        for j in range(count):
            cells.append(row * columns + (2 * j + 1) * columns // (2 * count))
    return torch.tensor(cells)


@lru_cache(maxsize=64)
def windows(rows: int, columns: int, k: int) -> Float[Tensor, "K N"]:
    """Averaging weights of k windows over the N = rows * columns cells; every line sums to 1.

    Window j of n along an axis of length L spans [floor(j L / n), ceil((j + 1) L / n)), so
    neighbors overlap where n does not divide L: the windows of `adaptive_avg_pool2d`.
    """
    bands = layout(rows, columns, k)
    down = _spans(rows, len(bands))
    # A window is the product of its weights down and across; bands differ in the latter.
    lines = []
    for i, n in enumerate(bands):
        for across in _spans(columns, n):
            lines.append(torch.outer(down[i], across).flatten())
    return torch.stack(lines)


def _spans(length: int, n: int) -> Float[Tensor, "n length"]:
    j = torch.arange(n).unsqueeze(1)
    cell = torch.arange(length)
    # -(-a // b) is the ceiling of a / b in integers.
    inside = (cell >= j * length // n) & (cell < -(-(j + 1) * length // n))
    return inside / inside.sum(1, keepdim=True)


@lru_cache(maxsize=64)
def spread_order(rows: int, columns: int) -> Int[Tensor, " N"]:
    """Rank of every cell in farthest-point order: the first j cells are spread over the grid, for
    every j at once.

    Starts at the center; each next cell is the one farthest from all before it (ties by lower
    index).
    """
    cell = torch.arange(rows * columns)
    xy = torch.stack([cell // columns, cell % columns], 1)
    # `gap`: squared distance of each cell to the nearest one that has a rank.
    rank, gap = torch.zeros_like(cell), torch.full_like(cell, torch.iinfo(torch.long).max)
    pick = rows // 2 * columns + columns // 2
    for step in range(len(cell)):
        rank[pick] = step
        gap = torch.minimum(gap, (xy - xy[pick]).square().sum(1))
        pick = int(gap.argmax())
    return rank


def grid_table(
    shapes: Sequence[tuple[int, ...]], lines: Callable[..., Shaped[Tensor, "..."]], out: Tensor
) -> Tensor:
    """`out` with row i overwritten, from its beginning, by `lines(*shapes[i])`; one call per
    distinct shape.

    A shape that ends in 0 (no window) has no lines.
    """
    # Equal shapes share one computation; batches have few distinct ones.
    for shape in {shape for shape in shapes if shape[-1]}:
        value = lines(*shape).to(out)
        same = [i for i, other in enumerate(shapes) if other == shape]
        rows = torch.tensor(same, device=out.device)
        out[(rows, *(slice(n) for n in value.shape))] = value
    return out
