"""SCOPE: the tokens that cover most of the image's features that nothing covers yet, weighted by
attention."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows, keep_top
from tprl.cost import LVLMShape, similarity_flops
from tprl.pruners.per_image import PerImage
from tprl.types import Encoded


class ScopePruner(PerImage):
    """Greedy coverage gain x saliency.

    Source: SCOPE (Deng et al., arXiv 2510.24214, its "SCOPE score": token-coverage gain times
    saliency^alpha; the function `SCOPE` of scope/clip_encoder.py in kinredon/SCOPE at a01b98f),
    written from its description. A token i is covered by a set as well as its largest cosine to a
    member, 0 by an empty one; the gain of a token j is the sum over all i of max(0, cos(i, j) -
    coverage of i); the next token has the largest gain_j * a_j^alpha. Cosines are of the features
    before the projector, a is CLS attention in the layer that makes them. Complexity O(n^2 C + k
    n^2) per image, k steps in sequence. Needs extras["cls_attention"] and
    extras["vision_features"].

    Ours differs in the mean over heads where the released code takes the sum (a factor that changes
    no choice at combine by product), in float64, in the rounding of the budget, in ties (lower
    index), and where no token has a gain left: then the most attended of the rest fill up the
    budget.

    Args:
        alpha: power of the saliency; 1 as released, 0 is coverage alone.
    """

    name = "scope"
    extras: frozenset[str] = frozenset({"cls_attention", "vision_features"})

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        attention = images.split(encoded.extras["cls_attention"]).double()
        unit = normalize(images.split(encoded.extras["vision_features"]).double(), dim=-1)
        # Padding neither covers nor needs to be covered.
        unit = unit.masked_fill(~images.mask.unsqueeze(2), 0.0)
        taken = _cover(unit @ unit.mT, attention.clamp(min=0.0) ** self.alpha, images.mask, k)
        # Where coverage ends early, attention fills the budget.
        return keep_top(attention.masked_fill(taken, torch.inf), images.mask, k)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """All cosines between vision features; gains are sums of them."""
        return similarity_flops(tokens, shape.features)


def _cover(
    cosine: Float64[Tensor, "I W W"],
    saliency: Float64[Tensor, "I W"],
    mask: Bool[Tensor, "I W"],
    k: Int[Tensor, " I"],
) -> Bool[Tensor, "I W"]:
    """Up to k[i] tokens of each row with a gain above rounding errors, greedily; all rows advance
    together."""
    row = torch.arange(len(mask), device=mask.device)
    keep = torch.zeros_like(mask)
    covered = torch.zeros_like(saliency)
    for step in range(int(k.max()) if len(k) else 0):
        # What a token would cover that nothing covers yet, summed over the image.
        gain = (cosine - covered.unsqueeze(2)).clamp(min=0.0).sum(1)
        free = mask & ~keep & (gain > 1e-9)
        pick = (gain * saliency).masked_fill(~free, -torch.inf).argmax(1)
        keep[row, pick] |= (step < k) & free.any(1)
        # A member covers every token as far as it is like it.
        covered = torch.maximum(covered, cosine[row, pick] * free.any(1, keepdim=True))
    return keep
