"""PruMerge and PruMerge+: tokens that the CLS token attends to, each merged with its nearest
neighbors."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.budget import keep_top, need_ratio, rows_of
from tprl.cost import LVLMShape, projecting_flops
from tprl.pruners.base import BasePruner
from tprl.pruners.merging import merged_selection, outliers, similarity
from tprl.types import Encoded, TokenSelection, columns_of

NEIGHBORS = 32


class PruMergePruner(BasePruner):
    """The tokens with the highest CLS attention c in the tower's last layer, and one that sums up
    all the others.

    Source: LLaVA-PruMerge (Shang et al., arXiv 2403.15388), the rule of docs/baselines.md#prumerge,
    written from its description. With h the features before the projector and c not normalized over
    what is summed,

        out_i = h_i + sum of c_j h_j over the 32 other tokens, kept or not, whose last-layer keys
                are nearest (cosine)
        extra = sum of c_j h_j over the tokens that are not kept,

    all then projected. Complexity O(k n (d + C)) per image with keys of width d and features of
    width C, nothing in sequence. Needs extras["last_cls_attention"], ["last_keys"] and
    ["vision_features"], and `Encoded.project`.

    Our default fills the budget exactly: k - 1 tokens and the extra one; k = 1 is the top token
    alone, and at k = n there is nothing to prune, so nothing is merged. `published` lets each image
    decide: int(n * ratio) tokens, where ratio is the share of outliers c > Q3 + 1.5 (Q3 - Q1) in it
    (the reference: in its batch), and the extra one; a keep_ratio is checked, then ignored. Two
    guards beside the rule: an image without outliers (or with int(n * ratio) = 0) keeps its top
    token, and there is no extra token where every token is kept. Both modes keep raster order, the
    extra token at the last position that is not kept (the reference: attention order, extra at the
    end); ties go to the lower index.
    """

    name = "prumerge"
    extras: frozenset[str] = frozenset({"last_cls_attention", "last_keys", "vision_features"})
    spread = False  # whether tokens of the raster join those that attention chooses

    def __init__(self, published: bool = False) -> None:
        self.published = self.decides_alone = published

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """`budget(keep_ratio, n)` tokens for each image, or with `published` as many as its
        outliers say.

        Raises:
            UserError: `keep_ratio` is None without `published` or not in (0, 1], or this LVLM has
                no projector.
        """
        ratio = 1.0 if self.published and keep_ratio is None else need_ratio(self.name, keep_ratio)
        images = rows_of(encoded)
        k, n = images.budgets(ratio), images.mask.sum(1)
        if not len(k):
            return TokenSelection(keep=encoded.visual_mask)
        c = images.split(encoded.extras["last_cls_attention"]).float()
        # How many tokens stand out in attention decides how many an image keeps.
        share = outliers(c, images.mask).clamp(min=1) / n.double()
        above = (n * share).long().clamp(min=1)
        if self.published:
            keep = keep_top(c, images.mask, above)
            keep = keep | strided(images.mask, share) if self.spread else keep
            merge, extra = keep, keep.sum(1) < n
        else:
            # One place of the budget is the extra token's, but not of a single one nor of all.
            count = torch.where(k < n, (k - 1).clamp(min=1), k)
            by_attention = torch.minimum(above, count) if self.spread else count
            keep = keep_top(c, images.mask, by_attention)
            keep = keep | spread(images.mask & ~keep, count - keep.sum(1))
            merge, extra = keep & (k < n).unsqueeze(1), keep.sum(1) < k
        # Each kept token takes in its nearest neighbors; one more sums up what is not kept.
        at, real = columns_of(merge)
        near = nearest(images.split(encoded.extras["last_keys"]), images.mask, at)
        weights = torch.cat([near, (images.mask & ~keep).unsqueeze(1)], 1) * c.unsqueeze(1)
        # [I K+1 C] what is added to each kept token; the last row is the extra token.
        sums = weights @ images.split(encoded.extras["vision_features"]).float()
        added, summary = sums[:, :-1], sums[:, -1]
        return merged_selection(encoded, images, keep, at, real, added, summary, extra, last=True)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Cosines of keys with the kept tokens', weighted sums of features, and the projector once
        more."""
        merged = 0 if kept == tokens else max(kept - 1, 1)
        sums = 2 * tokens * (merged * shape.vision.width + (merged + 1) * shape.features)
        return sums + projecting_flops(shape, 0 if kept == tokens else kept)


class PruMergePlusPruner(PruMergePruner):
    """PruMerge with further tokens taken evenly from the raster: more of the image, less of what
    attention likes.

    Source, merging, complexity and needs as of `PruMergePruner`. `published` adds to the outliers
    the tokens 0, s, 2 s, ... before the last one, with s = int(int(1 / ratio) / 3). Guards: ratio
    counts at least one outlier (none would divide by zero) and s is at least 1. Outliers above a
    sixth of the tokens give s = 1, which keeps all but the last: faithful, and the reason why our
    default fills the budget instead. Its k - 1 tokens are the outliers, by attention, and then
    tokens evenly placed among those not yet kept, from the first on.
    """

    name = "prumerge_plus"
    spread = True


def strided(mask: Bool[Tensor, "I W"], share: Float[Tensor, " I"]) -> Bool[Tensor, "I W"]:
    """PruMerge+'s tokens of the raster: every int(int(1 / share) / 3)-th, the last token never."""
    place = torch.arange(mask.shape[1], device=mask.device)
    stride = ((1 / share).long() // 3).clamp(min=1)
    return (place % stride.unsqueeze(1) == 0) & (place < mask.sum(1, keepdim=True) - 1)


def spread(pool: Bool[Tensor, "I W"], count: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
    """Exactly `count[i]` tokens of the rest, evenly placed in it, its first one among them."""
    # Of n free tokens the ranks r with r count mod n < count: exactly `count`, evenly spaced.
    rank, count = pool.cumsum(1) - 1, count.unsqueeze(1)
    return pool & (rank * count % pool.sum(1, keepdim=True).clamp(min=1) < count)


def nearest(
    keys: Float[Tensor, "I W d"], mask: Bool[Tensor, "I W"], at: Int[Tensor, "I K"]
) -> Bool[Tensor, "I K W"]:
    """The 32 other tokens of the image, or all, whose keys are nearest to that of each token at
    `at`; ties go to the lower index."""
    off = ~mask.unsqueeze(1) | (at.unsqueeze(2) == torch.arange(mask.shape[1], device=at.device))
    live = similarity(keys, at).masked_fill(off, -torch.inf)
    order = live.argsort(dim=2, descending=True, stable=True)[..., :NEIGHBORS]
    return torch.zeros_like(off).scatter(2, order, True) & ~off
