"""A batch of the second phase as the losses need it: which visual tokens are kept, which columns
answer, and where they should look.

All that depends on masks is found out here, in the CPU's memory: on a GPU every mask that picks
columns would make the host wait for their number.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tprl.data.screens import FAMILIES

from .labels import IGNORE
from .packs import Pack

FULL_SHARE = 0.2  # of the steps see all visual tokens
KEEP_HIGH, KEEP_LOW = 0.4, 0.03  # least kept share of the others, at first and later
LOWERED = 3  # the least share falls over this part of the phase, a third
SHOWN_SHARE = 0.5  # of the pages whose dropout prefers patches that show something


class Rated(NamedTuple):
    """The answers of a family among those of the batch."""

    at: Int[Tensor, " T"]  # their tokens among all R
    answer: Int[Tensor, " T"]  # which answer each belongs to
    count: int  # of answers
    pointing: bool


class Reading(NamedTuple):
    """B pages, K kept tokens, C columns of text, R columns that predict a token of an answer."""

    pictures: UInt8[Tensor, "B H W 3"]
    kept: Int[Tensor, "B K"]
    text: Int[Tensor, "B C"]
    segment: Int[Tensor, "B C"]
    offset: Int[Tensor, "B C"]
    at: Int[Tensor, " R"]  # among B x C
    target: Int[Tensor, " R"]
    place: Float[Tensor, " R"]
    weight: Float[Tensor, " R"]  # every question weighs the same, whatever its answer's length
    points: Int[Tensor, " P"]  # among R, those that predict a coordinate
    meant: tuple[Bool[Tensor, "B C K"], Bool[Tensor, "B C K"]]  # by what is asked, by the answer
    looking: tuple[Int[Tensor, " L"], Int[Tensor, " M"]]  # among B x C, columns that mean some
    rated: dict[str, Rated]


def reading(pack: Pack, kept: Int[Tensor, "B K"]) -> Reading:
    """All that the losses need of a pack."""
    rows = pack.target != IGNORE
    place = pack.place[rows]
    length = torch.zeros(pack.region.shape[:2]).scatter_add(1, pack.segment, rows.float())
    answer = rows.unsqueeze(-1) & pack.region.gather(
        1, pack.segment.unsqueeze(-1).expand(-1, -1, pack.region.shape[2])
    )
    meant = [_among(mask, kept) for mask in (pack.named, answer)]
    looking = [mask.any(-1).flatten().nonzero()[:, 0] for mask in meant]
    return Reading(
        pack.views.pictures,
        kept,
        pack.text,
        pack.segment,
        pack.offset,
        rows.flatten().nonzero()[:, 0],
        pack.target[rows],
        place,
        1 / length.gather(1, pack.segment)[rows],
        (place >= 0).nonzero()[:, 0],
        (meant[0], meant[1]),
        (looking[0], looking[1]),
        _rated(pack, rows),
    )


def _among(mask: Bool[Tensor, "B C N"], kept: Int[Tensor, "B K"]) -> Bool[Tensor, "B C K"]:
    return mask.gather(2, kept.unsqueeze(1).expand(-1, mask.shape[1], -1))


def _rated(pack: Pack, rows: Bool[Tensor, "B C"]) -> dict[str, Rated]:
    """The answers of each family; of clicks the four coordinates, of others every token."""
    pages = torch.arange(len(pack.text)).unsqueeze(1)
    number = (pages * pack.region.shape[1] + pack.segment)[rows]
    place, family = pack.place[rows], pack.family[rows]
    rated = {}
    for at, label in enumerate(FAMILIES):
        chosen = family == at
        if not bool(chosen.any()):
            continue
        pointing = bool((place[chosen] >= 0).any())
        tokens = (chosen & (place >= 0)) if pointing else chosen
        different, answer = number[tokens].unique(return_inverse=True)
        rated[label] = Rated(tokens.nonzero()[:, 0], answer, len(different), pointing)
    return rated


def kept_tokens(visible: Bool[Tensor, "B N"], progress: float, *key: int) -> Int[Tensor, "B K"]:
    """Indices of the visual tokens of a step, in raster order.

    Args:
        visible: patches that show something.
        progress: share of the phase that is over.
        key: decides the draw.
    """
    number = int(np.random.default_rng([3, *key]).integers(2**31))
    generator = torch.Generator().manual_seed(number)
    low = KEEP_HIGH + (KEEP_LOW - KEEP_HIGH) * min(1.0, LOWERED * progress)
    full = torch.rand((), generator=generator) < FULL_SHARE
    share = low ** float(torch.rand((), generator=generator))  # log-uniform
    count = visible.shape[1] if full else max(1, round(share * visible.shape[1]))
    chance = torch.rand(visible.shape, generator=generator)
    strength, prefers = torch.rand(2, len(visible), 1, generator=generator)
    chance = chance - strength * (prefers < SHOWN_SHARE) * visible
    return chance.argsort(1)[:, :count].sort(1).values
