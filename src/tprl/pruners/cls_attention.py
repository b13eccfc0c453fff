"""Attention of the vision tower's CLS token (FasterVLM): what the image itself calls important."""

from tprl.budget import keep_top_per_image, need_ratio
from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.types import Encoded, TokenSelection


class ClsAttentionPruner(BasePruner):
    """The tokens that CLS attends to most, in raster order; the question plays no part.

    Source: FasterVLM (Zhang et al., arXiv 2412.01818), the rule of docs/baselines.md#fastervlm:
    score = mean over heads of the attention CLS -> patch in the layer that produces the features.
    Needs a vision tower with a CLS token. Complexity O(V log V). Ours differs from the published
    rule in the rounding of the budget and in ties (lower index) only.
    """

    name = "cls_attention"
    extras: frozenset[str] = frozenset({"cls_attention"})

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep the `budget(keep_ratio, n)` tokens of each image with the highest CLS attention.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        return TokenSelection(
            keep=keep_top_per_image(encoded.extras["cls_attention"], encoded, ratio)
        )

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: the tower has computed it."""
        return 0
