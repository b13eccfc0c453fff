"""Tokens that merge between the blocks of a vision tower (ToMe), and how many do in each block."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from tprl.budget import keep_top
from tprl.errors import UserError
from tprl.types import Tower, columns_of


class Tokens(NamedTuple):
    """What a tower works on: real tokens first, then padding."""

    x: Float[Tensor, "I M C"]
    size: Float[Tensor, "I M"]  # how many patches are in a token; 0 on padding
    place: Int[Tensor, "I M"]  # the patch at whose place it stands; -1 for CLS


def clipped(n: int, r: int, most: int, blocks: int, has_cls: bool) -> tuple[int, ...]:
    """Merges per block when each merges r of n patches (and CLS): fewer where fewer can, and `most`
    in all."""
    # A block pairs even tokens with odd ones, so at most half can go; CLS never does.
    left, merges = n + has_cls, []
    for _ in range(blocks):
        merges.append(min(r, (left - has_cls) // 2, most - sum(merges)))
        left -= merges[-1]
    return tuple(merges)


@lru_cache(maxsize=4096)
def schedule(n: int, k: int, blocks: int, has_cls: bool) -> tuple[int, ...]:
    """The smallest constant r that leaves at most k of n patches, its last blocks merging fewer so
    that k are left.

    Raises:
        UserError: halving in every block leaves more.
    """
    # The smallest r is found by trying: n is some hundred, and results are cached.
    for r in range(n + 1):
        merges = clipped(n, r, n - k, blocks, has_cls)
        if sum(merges) == n - k:
            return merges
    fewest = n - sum(clipped(n, n, n, blocks, has_cls))
    raise UserError(
        f"tome at most halves the tokens in each of {blocks} blocks, which leaves {fewest} of "
        f"{n}: keeping {k} is infeasible, give a keep_ratio of at least {fewest / n:.3g}."
    )


def merged_tower(
    tower: Tower,
    patches: Float[Tensor, "I W C"],
    mask: Bool[Tensor, "I W"],
    plan: Int[Tensor, "I L"],
) -> Tokens:
    """The tower's features of patches (those in `mask`, which come first), where `plan[i, l]`
    tokens of image i merge in block l, between its attention and its MLP. CLS, if there is one,
    stays first and never merges."""
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    tokens = Tokens(patches, mask.float(), place)
    # CLS stands for one token, at no place of the image.
    if tower.cls is not None:
        cls = tower.cls.to(patches).expand(len(patches), 1, -1)
        size = pad(tokens.size, (1, 0), value=1.0)
        place = pad(tokens.place, (1, 0), value=-1)
        tokens = Tokens(torch.cat([cls, patches], 1), size, place)
    for block, r in zip(tower.blocks, plan.unbind(1), strict=True):
        # A token that stands for s patches is attended to as s tokens would be: padding, of size 0,
        # not at all.
        x, keys = block.attend(tokens.x, tokens.size.log()[:, None, None])
        tokens = tokens._replace(x=x)
        if bool(r.any()):
            tokens = merge(tokens, keys, r)
        tokens = tokens._replace(x=block.feed(tokens.x))
    return tokens


def merge(tokens: Tokens, keys: Float[Tensor, "I M c"], r: Int[Tensor, " I"]) -> Tokens:
    """The r[i] tokens of even index with the largest cosine to one of odd index join it:
    size-weighted means, at the place of the odd one. First come the even tokens that stay, then the
    odd ones, both in order; ties go to the lower index."""
    # Even tokens look for their most similar odd one.
    unit = normalize(keys.double(), dim=-1)
    even = Tokens(*(part[:, 0::2] for part in tokens))
    odd = Tokens(*(part[:, 1::2] for part in tokens))
    likeness = (unit[:, ::2] @ unit[:, 1::2].mT).float()
    likeness = likeness.masked_fill(odd.size.unsqueeze(1) == 0, -torch.inf)
    best, joined = likeness.max(2)  # the first of equals
    gone = keep_top(best, (even.size > 0) & (even.place >= 0), r)
    # [I M/2] patches that move, and the weighted means of where they go.
    moved = even.size * gone
    size = odd.size.scatter_add(1, joined, moved)
    at = joined.unsqueeze(2).expand_as(even.x)
    sums = (odd.x * odd.size.unsqueeze(2)).scatter_add(1, at, even.x * moved.unsqueeze(2))
    # Odd tokens that nothing joined keep their exact values: no division rounds them.
    grown = (size > odd.size).unsqueeze(2)
    x = torch.where(grown, sums / size.unsqueeze(2), odd.x).to(odd.x.dtype)
    # Survivors to the front; size 0 marks what has merged.
    size = torch.cat([even.size * ~gone, size], 1)
    place = torch.cat([even.place, odd.place], 1)
    order, real = columns_of(size > 0)
    x = torch.cat([even.x, x], 1).gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2]))
    return Tokens(x, size.gather(1, order) * real, place.gather(1, order))
