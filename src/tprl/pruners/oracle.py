"""The region that decides the answer: an upper bound for selection, not a method."""

import torch

from tprl.budget import keep_top_per_image, need_ratio, view_rows
from tprl.cost import LVLMShape
from tprl.grid import spread_order, table
from tprl.types import Encoded, TokenSelection


class OraclePruner:
    """Tokens on the answer's region first, nearest to the centres of its boxes; then tokens spread over the image.

    Ours: it reads `Sample.region`, which no pruner that is compared and no reward may read, and is never trained on.
    Needs extras["region"] (`tprl.lvlm.regions.region_rank`, > 0 on the region). What the region leaves of the budget
    is filled in the farthest-point order of the grid (`tprl.grid.spread_order`), context that any question may use;
    a sample without region is filled entirely that way. Complexity O(V log V), once O(V^2) per distinct grid.
    """

    name = "oracle"
    extras: frozenset[str] = frozenset({"region"})

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        views, shapes = view_rows(encoded, ratio)
        order = table([shape[:2] for shape in shapes], spread_order, torch.zeros_like(views.at))
        region = encoded.extras["region"].float()
        score = torch.where(region > 0, 1 + region, 1 / (2.0 + views.join(order, encoded.visual_mask)))
        return TokenSelection(keep=keep_top_per_image(score, encoded, ratio))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: it is no method."""
        return 0
