"""Small steps between images, token ids and tensors that every family shares."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Prompt, Sample, Tower

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What the vision side makes of images, one entry per image."""

    tokens: list[Float[Tensor, "N D"]]  # projected, in the order of the prompt's image columns
    # (rows, columns) of each crop; the last one shows the whole image
    views: list[tuple[tuple[int, int], ...]]
    # (rows, columns) of the patches of each pass of the tower
    tiles: list[tuple[tuple[int, int], ...]]
    extras: dict[str, list[Tensor]]  # [N ...]
    deep: list[Float[Tensor, "N F"]] | None = None  # see `Encoded.deep`
    # which `tokens` are no visual ones, such as newlines
    separators: list[Bool[Tensor, " N"]] | None = None
    tower: Tower | None = None


def axes(positions: Int[Tensor, "P B S"]) -> Int[Tensor, "..."]:
    """As transformers wants them: [B S] for RoPE, [3 B S] for M-RoPE."""
    return positions[0] if len(positions) == 1 else positions


def padded_ids(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "B A"]:
    """Token ids of answers, right-padded with -1."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)


class MicroBatch(NamedTuple):
    """Some prompts of a batch, and which they are: on the prompts' device, and as plain numbers."""

    rows: Int[Tensor, " R"]
    numbers: list[int]
    prompt: Prompt


def micro_batches(prompt: Prompt, size: int) -> Iterator[MicroBatch]:
    """Rows of like length together, so that little is padded. The host waits for the device once,
    however many prompts there are."""
    # Places and lengths in one transfer: every `tolist` waits for the device.
    lengths = prompt.attention.sum(1)
    order = lengths.argsort(dim=0, stable=True)
    numbers, sorted_lengths = torch.stack([order, lengths[order]]).tolist()
    for start in range(0, len(numbers), size):
        some = slice(start, start + size)
        part = prompt.rows(order[some], max(sorted_lengths[some]), numbers[some])
        yield MicroBatch(order[some], numbers[some], part)


def retry_smaller(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a frozen model on a prompt, without gradients. Where GPU memory ends it starts
    again with half the `micro_batch`, which stays: results do not depend on it.

    Raises:
        UserError: there is not enough for one prompt.
    """

    @wraps(method)
    @torch.no_grad()
    def tried(self: Any, prompt: Prompt, *args: Any, **how: Any) -> Any:
        while True:
            size = min(self.micro_batch, len(prompt.uids))
            try:
                return method(self, prompt, *args, **how)
            except torch.OutOfMemoryError as error:
                if size <= 1:
                    raise UserError(
                        f"{self.name} has no memory for a single prompt of "
                        f"{prompt.embeds.shape[1]} tokens: use model.load_in=4bit, "
                        "model.placement=shard, a smaller image or a GPU with more memory."
                    ) from error
            # Here and not above: while an error is handled, its frames hold on to what filled the
            # memory.
            self.micro_batch = (size + 1) // 2
            torch.cuda.empty_cache()
            log.warning(
                "out of memory with %d prompts: from here on micro-batches of %d",
                size,
                self.micro_batch,
            )

    return tried


def mean_log_prob(logits: Float[Tensor, "B A N"], ids: Int[Tensor, "B A"]) -> Float[Tensor, " B"]:
    """Mean log-probability of each row's tokens, nats per token; ids below 0 are padding."""
    # [B A]: log p of the token that was written, 0 on padding.
    real = ids >= 0
    picked = logits.log_softmax(-1).gather(2, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * real).sum(1) / real.sum(1)


def divergence(
    reference: Float[Tensor, "B A N"], log_probs: Float[Tensor, "B A N"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """KL(reference || log_probs), mean over the answer's tokens in nats, and 1.0 where every token
    has the same arg-max. Both are log-probabilities, nan where an answer is shorter."""
    real = ~reference[..., 0].isnan()
    # 0 log 0 is 0: a token that the reference rules out adds nothing.
    ratio = torch.where(reference.isneginf(), 0.0, reference - log_probs)
    kl = (reference.exp() * ratio).sum(-1).masked_fill(~real, 0.0).sum(1) / real.sum(1)
    # Padding agrees by definition.
    same = (log_probs.argmax(-1) == reference.argmax(-1)) | ~real
    return kl, same.all(1).float()


def shown_images(tokens: Sequence[int], per_image: Sequence[int], remedy: str) -> list[list[int]]:
    """Which images each prompt shows: images follow in order until they fill the prompt's
    placeholders.

    `remedy` says how to set the processor.

    Raises:
        UserError: they do not.
    """
    occurrences: list[list[int]] = []
    image = 0
    for row, wanted in enumerate(tokens):
        # Take images until they cover the row's placeholders exactly.
        first = image
        while wanted > 0 and image < len(per_image):
            wanted -= per_image[image]
            image += 1
        if wanted:
            raise UserError(
                f"prompt {row} has {tokens[row]} image tokens, and its "
                f"images make {sum(per_image[first:image])}: pass what one "
                f"call of the processor returned, complete, and {remedy}."
            )
        occurrences.append(list(range(first, image)))
    if image < len(per_image):
        raise UserError(
            f"{len(per_image)} images were given, and the prompts "
            f"show {image}: write as many image placeholders."
        )
    return occurrences


def fingerprint(pixels: Tensor) -> int:
    """A number that depends on the pixels alone: neither on zero padding after them, nor on what
    computed it."""
    # Integers, since a sum of floats depends on the order in which a device adds them.
    bits = pixels.detach().cpu().float().flatten().view(torch.int32).long()
    return int((bits * torch.arange(1, len(bits) + 1)).sum())


def input_uids(
    ids: Int[Tensor, "B S"],
    attention: Bool[Tensor, "B S"],
    pixels: Sequence[Tensor],
    occurrences: Sequence[Sequence[int]],
) -> list[str]:
    """Names of prompts that depend on their own text and pixels alone; `occurrences[b]` are the
    images of prompt b."""
    prints = [fingerprint(part) for part in pixels]
    uids = []
    for row, real, images in zip(ids, attention, occurrences, strict=True):
        text = f"{row[real].tolist()} {[prints[i] for i in images]}"
        uids.append(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    return uids


def check_template(prompt: Any) -> str | None:
    """A template for prompts, or None. `{question}` alone is replaced: all other braces are text,
    JSON for example.

    Raises:
        UserError: no text, or no place for the question.
    """
    if prompt is None or (isinstance(prompt, str) and "{question}" in prompt):
        return prompt
    raise UserError(
        f"model.prompt={prompt!r} has no {{question}}, so nothing would be asked: "
        "write it where the question goes, e.g. 'USER: <image> {question} ASSISTANT:'."
    )


def check_images(samples: Sequence[Sample], prompt: str | None, name: str) -> None:
    """Refuse samples with more or fewer images than the template `prompt` shows."""
    if prompt is None:
        return
    room = prompt.count("<image>")
    for sample in samples:
        if len(sample.images) != room:
            raise UserError(
                f"sample {sample.uid} has {len(sample.images)} images, and the prompt "
                f"of {name} shows {room}: write as many <image> into model.prompt."
            )


def runs(mask: Bool[Tensor, "B S"]) -> list[list[tuple[int, int]]]:
    """(start, length) of every run of True in each row."""
    # 1 where a run starts, -1 behind its end; row by row both come in the same order.
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    spans: list[list[tuple[int, int]]] = [[] for _ in mask]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        spans[row].append((start, end - start))
    return spans


def unique_images(
    samples: Sequence[Sample], by_company: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Where each distinct image object comes first among the images of all samples, and for every
    sample the numbers of its images among the distinct ones. `by_company` tells an image that is
    alone in its prompt from the same one among others, of which a processor may make other
    pixels."""
    numbers: dict[tuple[int, bool], int] = {}
    first: list[int] = []
    by_sample: list[list[int]] = []
    place = 0
    for sample in samples:
        by_sample.append([])
        for image in sample.images:
            key = id(image), by_company and len(sample.images) == 1
            if key not in numbers:
                numbers[key] = len(first)
                first.append(place)
            by_sample[-1].append(numbers[key])
            place += 1
    return first, by_sample


def pick_images(
    pixels: Mapping[str, Any], rows: Sequence[int], chosen: Sequence[int]
) -> dict[str, Any]:
    """The inputs of the `chosen` images alone; `rows[i]` rows of `pixel_values` are image i's."""
    # Rows of one image stay together: it may have several tiles.
    parts = pixels["pixel_values"].split(list(rows))
    picked: dict[str, Any] = {"pixel_values": torch.cat([parts[i] for i in chosen])}
    for name, value in pixels.items():
        if name != "pixel_values":
            rows_of = [value[i] for i in chosen]
            picked[name] = torch.stack(rows_of) if isinstance(rows_of[0], Tensor) else rows_of
    return picked


def check_placeholders(
    is_image: Bool[Tensor, "B S"],
    occurrences: Sequence[Sequence[int]],
    features: Sequence[int],
    uids: Sequence[str],
    one_run: bool,
    remedy: str,
) -> None:
    """Refuse prompts with more or fewer placeholders than their images have features: in all, and
    image by image where text stands between them.

    Args:
        is_image: True on placeholders.
        occurrences: images of each prompt.
        features: what the vision side makes of each image.
        uids: of the prompts.
        one_run: whether the placeholders of an image follow each other without a gap.
        remedy: how to set the processor.

    Raises:
        UserError: with both numbers.
    """
    # First the sum of each prompt, then where its images end.
    for row, images, uid in zip(is_image, occurrences, uids, strict=True):
        columns = row.nonzero().squeeze(1)
        wanted = torch.tensor([features[image] for image in images], dtype=torch.long)
        if len(columns) != int(wanted.sum()):
            raise UserError(
                f"the processor wrote {len(columns)} image placeholders for {uid}, and the "
                f"vision tower makes {int(wanted.sum())} features of its images: {remedy}."
            )
        # Placeholders before each gap: an image must end there, and images end at these sums.
        gaps = (columns.diff() > 1).nonzero().squeeze(1).cpu() + 1
        astray = gaps[~torch.isin(gaps, wanted.cumsum(0))]
        if one_run and len(astray):
            raise UserError(
                f"the processor ended an image of {uid} after {int(astray[0])} placeholders, and "
                f"the vision tower makes {wanted.tolist()} features of its images: {remedy}."
            )


def check_size(
    name: str, what: str, sizes: Sequence[int], wanted: Sequence[int], remedy: str
) -> None:
    """Refuse pixels that a processor with other settings than the model's made.

    Raises:
        UserError: with both sizes.
    """
    if tuple(sizes) != tuple(wanted):
        raise UserError(
            f"the processor makes {what} of {' x '.join(map(str, sizes))}, and {name} reads "
            f"{' x '.join(map(str, wanted))}: {remedy}."
        )


def check_sides(
    name: str, what: str, values: Float[Tensor, "... Y X"], wanted: Sequence[int]
) -> None:
    """`check_size` of the sides of pixel values.

    Raises:
        UserError: with both sizes.
    """
    check_size(name, what, values.shape[-2:], wanted, "give its image processor that size")


def question_texts(
    tokenizer: Any, ids: Int[Tensor, "B S"], question: Bool[Tensor, "B S"]
) -> tuple[str, ...]:
    """What the tokens of each question say; () where there is no tokenizer to tell."""
    if tokenizer is None:
        return ()
    return tuple(
        str(tokenizer.decode(row[columns])) for row, columns in zip(ids, question, strict=True)
    )
