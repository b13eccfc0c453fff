"""HoloV: a quota for every part of the image, so that attention cannot spend the whole budget in
one place."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows, image_rows, keep_top
from tprl.cost import LVLMShape
from tprl.pruners.per_image import PerImage
from tprl.types import Encoded


class HoloVPruner(PerImage):
    """CLS attention within chunks of the image; quotas by the chunks' mean scores.

    Source: HoloV (its LLaVA release), the rule of docs/baselines.md#holov, written from its
    description. Tokens in raster order form `chunks` chunks. A token's score is scale * a + alpha *
    v: a its CLS attention, v the variance of its cosine similarities (projected tokens, as the
    released code has them; its own counts as 0, the sums are over n - 1 others) within the chunk,
    scaled to the mean of scale * a there. A chunk's weight is its mean score over the sum of all;
    its quota is floor(weight * k), and 1 more for the heaviest chunks until the quotas sum to k.
    Within a chunk attention alone decides. The scaling makes every mean score 1 + alpha times that
    of attention, so the variance changes no quota (docs/baselines.md#what-surprises). Complexity
    O(n^2 D / chunks + n log n) per image. Needs extras["cls_attention"].

    By default exactly budget() tokens stay: what a quota has beyond its chunk's tokens is spent on
    the tokens of highest score in the whole image, the one place where the variance has a say. Ours
    also differs in ties (lower index; of chunks the earlier), in float64, in chunks where n is not
    a multiple (chunk c starts at floor(c n / chunks); none is padded, and empty ones get nothing),
    and in a chunk without variance (v is the mean itself).

    Args:
        alpha: weight of the variance; 0.09 as released for LLaVA, 1 for Qwen2.5-VL.
        chunks: parts of the image.
        scale: factor of attention.
        published: do not spend what a quota has beyond its chunk. The reference fills up with rows
            of zeros, which are left out here: where attention is peaked an image keeps FEWER tokens
            than its budget, at least one.
    """

    name = "holov"
    extras: frozenset[str] = frozenset({"cls_attention"})

    def __init__(
        self, alpha: float = 0.09, chunks: int = 16, scale: float = 1000.0, published: bool = False
    ) -> None:
        self.alpha = alpha
        self.chunks = chunks
        self.scale = scale
        self.published = published

    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        n = images.mask.sum(1, keepdim=True)
        # [J C] chunks of the raster, as rows of their own.
        place = torch.arange(images.mask.shape[1], device=n.device)
        # the last chunk that starts at or before the token
        chunk_of = ((place + 1) * self.chunks - 1) // n
        parts = image_rows(images.mask, chunk_of)
        attention = parts.split(images.split(encoded.extras["cls_attention"])).double()
        features = parts.split(images.tokens(encoded)).double()
        score = self._score(attention, features, parts.mask)
        # Quotas by the chunks' mean scores; inside a chunk attention alone decides.
        number = parts.sample  # a batch without images has no chunk to number
        if len(parts.sample):
            number = chunk_of[parts.sample, parts.at[:, 0]]
        weight = _mean(score, parts.mask).squeeze(1)
        quota = self._quotas(weight, parts.sample, number, k)
        keep = parts.join(keep_top(attention, parts.mask, quota), images.mask)
        # A quota beyond its chunk's tokens is spent on the best of the whole image.
        if not self.published:
            everywhere = parts.join(score, images.mask.double())
            keep = keep_top(everywhere.masked_fill(keep, torch.inf), images.mask, k)
        return keep

    def _score(
        self,
        attention: Float64[Tensor, "J C"],
        features: Float64[Tensor, "J C F"],
        mask: Bool[Tensor, "J C"],
    ) -> Float64[Tensor, "J C"]:
        """scale * a + alpha * v of the tokens of each chunk; 0 on padding."""
        attention = (self.scale * attention).masked_fill(~mask, 0.0)
        # Variance of a token's cosines within its chunk; its own does not count.
        unit = normalize(features, dim=-1)
        cosine = unit @ unit.mT
        pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
        cosine.diagonal(dim1=1, dim2=2).zero_()
        others = (mask.sum(1) - 1).clamp(min=1)[:, None, None]
        mean = cosine.masked_fill(~pairs, 0.0).sum(2, keepdim=True) / others
        # What the sum of squares is divided by cancels in the scaling below.
        variance = _mean((cosine - mean).square(), pairs).squeeze(2)
        level = _mean(variance, mask)
        # Scaled to mean 1, then to the mean of attention in the chunk.
        shape = torch.where(level > 1e-12, variance / level.clamp(min=1e-12), 1.0)
        shape = shape.masked_fill(~mask, 0.0)
        return attention + self.alpha * shape * _mean(attention, mask)

    def _quotas(
        self,
        score: Float64[Tensor, " J"],
        image: Int[Tensor, " J"],
        number: Int[Tensor, " J"],
        k: Int[Tensor, " I"],
    ) -> Int[Tensor, " J"]:
        """Tokens that each chunk may keep; those of an image sum to its k unless a chunk is
        empty."""
        table = score.new_full((len(k), self.chunks), -1.0)  # empty chunks come last
        table[image, number] = score
        total = table.clamp(min=0.0).sum(1, keepdim=True).clamp(min=1e-30)
        # Without the last digits: rounding errors must not order equal chunks, nor floor 12 to 11.
        weight = (table / total).round(decimals=12)
        quota = (weight.clamp(min=0.0) * k.unsqueeze(1) + 1e-9).floor().long()
        # What flooring has left goes to the heaviest chunks.
        rank = weight.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        quota = quota + (rank < (k - quota.sum(1)).unsqueeze(1)).long()
        return quota[image, number]

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Cosines of projected tokens within each chunk."""
        chunks = min(tokens, self.chunks)
        return 2 * chunks * (-(-tokens // self.chunks)) ** 2 * shape.lm.width


def _mean(x: Float64[Tensor, "*J C"], mask: Bool[Tensor, "*J C"]) -> Float64[Tensor, "*J 1"]:
    """Mean of the valid entries of the last axis, 0 where there are none."""
    return x.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
