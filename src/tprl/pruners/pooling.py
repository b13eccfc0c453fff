"""Spatial average pooling: fewer, coarser tokens instead of fewer of the same."""

import torch

from tprl.budget import need_ratio, view_rows
from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.pruners.grid import centers, grid_table, windows
from tprl.pruners.merging import with_extra
from tprl.types import Encoded, TokenSelection


class PoolingPruner(BasePruner):
    """Every token of the image averaged into k = budget() windows; each window becomes one new
    token.

    Source: adaptive average pooling of projected tokens as in "Token Pruning in Multimodal Large
    Language Models: Are We Solving the Right Problem?" (Wen et al., arXiv 2502.11501), the rule of
    docs/baselines.md#spatial-pooling. There k must be a grid; here any k is met exactly by bands
    with different numbers of windows (`tprl.pruners.grid.layout`), and wherever k has a grid with
    windows no longer than twice their width the result is that of `adaptive_avg_pool2d`. A pooled
    token stands at the position of the token nearest to its window's center. Complexity O(k n D)
    per image, nothing of the model beyond the projected tokens is read. At keep_ratio = 1 it is the
    identity.
    """

    name = "pooling"
    extras: frozenset[str] = frozenset()
    replaces_tokens = True

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Replace the tokens of each image by `budget(keep_ratio, n)` averages: keep is all False,
        extra holds them.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        views, shapes = view_rows(encoded, need_ratio(self.name, keep_ratio))
        most = max((k for _, _, k in shapes), default=0)
        # [N K W] averaging weights of the windows of each view.
        tokens = views.split(encoded.visual).float()
        table = tokens.new_zeros(len(shapes), most, views.mask.shape[1])
        weights = grid_table(shapes, windows, table)
        # [N K] the cell that each new token stands at, and which of them a view has.
        cell = grid_table(shapes, centers, views.at.new_zeros(len(shapes), most))
        count = torch.tensor([k for _, _, k in shapes], dtype=torch.long, device=cell.device)
        live = torch.arange(most, device=cell.device) < count.unsqueeze(1)
        # Averages in float32, then the dtype of the model.
        pooled = (weights @ tokens).to(encoded.embeds.dtype)
        nothing = torch.zeros_like(encoded.visual_mask)
        return with_extra(encoded, nothing, views.sample, live, pooled, views.at.gather(1, cell))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: an average is a sum. (Ours is written as a product with weights because windows
        may overlap.)"""
        return 0
