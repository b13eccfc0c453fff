"""Small steps between images, token ids and tensors that every family shares."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Sample


def axes(positions: Int[Tensor, "P B S"]) -> Int[Tensor, "..."]:
    """As transformers wants them: [B S] for RoPE, [3 B S] for M-RoPE."""
    return positions[0] if len(positions) == 1 else positions


def mean_log_prob(logits: Float[Tensor, "B A N"], ids: Int[Tensor, "B A"]) -> Float[Tensor, " B"]:
    """Mean log-probability of each row's tokens, nats per token; ids below 0 are padding."""
    real = ids >= 0
    picked = logits.log_softmax(-1).gather(2, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * real).sum(1) / real.sum(1)


def shown_images(tokens: Sequence[int], per_image: Sequence[int]) -> list[list[int]]:
    """Which images each prompt shows: images follow in order until they fill the prompt's placeholders.

    Raises:
        UserError: they do not.
    """
    shown: list[list[int]] = []
    image = 0
    for row, wanted in enumerate(tokens):
        first = image
        while wanted > 0 and image < len(per_image):
            wanted -= per_image[image]
            image += 1
        if wanted:
            raise UserError(
                f"prompt {row} has {tokens[row]} image tokens, and its images make {sum(per_image[first:image])}: "
                "pass what one call of the processor returned, complete."
            )
        shown.append(list(range(first, image)))
    if image < len(per_image):
        raise UserError(
            f"{len(per_image)} images were given, and the prompts show {image}: write as many image placeholders."
        )
    return shown


def fingerprint(pixels: Tensor) -> int:
    """A number that depends on the pixels alone: neither on zero padding after them, nor on what computed it."""
    bits = pixels.detach().cpu().float().flatten().view(torch.int32).long()
    return int((bits * torch.arange(1, len(bits) + 1)).sum())


def runs(mask: Bool[Tensor, "B S"]) -> list[list[tuple[int, int]]]:
    """(start, length) of every run of True in each row."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    found: list[list[tuple[int, int]]] = [[] for _ in mask]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        found[row].append((start, end - start))
    return found


def unique_images(samples: Sequence[Sample]) -> tuple[list[int], list[list[int]]]:
    """Where each distinct image object comes first among the images of all samples, and for every sample the numbers
    of its images among the distinct ones."""
    numbers: dict[int, int] = {}
    first: list[int] = []
    for place, image in enumerate(image for sample in samples for image in sample.images):
        if id(image) not in numbers:
            numbers[id(image)] = len(first)
            first.append(place)
    return first, [[numbers[id(image)] for image in sample.images] for sample in samples]


def pick_images(pixels: Mapping[str, Any], rows: Sequence[int], chosen: Sequence[int]) -> dict[str, Any]:
    """The inputs of the `chosen` images alone; `rows[i]` rows of `pixel_values` are image i's."""
    parts = pixels["pixel_values"].split(list(rows))
    found = {name: [value[i] for i in chosen] for name, value in pixels.items() if name != "pixel_values"}
    stacked = {name: torch.stack(value) if isinstance(value[0], Tensor) else value for name, value in found.items()}
    return {"pixel_values": torch.cat([parts[i] for i in chosen]), **stacked}


def question_mask(
    offsets: Int[Tensor, "B S 2"], texts: Sequence[str], samples: Sequence[Sample], name: str
) -> Bool[Tensor, "B S"]:
    """Tokens whose characters are the question's: measured from the prompt's end, because placeholders before the
    question expand."""
    tails, lengths = [], []
    for text, sample in zip(texts, samples, strict=True):
        question = sample.question.strip()  # as many chat templates do
        at = text.rfind(question)
        if at < 0:
            raise UserError(
                f"the prompt of {name} changes the question of sample {sample.uid}, so its words cannot be "
                f"found: set model.prompt to a template with {{question}}."
            )
        tails.append(len(text) - at - len(question))
        lengths.append(len(question))
    tail, length = (torch.tensor(values, device=offsets.device).unsqueeze(1) for values in (tails, lengths))
    stop = offsets[..., 1].amax(1, keepdim=True) - tail
    return (offsets[..., 0] >= stop - length) & (offsets[..., 1] <= stop) & (offsets[..., 1] > offsets[..., 0])
