"""What methods share that merge vision features and send them through the projector."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows
from tprl.errors import UserError
from tprl.types import Encoded, TokenSelection


def similarity(keys: Float[Tensor, "I W d"], at: Int[Tensor, "I K"]) -> Float[Tensor, "I K W"]:
    """Cosines of the tokens at `at` with all of their image. Computed in double, compared in single precision: what
    one batch or another does to the last digits must not decide."""
    unit = normalize(keys.double(), dim=-1)
    return (unit.gather(1, at.unsqueeze(2).expand(-1, -1, unit.shape[2])) @ unit.mT).float()


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
    """Kept tokens, those at `at` with something `added` to their vision features, and `extra` for the images that
    have it: one token, at the first (or last) place that is not kept."""
    if encoded.project is None:
        raise UserError("These prompts have no projector (Encoded.project), so merge no vision features: use divprune.")
    image, slot = real.nonzero(as_tuple=True)
    row, token = images.sample[image], images.at[image, at[image, slot]]
    features, merged = encoded.extras["vision_features"], encoded.visual
    sums = torch.cat([features[row, token].float() + added[image, slot], extra[has_extra]])
    new = encoded.project(sums.to(features.dtype)).to(merged.dtype)
    merged[row, token] = new[: len(image)]
    free, place = images.mask & ~keep, torch.arange(keep.shape[1], device=keep.device)
    anchor = torch.where(free, place + 1 if last else place.flip(0) + 1, 0).argmax(1, keepdim=True)
    row, token = images.sample[has_extra], images.at.gather(1, anchor)[has_extra, 0]
    total = torch.zeros(len(encoded), dtype=torch.long, device=row.device).index_add_(0, row, torch.ones_like(row))
    live = torch.arange(int(total.max()), device=row.device) < total.unsqueeze(1)
    tokens, extra_at = new.new_zeros(*live.shape, new.shape[1]), row.new_zeros(live.shape)
    tokens[live], extra_at[live] = new[len(image) :], token  # the images of a sample follow each other, as in `live`
    joined = images.join(keep, encoded.visual_mask)
    return TokenSelection(keep=joined, merged=merged, extra=tokens, extra_at=extra_at, extra_mask=live)
