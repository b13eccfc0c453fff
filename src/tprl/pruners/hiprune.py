"""HiPrune: objects from a middle layer of the vision tower, the whole scene from its last."""

import torch
from jaxtyping import Bool
from torch import Tensor

from tprl.budget import Rows, keep_top, keep_top_per_image, need_ratio, rows_of, view_rows
from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.types import Encoded, TokenSelection


class HiPrunePruner(BasePruner):
    """Anchors that a middle layer attends to, with their neighbors; the rest by the attention of
    the last layer.

    Source: HiPrune (arXiv 2508.00553), the rule of docs/baselines.md#hiprune, written from its
    description. Of a budget k, the floor(k * alpha / 5) tokens that receive most attention in the
    "object" layer (the 10th of 24) are anchors; they and the tokens above, below, left and right of
    them stay, at most k * alpha together. All other places go to the tokens that receive most
    attention in the last layer. Complexity O(n log n) per image, no matrix product; the two
    attention maps are the tower's cost. Needs extras["middle_attention"] and
    extras["last_attention"].

    With alpha = 0.1 there is no anchor below k = 50, and the rule is then that of the last layer
    alone. Where anchors touch, or lie at a border, they bring fewer tokens, and the last layer
    fills up: exactly k tokens stay. Anchors are the best of the whole image, neighbors do not cross
    from one view (crop) of it into another. Ours differs in the rounding of the budget and in ties
    (lower index).

    Args:
        alpha: share of the budget that anchors and their neighbors may take.
    """

    name = "hiprune"
    extras: frozenset[str] = frozenset({"middle_attention", "last_attention"})

    def __init__(self, alpha: float = 0.1) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be in [0, 1], got {alpha}; use e.g. 0.1.")
        self.alpha = alpha

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        keep_ratio = need_ratio(self.name, keep_ratio)
        images = rows_of(encoded)
        # Anchors by the middle layer, at most a fifth of their share of the budget.
        count = (images.budgets(keep_ratio).double() * self.alpha / 5).floor().long()
        anchors = keep_top(images.split(encoded.extras["middle_attention"]), images.mask, count)
        # Neighbors on each view's own grid.
        views, shapes = view_rows(encoded, keep_ratio)
        columns = torch.tensor([c for _, c, _ in shapes], dtype=torch.long, device=count.device)
        anchors = views.split(images.join(anchors, encoded.visual_mask))
        objects = views.join(_with_neighbors(anchors, views, columns), encoded.visual_mask)
        # Objects first, then what the last layer attends to.
        score = encoded.extras["last_attention"].float().masked_fill(objects, torch.inf)
        return TokenSelection(keep=keep_top_per_image(score, encoded, keep_ratio))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: the tower computes both attentions."""
        return 0


def _with_neighbors(
    anchors: Bool[Tensor, "N W"], views: Rows, columns: Tensor
) -> Bool[Tensor, "N W"]:
    """Anchors and the tokens above, below, left and right of one; view i has columns[i] tokens per
    line.

    A valid token never looks at padding; what padding becomes means nothing.
    """
    place = torch.arange(anchors.shape[1], device=anchors.device)
    across = columns.unsqueeze(1)
    column = place % across
    n = views.mask.sum(1, keepdim=True)
    # A token joins if the one above, below, left or right of it, inside the view, is an anchor.
    chosen = anchors
    for step, inside in (
        (-across, place >= across),
        (across, place + across < n),
        (-torch.ones_like(across), column > 0),
        (torch.ones_like(across), column < across - 1),
    ):
        # Clamped only to index safely: `inside` has the last word.
        other = (place + step).clamp(0, max(anchors.shape[1] - 1, 0))
        chosen = chosen | (anchors.gather(1, other) & inside)
    return chosen
