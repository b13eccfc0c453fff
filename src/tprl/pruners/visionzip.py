"""VisionZip: dominant tokens by CLS attention, and contextual ones that sum up the rest."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.budget import keep_top, need_ratio, rows_of
from tprl.cost import LVLMShape, projecting_flops
from tprl.pruners.base import BasePruner
from tprl.pruners.merging import merged_selection, similarity
from tprl.types import Encoded, TokenSelection, columns_of


class VisionZipPruner(BasePruner):
    """The CLS token and the patches that it attends to most, then evenly placed targets that take
    in all the others.

    Source: VisionZip (Yang et al., arXiv 2412.04467), the rule of docs/baselines.md#visionzip,
    written from its description. Of a budget k, t = `contextual(k)` tokens are contextual, one is
    the CLS token, and k - t - 1 are the patches with the highest CLS attention. Of the other
    patches, in raster order, every (rest // t)-th is a target until there are t; each that is none
    joins the target with the most similar key (cosine). A contextual token is

        h_target + (sum of the h that joined it) / max(1, how many joined)    (not divided by two)

    in features before the projector, then projected. Complexity O(t n (c + C)) per image with keys
    of width c and features of width C, nothing in sequence; k = 1 leaves the CLS token alone. Needs
    extras["cls_attention"], ["vision_features"], ["cls_feature"] and ["vision_keys"], and
    `Encoded.project`.

    Dominant patches keep the embeddings they had. Contextual tokens replace their targets in place;
    the CLS token is `extra` and stands at the first position of its image that no kept patch holds,
    so that no two share one. Ours differs in the order (raster; the reference: CLS, dominant,
    contextual), in ties (lower index), in fp32, and at k = n, where there is nothing to prune: the
    image stays as it is, without CLS. `published` applies the rule there too; below n both agree,
    since the rule never misses its label.
    """

    name = "visionzip"
    extras: frozenset[str] = frozenset(
        {"cls_attention", "vision_features", "cls_feature", "vision_keys"}
    )

    def __init__(self, published: bool = False) -> None:
        self.published = published

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """`budget(keep_ratio, n)` tokens for each image, the CLS token among them.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1], or this LVLM has no projector to merge
                before.
        """
        images = rows_of(encoded)
        k = images.budgets(need_ratio(self.name, keep_ratio))
        if not len(k):
            return TokenSelection(keep=encoded.visual_mask)
        # Of the budget one place is CLS, t are contextual; at k = n nothing is pruned.
        cls = torch.ones_like(k, dtype=torch.bool) if self.published else k < images.mask.sum(1)
        t = torch.where(cls, contextual(k), 0)
        # The patches that CLS looks at most.
        attention = images.split(encoded.extras["cls_attention"])
        dominant = keep_top(attention, images.mask, k - t - cls.long())
        others = images.mask & ~dominant
        # Evenly placed targets take in the patches whose keys are nearest.
        targets = evenly(others, t)
        at, real = columns_of(targets)
        features = images.split(encoded.extras["vision_features"]).float()
        cosine = similarity(images.split(encoded.extras["vision_keys"]), at)
        joined = join_nearest(cosine, others & ~targets, real)
        # [I K C] mean of what joined each target, before the projector.
        mean = joined @ features / joined.sum(2, keepdim=True).clamp(min=1)
        summary = images.split(encoded.extras["cls_feature"])[:, 0].float()
        return merged_selection(
            encoded, images, dominant | targets, at, real, mean, summary, cls, last=False
        )

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Cosines of all keys with the contextual ones, their means, and the projector once
        more."""
        if kept == tokens and not self.published:
            return 0
        targets = max((5 * kept + 16) // 32, int(kept >= 2))
        keys = shape.vision.width // shape.vision.heads
        similar = 2 * tokens * targets * (keys + shape.features)
        return similar + projecting_flops(shape, targets + 1)


def contextual(k: Int[Tensor, " I"]) -> Int[Tensor, " I"]:
    """Contextual tokens in a budget: k * 10 / 64, halves up, at least 1 from k = 2 on; the paper's
    30 of 192, 20 of 128 and 10 of 64 all have this share."""
    return torch.maximum((k * 5 + 16) // 32, (k >= 2).long())


def evenly(pool: Bool[Tensor, "I W"], count: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
    """The first `count[i]` of every (rest // count)-th token of the rest, from its first on."""
    rank = pool.cumsum(1) - 1
    step = (pool.sum(1) // count.clamp(min=1)).clamp(min=1).unsqueeze(1)
    return pool & (rank % step == 0) & (rank // step < count.unsqueeze(1))


def join_nearest(
    cosine: Float[Tensor, "I K W"], joins: Bool[Tensor, "I W"], real: Bool[Tensor, "I K"]
) -> Float[Tensor, "I K W"]:
    """1 where token w joins target k; ties go to the earlier target."""
    live = cosine.masked_fill(~real.unsqueeze(2), -torch.inf)
    # no targets: nobody joins
    nearest = live.argmax(1, keepdim=True) if real.shape[1] else joins.unsqueeze(1).long()
    # [I K W]
    number = torch.arange(real.shape[1], device=real.device)[:, None]
    return ((nearest == number) & joins.unsqueeze(1)).float()
