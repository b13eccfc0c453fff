"""Spatial average pooling: fewer, coarser tokens instead of fewer of the same."""

import torch
from torch import Tensor

from tprl.budget import need_ratio, view_rows
from tprl.cost import LVLMShape
from tprl.grid import centres, table, windows
from tprl.types import Encoded, TokenSelection


class PoolingPruner:
    """Every token of the image averaged into k = budget() windows; each window becomes one new token.

    Source: adaptive average pooling of projected tokens as in "Token Pruning in Multimodal Large Language Models: Are
    We Solving the Right Problem?" (Wen et al., arXiv 2502.11501), the rule of BASELINES 3.2. There k must be a grid;
    here any k is met exactly by bands with different numbers of windows (`tprl.grid.layout`), and wherever k has a
    grid with windows no longer than twice their width the result is that of `adaptive_avg_pool2d`. A pooled token
    stands at the position of the token nearest to its window's centre. Complexity O(k n D) per image, nothing of the
    model beyond the projected tokens is read. At keep_ratio = 1 it is the identity.
    """

    name = "pooling"
    extras: frozenset[str] = frozenset()

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Replace the tokens of each image by `budget(keep_ratio, n)` averages: keep is all False, extra holds them.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        views, shapes = view_rows(encoded, need_ratio(self.name, keep_ratio))
        most = max((k for _, _, k in shapes), default=0)
        tokens = views.split(encoded.visual).float()
        weights = table(shapes, windows, tokens.new_zeros(len(shapes), most, views.mask.shape[1]))
        cell = table(shapes, centres, views.at.new_zeros(len(shapes), most))
        count = torch.tensor([k for _, _, k in shapes], dtype=torch.long, device=cell.device)
        live = torch.arange(most, device=cell.device) < count.unsqueeze(1)
        pooled = (weights @ tokens).to(encoded.embeds.dtype)
        return _selection(encoded, views.sample, live, pooled, views.at.gather(1, cell))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: averages are no matrix product of the model's kind, and few."""
        return 0


def _selection(encoded: Encoded, sample: Tensor, live: Tensor, pooled: Tensor, at: Tensor) -> TokenSelection:
    """Windows [I, K, D] of views as extra tokens [B, E, D] of samples: views of a sample follow each other."""
    image, window = live.nonzero(as_tuple=True)
    row = sample[image]
    total = torch.zeros(len(encoded), dtype=torch.long, device=row.device).index_add_(0, row, torch.ones_like(row))
    place = torch.arange(len(row), device=row.device) - (total.cumsum(0) - total)[row]
    shape = (len(encoded), int(total.max()))
    extra, extra_at = pooled.new_zeros(*shape, pooled.shape[2]), at.new_zeros(shape)
    extra[row, place], extra_at[row, place] = pooled[image, window], at[image, window]
    return TokenSelection(
        keep=torch.zeros_like(encoded.visual_mask),
        extra=extra,
        extra_at=extra_at,
        extra_mask=torch.arange(shape[1], device=row.device) < total.unsqueeze(1),
    )
