"""What two prompts have in common from their beginning on: as far as that goes, a causal language
model computes the same keys and values for both."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tprl.types import Prompt


def shared_prefix(before: Prompt, after: Prompt) -> Int[Tensor, " B"]:
    """Columns from the beginning of each prompt, padding aside, that both rows b hold: equal
    embeddings at equal positions, with equal features for deeper layers."""
    width = min(before.embeds.shape[1], after.embeds.shape[1])
    first, second = _from_the_left(before, width), _from_the_left(after, width)
    same = before.attention.gather(1, first) & after.attention.gather(1, second)
    # A prompt shorter than `width` wraps around to columns that count nothing.
    same &= _inside(before, width) & _inside(after, width)
    same &= (_columns(before.embeds, first) == _columns(after.embeds, second)).all(2)
    places = before.positions.transpose(0, 1), after.positions.transpose(0, 1)
    axes = (_columns(part.mT, at) for part, at in zip(places, (first, second), strict=True))
    same &= next(axes).eq(next(axes)).all(2)
    if before.deep is not None and after.deep is not None:
        same &= (_columns(before.deep, first) == _columns(after.deep, second)).all(2)
    return same.long().cumprod(1).sum(1)


def visual_in(prompt: Prompt, prefix: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """How many of the first `prefix` columns of each prompt, padding aside, are visual tokens."""
    real = prompt.attention.long().cumsum(1)
    return (prompt.visual & (real <= prefix.unsqueeze(1))).sum(1)


def _from_the_left(prompt: Prompt, width: int) -> Int[Tensor, "B W"]:
    """Columns of the first `width` real tokens of each left-padded prompt."""
    total = prompt.attention.shape[1]
    start = total - prompt.attention.sum(1, keepdim=True)
    place = torch.arange(width, device=prompt.attention.device)
    return (start + place).clamp(max=total - 1)


def _inside(prompt: Prompt, width: int) -> Bool[Tensor, "B W"]:
    place = torch.arange(width, device=prompt.attention.device)
    return place < prompt.attention.sum(1, keepdim=True)


def _columns(values: Tensor, at: Tensor) -> Tensor:
    """[B S F] -> [B W F]."""
    return values.gather(1, at.unsqueeze(2).expand(-1, -1, values.shape[2]))
