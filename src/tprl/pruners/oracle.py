"""The region that decides the answer: an upper bound for selection, not a method."""

import torch

from tprl.budget import keep_top_per_image, need_ratio, rows_of, view_rows
from tprl.cost import LVLMShape, dpp_flops
from tprl.pruners.base import BasePruner
from tprl.pruners.grid import grid_table, spread_order
from tprl.pruners.quality import diverse
from tprl.types import Encoded, TokenSelection

# A gain of the DPP is between its jitter, 0.01, and 1.01 times q^2: with this log q on the region,
# e^8 times the gains off it, a token of the region always comes before one off it.
REGION_FIRST = 4.0


class OraclePruner(BasePruner):
    """Tokens on the answer's region first, nearest to the centers of its boxes; then tokens spread
    over the image.

    Ours: it reads `Sample.region`, which no pruner that is compared and no reward may read, and is
    never trained on. Needs extras["region"] (`tprl.lvlm.regions.region_rank`, > 0 on the region).
    What the region leaves of the budget is filled in the farthest-point order of the grid
    (`tprl.pruners.grid.spread_order`), context that any question may use; a sample without region
    is filled entirely that way. Complexity O(V log V), once O(V^2) per distinct grid.

    Args:
        diversity: order both by TPRL's kernel and greedy MAP instead of by place (`oracle_dpp`):
            the tokens of the region that differ most first, then what differs most from them. O(n^2
            D + k^2 n) per image.
    """

    name = "oracle"
    extras: frozenset[str] = frozenset({"region"})

    def __init__(self, diversity: bool = False) -> None:
        self.diversity = diversity
        self.name = "oracle_dpp" if diversity else "oracle"

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        if self.diversity:
            images = rows_of(encoded)
            # The region first, diversity within it and beyond.
            log_q = REGION_FIRST * (images.split(encoded.extras["region"]) > 0)
            keep = diverse(log_q, images, encoded, images.budgets(ratio))
            return TokenSelection(keep=images.join(keep, encoded.visual_mask))
        # By place: the spread order is that of each view's own grid.
        views, shapes = view_rows(encoded, ratio)
        grids = [shape[:2] for shape in shapes]
        order = grid_table(grids, spread_order, torch.zeros_like(views.at))
        # On the region scores are above 1; elsewhere they fall from 1/2 on with the rank.
        region = encoded.extras["region"].float()
        elsewhere = 1 / (2.0 + views.join(order, encoded.visual_mask))
        score = torch.where(region > 0, 1 + region, elsewhere)
        return TokenSelection(keep=keep_top_per_image(score, encoded, ratio))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing by place; with diversity the kernel of projected tokens and greedy MAP on it."""
        return dpp_flops(tokens, shape.lm.width, kept) if self.diversity else 0
