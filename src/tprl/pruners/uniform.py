"""Evenly spread tokens: what a regular grid of samples of the image is worth."""

import torch

from tprl.budget import need_ratio, view_rows
from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.pruners.grid import centers, grid_table
from tprl.types import Encoded, TokenSelection


class UniformPruner(BasePruner):
    """The tokens nearest to the centers of k equal windows that tile the image's grid, k =
    budget().

    Source: folklore (strided sampling). The k windows are `tprl.pruners.grid.layout`: an exact m x
    c grid when k has one with windows no longer than twice their width, else bands with different
    numbers of windows, so that any k is met exactly. Centers of windows at least one cell high and
    wide fall in distinct cells. Several views of an image share its budget. Complexity O(k) per
    distinct grid; nothing of the model is read. A published stride keeps ceil(n / stride) tokens;
    ours keeps budget().
    """

    name = "uniform"
    extras: frozenset[str] = frozenset()

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` evenly spread tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        views, shapes = view_rows(encoded, need_ratio(self.name, keep_ratio))
        keep = grid_table(shapes, _chosen, torch.zeros_like(views.mask))
        return TokenSelection(keep=views.join(keep, encoded.visual_mask))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: geometry."""
        return 0


def _chosen(rows: int, columns: int, k: int) -> torch.Tensor:
    """[rows * columns] True on the chosen cells."""
    nothing = torch.zeros(rows * columns, dtype=torch.bool)
    return nothing.index_fill(0, centers(rows, columns, k), True)
