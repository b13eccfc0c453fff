"""Relevance x diversity without training: any score of the tokens as the quality of TPRL's DPP,
served greedily."""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor

from tprl.budget import Rows, need_ratio, rows_of
from tprl.policy.dpp import cosine_kernel, greedy_map
from tprl.pruners.per_image import PerImage
from tprl.types import Encoded, TokenSelection

CERTAIN = 100.0  # log q of a token that is kept whatever else is, above all others


def standardize(x: Shaped[Tensor, "I W"], mask: Bool[Tensor, "I W"]) -> Float64[Tensor, "I W"]:
    """z-scores of the valid entries of each row (spread over n, not n - 1); 0 on padding and where
    all agree."""
    x = x.double().masked_fill(~mask, 0.0)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    away = (x - x.sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)
    spread = (away.square().sum(1, keepdim=True) / count).sqrt()
    # What rounding leaves of equal values is no spread.
    level = x.abs().amax(1, keepdim=True) if x.shape[1] else spread
    return torch.where(spread > 1e-9 * level, away / spread.clamp(min=1e-300), 0.0)


def log_attention(attention: Float[Tensor, "I W"]) -> Float64[Tensor, "I W"]:
    """Its logarithm; attention below 1e-8, which half precision rounds to 0, counts as 1e-8."""
    return attention.double().clamp(min=1e-8).log()


class QualityDPP(PerImage):
    """A rule whose quality is one number per token; `diverse` makes a set of it.

    Args:
        alpha: weight of the quality against diversity; 0 is diversity alone.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    @abstractmethod
    def log_quality(self, images: Rows, encoded: Encoded) -> Float[Tensor, "I W"]:
        """z-scores within each image, which `alpha` weighs."""

    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        return diverse(self.alpha * self.log_quality(images, encoded), images, encoded, k)

    def complete(
        self, encoded: Encoded, keep_ratio: float | None, core: Bool[Tensor, "B V"]
    ) -> TokenSelection:
        """Keep the `core`, and of the other tokens those that add most to it, up to
        `budget(keep_ratio, n)` of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        if not bool(core.any()):
            return self.select(encoded, keep_ratio)
        images, ratio = rows_of(encoded), need_ratio(self.name, keep_ratio)
        log_q = (self.alpha * self.log_quality(images, encoded)).double()
        # Greedy MAP takes the core first, whatever its gains, and compares what is left with it.
        chosen = images.split(core) & images.mask
        highest = log_q.masked_fill(~images.mask, -torch.inf).amax(1, keepdim=True)
        log_q = torch.where(chosen, highest + CERTAIN, log_q)
        keep = diverse(log_q, images, encoded, images.budgets(ratio))
        return TokenSelection(images.join(keep, encoded.visual_mask))


def diverse(
    log_q: Float[Tensor, "I W"], images: Rows, encoded: Encoded, k: Int[Tensor, " I"]
) -> Bool[Tensor, "I W"]:
    """k[i] tokens of each image by greedy MAP of L = diag(q) S diag(q); ties go to the lower index.

    S is TPRL's kernel: cosines of the projected tokens, centered over the image, plus 0.01 I. A
    common factor of q changes nothing, so each image's largest q is 1.
    """
    if not log_q.numel():
        return torch.zeros_like(images.mask)
    # S over projected tokens, shared by every control of this kind.
    kernel = cosine_kernel(images.tokens(encoded), images.mask).double()
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    diagonal.copy_(diagonal.round(decimals=4))  # equal q must give exactly equal first gains
    # Padding gets q = 0; the largest q of an image is 1, so nothing overflows.
    log_q = log_q.double().masked_fill(~images.mask, -torch.inf)
    q = (log_q - log_q.amax(1, keepdim=True)).exp()
    return greedy_map(q.unsqueeze(2) * kernel * q.unsqueeze(1), images.mask, k)
