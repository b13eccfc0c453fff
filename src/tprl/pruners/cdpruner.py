"""CDPruner: diverse tokens, weighted by their relevance to the question."""

import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import keep_top, need_ratio, rows_of
from tprl.cost import LVLMShape, dpp_flops
from tprl.errors import UserError
from tprl.policy.dpp import greedy_map
from tprl.pruners.base import BasePruner
from tprl.types import Encoded, TokenSelection


class CDPruner(BasePruner):
    """Greedy maximum of det(L_Y) over subsets Y, with L = diag(q) S diag(q): a DPP conditioned on
    the question.

    Source: CDPruner (Zhang et al., arXiv 2506.10967), the rule of docs/baselines.md#cdpruner,
    written from its description. S is the cosine similarity of projected tokens, q = (r - min r +
    1e-6) / (max r - min r), and r is MINUS the cosine of the patch with the question in CLIP's
    space, where the relevance of patches is inverted. Complexity O(n^2 D + k^2 n) per image, k
    steps in sequence. Needs extras["clip_relevance"].

    Ours differs in the range of q, which is taken over each image (the reference takes it over the
    batch), in an image whose tokens are all equally relevant (q = 1, the reference divides by
    zero), in float64 throughout, in the rounding of the budget, in ties (lower index), and where
    the kernel's rank is exhausted, as it surely is after D tokens: the most relevant of the rest
    fill up the budget (the reference keeps too few, docs/baselines.md#what-surprises).

    Args:
        negative_relevance: r is minus the cosine, as released for CLIP; False: the cosine itself,
            as OpenVINO does with embeddings of the language model.
        theta: weight of relevance against diversity, 0 to 0.99: q becomes exp(alpha q) with
            alpha = theta / (2 (1 - theta)). None leaves q as it is; 0 is diversity alone.
    """

    name = "cdpruner"
    extras: frozenset[str] = frozenset({"clip_relevance"})
    reads_question = True

    def __init__(self, negative_relevance: bool = True, theta: float | None = None) -> None:
        if theta is not None and not 0 <= theta <= 0.99:
            raise UserError(f"theta must be in [0, 0.99] or null, got {theta}; use e.g. 0.5.")
        self.negative_relevance = negative_relevance
        self.theta = theta

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        keep_ratio = need_ratio(self.name, keep_ratio)
        images = rows_of(encoded)
        if not len(images.sample):
            return TokenSelection(keep=torch.zeros_like(encoded.visual_mask))
        k = images.budgets(keep_ratio)
        # Relevance to the question, rescaled within each image.
        relevance = images.split(encoded.extras["clip_relevance"]).double()
        relevance = -relevance if self.negative_relevance else relevance
        q = self._quality(relevance, images.mask)
        # L = diag(q) S diag(q) over projected tokens.
        unit = normalize(images.tokens(encoded).double(), dim=-1)
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=1, dim2=2).round_()  # equal q must give exactly equal first gains
        kernel = q.unsqueeze(2) * cosine * q.unsqueeze(1)
        # No more than D items can add to the determinant; relevance fills the rest.
        taken = greedy_map(kernel, images.mask, k.clamp(max=unit.shape[2]))
        keep = keep_top(relevance.masked_fill(taken, torch.inf), images.mask, k)
        return TokenSelection(keep=images.join(keep, encoded.visual_mask))

    def _quality(
        self, relevance: Float64[Tensor, "I W"], mask: Bool[Tensor, "I W"]
    ) -> Float64[Tensor, "I W"]:
        low = relevance.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
        high = relevance.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        # q = (r - min r + 1e-6) / (max r - min r); 1 where all are equally relevant.
        q = torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)
        q = q.masked_fill(~mask, 0.0)
        if self.theta is None:
            return q
        # exp(alpha q), alpha = theta / (2 (1 - theta)).
        return (self.theta / (2 * (1 - self.theta)) * q).exp()

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The kernel of projected tokens and greedy MAP on it."""
        return dpp_flops(tokens, shape.lm.width, kept)
