"""TRIM: tokens chosen by CLIP's similarity with the question, and one that stands for all
others."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.budget import Rows, keep_top, need_ratio, rows_of
from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.pruners.merging import outliers, with_extra
from tprl.types import Encoded, TokenSelection


class TrimPruner(BasePruner):
    """The tokens of the highest CLIP score stay; the mean of the others is one extra token.

    Source: TRIM ("Less is More: A Simple yet Effective Token Reduction Method", Song et al., arXiv
    2409.10994), the rule of docs/baselines.md#trim, written from its description. The score is
    softmax(-cosine) of patches with the question in CLIP's space. Note the sign: the released code
    ranks that way, so the patches LEAST similar to the text stay (as in CDPruner, and for its
    reason). The softmax matters only to the adaptive count below. Complexity O(n log n + n D) per
    image, no matrix product. Needs extras["clip_relevance"]; the projected tokens for the mean.

    By default an image costs exactly k = budget() tokens: k - 1 kept and the mean; at k = 1 the
    best token alone, at k = n all tokens and no mean. The extra token stands at the place of the
    last token that is not kept: the free place nearest to the end, where the reference appends it.
    Ours also differs in averaging projected tokens, where the reference averages before its
    projector, and in ties (lower index).

    Args:
        negative_relevance: the score falls with the cosine, as released; False: it rises.
        published: keep int(keep_ratio * n) tokens and the mean besides, one more than asked for.
            With keep_ratio=None as many as have a score above Q3 + 1.5 (Q3 - Q1) of their image
            (quartiles interpolated linearly). Either may be 0; then the mean of the image is all
            that is left of it.
    """

    name = "trim"
    extras: frozenset[str] = frozenset({"clip_relevance"})
    reads_question = True

    def __init__(self, negative_relevance: bool = True, published: bool = False) -> None:
        self.negative_relevance = negative_relevance
        self.published = self.decides_alone = published

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep the best tokens of each image and add the mean of the others.

        Raises:
            UserError: `keep_ratio` is not in (0, 1], or is None and not `published`.
        """
        if keep_ratio is not None or not self.published:
            keep_ratio = need_ratio(self.name, keep_ratio)
        images = rows_of(encoded)
        if not len(images.sample):
            return TokenSelection(keep=torch.zeros_like(encoded.visual_mask))
        # As released the score falls with the cosine: CLIP's patch relevance is inverted.
        score = images.split(encoded.extras["clip_relevance"]).float()
        score = -score if self.negative_relevance else score
        kept, has_mean = self._counts(score, images, keep_ratio)
        keep = keep_top(score, images.mask, kept)
        return _selection(encoded, images, keep, has_mean)

    def _counts(
        self, score: Float[Tensor, "I W"], images: Rows, keep_ratio: float | None
    ) -> tuple[Int[Tensor, " I"], Bool[Tensor, " I"]]:
        """Tokens kept of each image, and whether it has the mean of the others."""
        n = images.mask.sum(1)
        if keep_ratio is None:
            # Adaptive count: outliers of the softmax, so padding must not enter it.
            share = score.double().masked_fill(~images.mask, -torch.inf).softmax(1)
            kept = outliers(share, images.mask)
            return kept, kept < n
        if self.published:
            kept = (n.double() * keep_ratio).floor().long()
            return kept, kept < n
        # The mean has one place of the budget, but not of a single one nor of all.
        k = images.budgets(keep_ratio)
        has_mean = (k > 1) & (k < n)
        return k - has_mean.long(), has_mean

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: the mean is a sum; CLIP's text tower, run once per question, is not counted."""
        return 0


def _selection(
    encoded: Encoded, images: Rows, keep: Bool[Tensor, "I W"], has_mean: Bool[Tensor, " I"]
) -> TokenSelection:
    """`keep` as a selection, with the mean of each image's other tokens as an extra token of its
    sample."""
    # [I D] mean of what is dropped.
    dropped = images.mask & ~keep
    tokens = images.split(encoded.visual).float().masked_fill(~dropped.unsqueeze(2), 0.0)
    mean = tokens.sum(1) / dropped.sum(1, keepdim=True).clamp(min=1)
    # It stands at the last place that is free.
    place = torch.arange(keep.shape[1], device=dropped.device)
    last = (dropped * place).amax(1)
    anchor = images.at.gather(1, last.unsqueeze(1))
    return with_extra(
        encoded,
        images.join(keep, encoded.visual_mask),
        images.sample,
        has_mean.unsqueeze(1),
        mean.unsqueeze(1).to(encoded.embeds.dtype),
        anchor,
    )
