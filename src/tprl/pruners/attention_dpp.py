"""Attention x DPP: TPRL's way of choosing a set, with CLS attention in the place of what TPRL has learned."""

from tprl.budget import image_rows, need_ratio
from tprl.cost import LVLMShape, dpp_flops
from tprl.pruners.quality import diverse, log_attention, standardize
from tprl.types import Encoded, TokenSelection


class AttentionDPPPruner:
    """Greedy MAP of a DPP whose quality is CLS attention: the control that says what learning adds.

    log q = alpha * z, where z is the z-score of log CLS attention within the image; kernel and greedy MAP are TPRL's
    (`quality.diverse`). Not trained, blind to the question. Source: ours, from a k-DPP's quality and diversity (Kulesza
    and Taskar 2012, "Determinantal point processes for machine learning", section 3.1). Complexity O(n^2 D + k^2 n) per
    image, k steps in sequence. Needs extras["cls_attention"] (received attention where the encoder has no CLS token).

    Args:
        alpha: weight of attention against diversity; 1 was chosen on 300 validation questions of `scenes`, 0 is
            diversity alone.
    """

    name = "attention_dpp"
    extras: frozenset[str] = frozenset({"cls_attention"})

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        images = image_rows(encoded.visual_mask, encoded.image_of)
        attention = log_attention(images.split(encoded.extras["cls_attention"]))
        log_q = self.alpha * standardize(attention, images.mask)
        keep = diverse(log_q, images, encoded, images.budgets(ratio))
        return TokenSelection(keep=images.join(keep, encoded.visual_mask))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The kernel of projected tokens and greedy MAP on it."""
        return dpp_flops(tokens, shape.lm.width, kept)
