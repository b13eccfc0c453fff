"""What methods share that make new tokens out of several."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows
from tprl.errors import UserError
from tprl.types import Encoded, TokenSelection


def similarity(keys: Float[Tensor, "I W d"], at: Int[Tensor, "I K"]) -> Float[Tensor, "I K W"]:
    """Cosines of the tokens at `at` with all of their image. Computed in double, compared in single
    precision: what one batch or another does to the last digits must not decide."""
    unit = normalize(keys.double(), dim=-1)
    # [I K d] the tokens at `at`.
    chosen = unit.gather(1, at.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    return (chosen @ unit.mT).float()


def merged_selection(
    encoded: Encoded,
    images: Rows,
    keep: Bool[Tensor, "I W"],
    at: Int[Tensor, "I K"],
    real: Bool[Tensor, "I K"],
    added: Float[Tensor, "I K C"],
    extra: Float[Tensor, "I C"],
    has_extra: Bool[Tensor, " I"],
    last: bool,
) -> TokenSelection:
    """Kept tokens, those at `at` with something `added` to their vision features, and `extra` for
    the images that have it: one token, at the first (or last) place that is not kept."""
    if encoded.project is None:
        raise UserError(
            "these prompts have no projector (Encoded.project), so vision features cannot be "
            "merged: use divprune."
        )
    # Sums in float32, before the projector, as the methods define them.
    image, slot = real.nonzero(as_tuple=True)
    row, token = images.sample[image], images.at[image, at[image, slot]]
    features = encoded.extras["vision_features"]
    merged = encoded.visual
    sums = torch.cat([features[row, token].float() + added[image, slot], extra[has_extra]])
    # One pass of the projector for all merged tokens, then those of `extra`.
    new = encoded.project(sums.to(features.dtype)).to(merged.dtype)
    merged[row, token] = new[: len(image)]
    # The extra token stands where no kept patch does.
    free = images.mask & ~keep
    place = torch.arange(keep.shape[1], device=keep.device)
    # Rising (or falling) ranks from 1 on: the largest one among the free places is the wanted one.
    rank = place + 1 if last else place.flip(0) + 1
    anchor = torch.where(free, rank, 0).argmax(1, keepdim=True)
    tokens = new.new_zeros(len(keep), 1, new.shape[1])
    tokens[has_extra, 0] = new[len(image) :]
    joined = images.join(keep, encoded.visual_mask)
    at = images.at.gather(1, anchor)
    return with_extra(encoded, joined, images.sample, has_extra.unsqueeze(1), tokens, at, merged)


def with_extra(
    encoded: Encoded,
    keep: Bool[Tensor, "B V"],
    sample: Int[Tensor, " I"],
    live: Bool[Tensor, "I K"],
    tokens: Float[Tensor, "I K D"],
    at: Int[Tensor, "I K"],
    merged: Float[Tensor, "B V D"] | None = None,
) -> TokenSelection:
    """Kept tokens, and those new ones of each image (or view) that are `live`, at the places `at`
    in V, as extra tokens of its sample; images of a sample follow each other."""
    # Only live tokens: a sample has those of its images and no holes between them.
    image, new = live.nonzero(as_tuple=True)
    row = sample[image]
    # Extra tokens of a sample's images, one after the other: [B E D].
    total = row.bincount(minlength=len(encoded))
    place = torch.arange(len(row), device=row.device) - (total.cumsum(0) - total)[row]
    shape = (len(encoded), int(total.max()))
    extra, extra_at = tokens.new_zeros(*shape, tokens.shape[2]), at.new_zeros(shape)
    extra[row, place], extra_at[row, place] = tokens[image, new], at[image, new]
    mask = torch.arange(shape[1], device=row.device) < total.unsqueeze(1)
    return TokenSelection(keep=keep, merged=merged, extra=extra, extra_at=extra_at, extra_mask=mask)


def outliers(values: Float[Tensor, "I W"], mask: Bool[Tensor, "I W"]) -> Int[Tensor, " I"]:
    """How many values of each image lie above Q3 + 1.5 (Q3 - Q1), quartiles interpolated
    linearly."""
    # Padding sorts behind all values.
    n = mask.sum(1, keepdim=True)
    ordered = values.double().masked_fill(~mask, torch.inf).sort(1).values
    place = (n - 1) * torch.tensor([0.25, 0.75], dtype=torch.double, device=values.device)
    # Each quartile lies between two neighbors, whose places are whole numbers.
    low = ordered.gather(1, place.long())
    high = ordered.gather(1, torch.minimum(place.long() + 1, n - 1))
    q1, q3 = (low + (high - low) * place.frac()).split(1, dim=1)
    return ((values > q3 + 1.5 * (q3 - q1)) & mask).sum(1)
