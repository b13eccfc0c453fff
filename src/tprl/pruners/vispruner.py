"""VisPruner: half of the budget by CLS attention, half by diversity of the rest."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows
from tprl.cost import LVLMShape, similarity_flops
from tprl.pruners.per_image import PerImage
from tprl.types import Encoded


class VisPruner(PerImage):
    """Important tokens by CLS attention, then diverse ones by repeatedly dropping the most
    redundant of the rest.

    Source: VisPruner (Zhang et al., arXiv 2412.01818), the rule of docs/baselines.md#vispruner,
    written from its description. Of a budget k, int(k * important) tokens have the highest
    attention. The others, in descending attention, lose in each round up to `drop` of their
    even-placed half: those most similar (cosine of the features before the projector) to some
    odd-placed one; the survivors of the even half, most similar first, then precede the odd half.
    Rounds end when k are left: about (n - k) / drop sequential rounds, each O(n^2 / 4) on
    similarities computed once in O(n^2 C). Needs extras["cls_attention"] and
    extras["vision_features"].

    Ours differs in the rounding of the budget, in ties (lower place), in an odd rest (its even half
    is one longer; the reference stops with an IndexError), in never dropping more than the even
    half, and in similarities in float64: one flipped comparison changes all later rounds, in
    float32 on a third of the images (docs/baselines.md#what-surprises), and the batch an image
    comes in must not decide what is kept of it.
    """

    name = "vispruner"
    extras: frozenset[str] = frozenset({"cls_attention", "vision_features"})

    def __init__(self, important: float = 0.5, drop: int = 8) -> None:
        self.important = important
        self.drop = drop

    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        # The order of attention matters later: rounds split it into even and odd places.
        attention = images.split(encoded.extras["cls_attention"]).float()
        attention = attention.masked_fill(~images.mask, -torch.inf)
        order = attention.argsort(dim=1, descending=True, stable=True)
        # float64: one flipped comparison changes all later rounds.
        unit = normalize(images.split(encoded.extras["vision_features"]).double(), dim=-1)
        return self._choose(order, unit @ unit.mT, images.mask.sum(1), k)

    def _choose(
        self,
        order: Int[Tensor, "I W"],
        cosine: Float[Tensor, "I W W"],
        n: Int[Tensor, " I"],
        k: Int[Tensor, " I"],
    ) -> Bool[Tensor, "I W"]:
        # Half of the budget by attention; the other half from the rest, by diversity.
        important = (k.double() * self.important).floor().long()
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        # [I W] places behind the attended ones move to the front.
        pool = order.gather(1, (place + important.unsqueeze(1)).clamp(max=order.shape[1] - 1))
        # nothing of the rest where attention takes it all
        left = torch.where(k > important, n - important, 0)
        pool = _thin_out(pool, cosine, left, k - important, self.drop)
        diverse = torch.arange(pool.shape[1], device=order.device) < (k - important).unsqueeze(1)
        # [I W] both halves at their columns.
        by_attention = place < important.unsqueeze(1)
        keep = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, by_attention)
        image, column = diverse.nonzero(as_tuple=True)
        keep[image, pool[image, column]] = True
        return keep

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """All cosines between vision features; its rounds look them up."""
        return similarity_flops(tokens, shape.features)


def _thin_out(
    pool: Int[Tensor, "I R"],
    cosine: Float[Tensor, "I W W"],
    left: Int[Tensor, " I"],
    goal: Int[Tensor, " I"],
    drop: int,
) -> Int[Tensor, "I R2"]:
    """Rounds of VisPruner on all images at once, until the first goal[i] entries of each row are
    its survivors.

    `left[i]` entries of row i are alive, always its first ones. A row that has reached its goal
    drops nothing more, and being reordered does not change it as a set.
    """
    flat = cosine.flatten(1)
    while bool((goal < left).any()):
        # [I R] what is left, in the present order; padded at the end.
        pool = pool[:, : int(left.max())]
        place = torch.arange(pool.shape[1], device=pool.device)
        even, odd = pool[:, 0::2], pool[:, 1::2]
        live_even, live_odd = (place[i::2] < left.unsqueeze(1) for i in (0, 1))
        # a padded one stands for the first: no maximum changes
        others = torch.where(live_odd, odd, odd[:, :1])
        pairs = even.unsqueeze(2) * cosine.shape[2] + others.unsqueeze(1)
        # Each even-placed token's largest similarity to an odd-placed one.
        near = flat.gather(1, pairs.flatten(1)).view(pairs.shape).amax(2)
        # The most similar ones go; survivors, most similar first, precede the odd ones.
        rank = near.masked_fill(~live_even, -torch.inf).argsort(dim=1, descending=True, stable=True)
        dropped = torch.minimum((left - goal).clamp(max=drop), live_even.sum(1))
        survives = live_even & (place[: even.shape[1]] >= dropped.unsqueeze(1))
        joined = torch.cat([even.gather(1, rank), odd], 1)
        alive = torch.cat([survives, live_odd], 1)
        pool = joined.gather(1, (~alive).long().argsort(dim=1, stable=True))
        left = left - dropped
    return pool
