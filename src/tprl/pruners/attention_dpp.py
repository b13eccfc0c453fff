"""Attention x DPP: TPRL's way of choosing a set, with CLS attention in the place of what TPRL has
learned."""

from jaxtyping import Float
from torch import Tensor

from tprl.budget import Rows
from tprl.cost import LVLMShape, dpp_flops
from tprl.pruners.quality import QualityDPP, log_attention, standardize
from tprl.types import Encoded


class AttentionDPPPruner(QualityDPP):
    """Greedy MAP of a DPP whose quality is CLS attention: the control that says what learning adds.

    log q = alpha * z, where z is the z-score of log CLS attention within the image; kernel and
    greedy MAP are TPRL's (`quality.diverse`). Not trained, blind to the question. Source: ours,
    from a k-DPP's quality and diversity (Kulesza and Taskar 2012, "Determinantal point processes
    for machine learning", section 3.1). Complexity O(n^2 D + k^2 n) per image, k steps in sequence.
    Needs extras["cls_attention"] (received attention where the encoder has no CLS token).

    Args:
        alpha: weight of attention against diversity; 1 was chosen on 300 validation questions of
            `scenes`, 0 is diversity alone.
    """

    name = "attention_dpp"
    extras: frozenset[str] = frozenset({"cls_attention"})

    def log_quality(self, images: Rows, encoded: Encoded) -> Float[Tensor, "I W"]:
        attention = log_attention(images.split(encoded.extras["cls_attention"]))
        return standardize(attention, images.mask)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The kernel of projected tokens and greedy MAP on it."""
        return dpp_flops(tokens, shape.lm.width, kept)
