"""A pruned prompt as an engine reads it: a placeholder per image, and beside it the kept tokens
with their places."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.serving.places import Span, rewritten, text_positions, with_places
from tprl.types import Prompt


class EnginePrompt(NamedTuple):
    """One prompt.

    Attributes:
        ids: one placeholder per image.
        images: kept tokens of each image, in order, with their places in two further channels.
    """

    ids: list[int]
    images: list[Float[Tensor, "K F"]]


def engine_prompt(prompt: Prompt, row: int, count: int) -> EnginePrompt:
    """A row of a batch of pruned prompts.

    Args:
        prompt: of a model with one position axis, on any device.
        row: of the batch.
        count: visual tokens of every image before pruning.

    Raises:
        UserError: two images without text between them, or positions that are not those of an
            unpruned prompt with gaps.
    """
    # Engines get prompts without padding.
    real = prompt.attention[row].cpu()
    ids, visual = prompt.input_ids[row].cpu()[real], prompt.visual[row].cpu()[real]
    embeds, positions = prompt.embeds[row].cpu()[real], prompt.positions[:, row].cpu()[:, real]
    images = kept_spans(visual, prompt.image[row].cpu()[real])
    # An image begins one position after the text before it: places count from there.
    begins = [int(positions[0, start - 1]) + 1 if start else 0 for start, _ in images]
    tokens, places = [], []
    for (start, length), begin in zip(images, begins, strict=True):
        at = slice(start, start + length)
        places.append(positions[:, at] - begin)
        tokens.append(embeds[at])
    _check_kept(positions, images, places, count)
    # An engine repeats the placeholder itself, as often as an image has tokens.
    first = {start for start, _ in images}
    short = [
        token for column, token in enumerate(ids.tolist()) if not visual[column] or column in first
    ]
    packed = [with_places(*pair) for pair in zip(tokens, places, strict=True)]
    return EnginePrompt(short, packed)


def kept_spans(visual: Tensor, image: Int[Tensor, " S"]) -> list[Span]:
    """The kept tokens of each image of a prompt.

    Args:
        visual: whether a token is one of an image [S].
        image: the image of every token.

    Raises:
        UserError: two images follow each other without text between them: their placeholders would
            be one run, of which an engine cannot tell where the second image begins.
    """
    columns = visual.nonzero().flatten().tolist()
    images: list[Span] = []
    for column in columns:
        # A column goes on with the image of the column before it, if they touch.
        last = images[-1] if images else Span(-1, 0)
        follows = sum(last) == column
        if follows and image[column] == image[column - 1]:
            images[-1] = Span(last.start, last.length + 1)
        elif follows:
            raise UserError(
                "an engine scores prompts with text between images, and two images of this prompt "
                "follow each other: write a space or a line break between them into model.prompt."
            )
        else:
            images.append(Span(column, 1))
    return images


def _check_kept(positions: Tensor, images: list[Span], places: list[Tensor], count: int) -> None:
    extents = [count] * len(images)
    # What the engine will compute from ids and places must be what was measured here.
    start = text_positions(positions.shape[1], images, extents).unsqueeze(0)
    kept = [place.clamp(min=0) for place in places]
    if not torch.equal(rewritten(start, images, extents, kept, 0), positions):
        raise UserError(
            "an engine scores prompts whose survivors keep their places: use positions=keep."
        )
