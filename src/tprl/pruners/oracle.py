"""The region that decides the answer: an upper bound for selection, not a method."""

import torch

from tprl.budget import image_rows, keep_top, need_ratio
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
        images = image_rows(encoded)
        shapes = images.grid_budgets(need_ratio(self.name, keep_ratio))
        region = images.split(encoded.extras["region"]).float()
        order = table([shape[:2] for shape in shapes], spread_order, torch.zeros_like(images.at))
        score = torch.where(region > 0, 1 + region, 1 / (2.0 + order))
        budget = torch.tensor([k for _, _, k in shapes], dtype=torch.long, device=score.device)
        return TokenSelection(keep=images.join(keep_top(score, images.mask, budget), encoded.visual_mask))
