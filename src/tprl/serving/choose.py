"""What is kept of images that an engine's own vision tower has encoded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.splice import splice
from tprl.types import Encoded


class Image(NamedTuple):
    """One image of a prompt, and what is asked about it."""

    tokens: Float[Tensor, "N D"]  # projected, in raster order
    grid: tuple[int, int]  # rows, columns
    words: Float[Tensor, "Q D"]  # the question's embeddings; Q = 0 for pruners that read none
    places: Int[Tensor, "P N"]  # positions relative to the image's first token
    uid: str = ""  # for pruners that draw
    deep: Float[Tensor, "N F"] | None = None  # see `Encoded.deep`


class Kept(NamedTuple):
    """What is left of an image."""

    tokens: Float[Tensor, "K D"]
    places: Int[Tensor, "P K"]
    deep: Float[Tensor, "K F"] | None = None


@torch.no_grad()
def choose(pruner: Any, images: Sequence[Image], keep_ratio: float) -> list[Kept]:
    """Keep `budget(keep_ratio, N)` tokens of each image, as `tprl.prune` does of prompts with one
    image.

    Images of the same size are chosen together; what is kept of one does not depend on the others.
    """
    # One batch per size: padding would cost, and no pruner needs it.
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.tokens.shape), []).append(number)
    kept: dict[int, Kept] = {}
    for numbers in groups.values():
        group = [images[number] for number in numbers]
        kept |= dict(zip(numbers, _choose(pruner, group, keep_ratio), strict=True))
    return [kept[number] for number in range(len(images))]


def _choose(pruner: Any, images: Sequence[Image], keep_ratio: float) -> list[Kept]:
    encoded = as_prompts(images)
    prompt = splice(encoded, pruner.select(encoded, keep_ratio))
    rows = []
    for row, visual in enumerate(prompt.visual):
        deep = None if prompt.deep is None else prompt.deep[row, visual]
        rows.append(Kept(prompt.embeds[row, visual], prompt.positions[:, row, visual], deep))
    return rows


def as_prompts(images: Sequence[Image]) -> Encoded:
    """Prompts of a question and an image each, left-padded, as pruners read them; all images have
    as many tokens. Positions are those within the image; template words are not there."""
    count = len(images[0].tokens)
    words = max(len(image.words) for image in images)
    length = words + count

    def lined(value: Callable[[Image], Tensor | None]) -> Tensor:
        """[B S ...] of what an image gives for its words and tokens, zero before the words."""
        rows = []
        for image in images:
            part = value(image)
            assert part is not None
            rows.append(torch.cat([part.new_zeros(length - len(part), *part.shape[1:]), part]))
        return torch.stack(rows)

    def flags(image: Image, text: bool, visual: bool) -> Tensor:
        line = torch.full((len(image.words) + count,), visual, device=image.tokens.device)
        line[: len(image.words)] = text
        return line

    # Words first, the image last: all images end, and so begin, in one column.
    attention = lined(lambda image: flags(image, True, True))
    # Words stand at 0: what is kept takes its positions along, whatever the words have.
    places = lined(lambda image: image.places.T)
    # All images come from one tower: deep features are there for all or for none.
    has_deep = images[0].deep is not None
    at = torch.arange(words, length, device=attention.device).expand(len(images), -1)
    return Encoded(
        uids=tuple(image.uid for image in images),
        input_ids=torch.zeros_like(attention, dtype=torch.long),
        embeds=lined(lambda image: torch.cat([image.words.to(image.tokens), image.tokens])),
        attention=attention,
        positions=places.permute(2, 0, 1),
        visual_at=at,
        visual_mask=torch.ones_like(at, dtype=torch.bool),
        image_of=torch.zeros_like(at),
        grids=tuple(((image.grid,),) for image in images),
        question=lined(lambda image: flags(image, True, False)),
        deep=lined(lambda image: image.deep) if has_deep else None,
    )
