"""DivPrune: the most diverse subset of the projected tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows
from tprl.cost import LVLMShape, similarity_flops
from tprl.pruners.per_image import PerImage
from tprl.types import Encoded


class DivPrunePruner(PerImage):
    """Greedy max-min diversity: each next token is the one farthest from all chosen before.

    Source: DivPrune (Alvar et al., arXiv 2503.02175), the rule of docs/baselines.md#divprune,
    written from its description: cosine distance between projected tokens; the first is the token
    farthest from its nearest neighbor. Complexity O(n^2 D + k n) per image, k steps in sequence;
    reads the projected tokens only, neither attention nor question. Ours differs in fp32 distances
    (the reference computes in the model's dtype), in the rounding of the budget, in ties (lower
    index), and in never choosing a token twice where tokens coincide.
    """

    name = "divprune"
    extras: frozenset[str] = frozenset()

    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        unit = normalize(images.tokens(encoded).float(), dim=-1)
        return max_min(1 - unit @ unit.mT, images.mask, k)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """All cosines between projected tokens."""
        return similarity_flops(tokens, shape.lm.width)


def max_min(
    distance: Float[Tensor, "I W W"], mask: Bool[Tensor, "I W"], k: Int[Tensor, " I"]
) -> Bool[Tensor, "I W"]:
    """Greedy max-min subsets of k[i] valid points each; all rows advance together, one point per
    step."""
    # First comes the token that is farthest from its nearest neighbor.
    # A token is not its own neighbor, and padding is nobody's.
    off = ~mask.unsqueeze(1) | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    gap = distance.masked_fill(off, torch.inf).amin(2) if mask.numel() else distance.sum(2)
    row, keep = torch.arange(len(mask), device=mask.device), torch.zeros_like(mask)
    for step in range(int(k.max()) if len(k) else 0):
        # Then always the one whose nearest chosen token is farthest.
        gap = gap.masked_fill(keep | ~mask, -torch.inf)
        pick = gap.argmax(1)
        # Rows that have enough go on without effect.
        keep[row, pick] |= step < k
        line = distance[row, pick]
        gap = line if step == 0 else torch.minimum(gap, line)
    return keep
