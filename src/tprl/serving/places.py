"""Places of kept tokens on their way through an engine: beside the embedding, then into positions.

An engine caches one tensor per image, so the place of every kept token travels in that tensor, as
further channels. A place is written as two digits, because bfloat16 counts exactly only to 256.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tprl.errors import UserError

BASE = 128  # both digits are exact in bfloat16
LARGEST = BASE * 256 - 1


class Span(NamedTuple):
    """The placeholders of one image in a prompt."""

    start: int
    length: int  # kept tokens


def with_places(tokens: Float[Tensor, "K D"], places: Int[Tensor, "P K"]) -> Float[Tensor, "K F"]:
    """Kept tokens with their places (relative to the image's first token) in F = D + 2 P channels.

    Raises:
        UserError: a place is too large to be written.
    """
    if places.numel() and int(places.max()) > LARGEST:
        raise UserError(
            f"an image has a token at place {int(places.max())}, and {LARGEST} is the largest that "
            "can be written: give the engine smaller images, or serve with positions=compact."
        )
    # [K 2 P]: all high digits, then all low ones.
    digits = torch.cat([places // BASE, places % BASE]).T
    return torch.cat([tokens, digits.to(tokens)], 1)


def without_places(
    tokens: Float[Tensor, "K F"], axes: int
) -> tuple[Float[Tensor, "K D"], Int[Tensor, "P K"]]:
    """What `with_places` joined, for P = `axes` position axes."""
    width = tokens.shape[1] - 2 * axes
    high, low = tokens[:, width:].long().T.split(axes)
    return tokens[:, :width], high * BASE + low


def spans(
    ids: Sequence[int] | Int[Tensor, " S"], image_token: int, length: int | None = None
) -> list[Span]:
    """Images of a prompt, from its ids: runs of placeholders.

    Args:
        ids: of the whole prompt, with one placeholder per kept token.
        image_token: id of the placeholder.
        length: kept tokens per image, where all have as many and may follow each other without a
            gap; None: every run is one image.
    """
    line = torch.as_tensor(ids) == image_token
    edges = torch.nn.functional.pad(line.int(), (1, 1)).diff()
    starts = (edges == 1).nonzero().flatten().tolist()
    ends = (edges == -1).nonzero().flatten().tolist()
    # Of images that follow each other, a run is cut at the known length.
    images: list[Span] = []
    for start, end in zip(starts, ends, strict=True):
        size = end - start if length is None else length
        images += [Span(place, min(size, end - place)) for place in range(start, end, size)]
    return images


def text_positions(total: int, images: Sequence[Span], extents: Sequence[int]) -> Int[Tensor, " S"]:
    """Positions of a prompt whose images take as much room as before pruning.

    Args:
        total: length of the pruned prompt.
        images: in order.
        extents: positions that each image takes, kept or not; text goes on after them.

    Returns:
        Positions of the text; those of an image's tokens are where the image begins, to which
        `rewritten` adds places.
    """
    positions = torch.arange(total)
    for (start, length), extent in zip(images, extents, strict=True):
        # An image holds one position until `rewritten`; text after it moves by what was dropped.
        begin = int(positions[start])
        positions[start : start + length] = begin
        positions[start + length :] += extent - length
    return positions


def rewritten(
    positions: Int[Tensor, "P S"],
    images: Sequence[Span],
    extents: Sequence[int],
    places: Sequence[Int[Tensor, "P _"]],
    computed: int,
) -> Int[Tensor, "P S"]:
    """Positions with the places of the kept tokens that are computed next.

    May be called for every chunk of a prompt and again after preemption: what is written depends
    on the text before an image and on `places`, never on what was written before.

    Args:
        positions: of the whole prompt.
        images: all images of the prompt.
        extents: positions that each image takes.
        places: of the tokens from `computed` on, image by image; a chunk may begin or end within
            an image.
        computed: tokens of the prompt that are in the cache already.
    """
    # [P N] of this chunk, which fill the first columns of images that are not computed yet.
    rows = torch.cat(list(places), 1).to(positions.device) if places else positions[:, :0]
    columns, begins = [], []
    for column, begin in _columns(positions, images, extents):
        if column >= computed and len(columns) < rows.shape[1]:
            columns.append(column)
            begins.append(begin)
    new = positions.clone()
    at = torch.tensor(columns, dtype=torch.long, device=positions.device)
    new[:, at] = rows + torch.tensor(begins, dtype=positions.dtype, device=positions.device)
    return new


def _columns(
    positions: Int[Tensor, "P S"], images: Sequence[Span], extents: Sequence[int]
) -> list[tuple[int, int]]:
    """(column, position where its image begins) of every placeholder."""
    columns: list[tuple[int, int]] = []
    end, after = -1, 0
    for (start, length), extent in zip(images, extents, strict=True):
        # Images may follow each other without text between them.
        begin = after if start == end else int(positions[0, start - 1]) + 1 if start else 0
        columns += [(column, begin) for column in range(start, start + length)]
        end, after = start + length, begin + extent
    return columns


def delta(positions: Shaped[Tensor, "P S"]) -> int:
    """What an engine adds to the number of a generated token to get its position."""
    return int(positions[:, -1].max()) + 1 - positions.shape[1]
