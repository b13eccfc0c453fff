"""What the heads of the first phase are asked about a batch.

Which patches, and how many, is found out beside the labels, in the CPU's memory: on a GPU every
mask that picks patches would make the host wait for their number.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from .blueprint import SIDE
from .labels import IGNORE
from .pages import Views

CAPTION = 12  # words of a page that CLIP's text tower reads


class Chosen(NamedTuple):
    """Patches that a head is asked about."""

    at: Int[Tensor, " P"]  # among all of the batch
    truth: Tensor  # [P ...] what they show
    counted: Int[Tensor, " Q"]  # those of the P whose answers make the rate


class Targets(NamedTuple):
    """A batch as the model and the losses need it, without the labels that `Chosen` replaces."""

    pictures: UInt8[Tensor, "B H W 3"]
    characters: Int[Tensor, "B N points"]
    name: Int[Tensor, "B N names"]
    owner: Int[Tensor, "B N"]
    words: dict[str, Chosen]  # the word, and the word of the row or card around it
    names: Chosen
    classes: dict[str, Chosen]
    numbers: Chosen
    boxes: Chosen
    elements: int  # most of a page, plus one
    there: Int[Tensor, " S"]  # of B x elements, those that own a patch
    captions: Int[Tensor, "B L"] | None  # where CLIP's text tower learns in this step
    letters: bool  # only what is written is asked for


def targets(
    views: Views, captions: Int[Tensor, "B L"] | None = None, letters: bool = False
) -> Targets:
    """All that is asked about a batch."""
    words = {name: _classes(getattr(views, name)) for name in ("word", "key")}
    classes = {name: _classes(getattr(views, name)) for name in ("icon", "role")}
    for name in ("checked", "active"):
        target = getattr(views, name)
        classes[name] = _chosen(target != IGNORE, target, lambda truth: truth >= 0)
    named = views.name[..., 0] >= 0
    inside = (views.owner > 0) & (views.role != IGNORE)
    elements, there = _elements(views.owner)
    return Targets(
        views.pictures,
        views.characters,
        views.name,
        views.owner,
        words,
        _chosen(named, views.name, _every),
        classes,
        _chosen(views.number[..., 0] >= 0, views.number, _every),
        _chosen(inside, views.box.clamp(0, SIDE), _every),
        elements,
        there,
        captions,
        letters,
    )


def _classes(target: Int[Tensor, "B N"]) -> Chosen:
    """Patches that show something, and as many of the others at most."""
    return _chosen(_some(target, target > 0), target, lambda truth: truth > 0)


def _chosen(
    mask: Bool[Tensor, "B N"], target: Tensor, counted: Callable[[Tensor], Tensor]
) -> Chosen:
    at = mask.flatten().nonzero()[:, 0]
    truth = target.flatten(0, 1)[at]
    return Chosen(at, truth, counted(truth).nonzero()[:, 0])


def _every(truth: Tensor) -> Bool[Tensor, " P"]:
    return torch.ones(len(truth), dtype=torch.bool)


def _some(target: Tensor, wanted: Tensor) -> Tensor:
    """Mask of the wanted patches and every eighth of those known to be nothing."""
    blank = target == 0
    order = blank.flatten().cumsum(0).view_as(blank)
    return wanted | (blank & (order % 8 == 0))


def _elements(owner: Int[Tensor, "B N"]) -> tuple[int, Int[Tensor, " S"]]:
    """Numbers of elements of a page, and which of them own patches; 0, the ground, does not
    count."""
    size = int(owner.max()) + 1
    patches = torch.zeros(len(owner), size, dtype=torch.long)
    patches = patches.scatter_add(1, owner, torch.ones_like(owner))
    there = (patches > 0) & (torch.arange(size) > 0)
    return size, there.flatten().nonzero()[:, 0]


def captions(
    names: Int[Tensor, "B N names"], step: int, marks: Sequence[int]
) -> Int[Tensor, "B L"]:
    """Up to twelve words of each page's elements, between the marks of start and end; the third
    mark pads."""
    start, end, pad = marks
    rows = []
    for page in names:
        present = page[page >= 0].unique()
        order = torch.randperm(len(present), generator=torch.Generator().manual_seed(step))
        rows.append([start, *present[order[:CAPTION]].tolist(), end])
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])
