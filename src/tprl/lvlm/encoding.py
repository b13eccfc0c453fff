"""From questions about images to what the language model reads: everything before the pruning."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tprl.lvlm.batching import (
    Seen,
    check_placeholders,
    input_uids,
    pick_images,
    question_texts,
    shown_images,
    unique_images,
)
from tprl.lvlm.limits import Limits
from tprl.lvlm.listening import WORD_ATTENTION, Listening
from tprl.lvlm.overflow import check_seen
from tprl.lvlm.prompting import Prompting
from tprl.lvlm.regions import region_rank
from tprl.lvlm.seeing import Seeing
from tprl.lvlm.shapes import REFUSALS, ReadsShapes
from tprl.lvlm.texts import Placed, question_mask
from tprl.types import Box, Encoded, Sample, columns_of

# "pixels" as red, green and blue in [0, 1], whatever the processor normalizes by
RGB = "rgb"
ASSEMBLED = frozenset({"region", WORD_ATTENTION, RGB})  # extras that no tower provides


class Encoding(Prompting, ReadsShapes, Limits, Seeing, Listening):
    """The half of `FrozenLVLM` that encodes: prompts as token ids, images as tokens, put together.

    Attributes:
        known_extras, related, pixel_inputs, one_run, by_company: see `FrozenLVLM`.
        positions: position ids of the unpruned prompts.
        project: the projector.
        words: embeddings of tokens.
    """

    known_extras: frozenset[str]
    related: frozenset[str]
    one_run: bool
    by_company: bool
    device: torch.device
    processor: Any
    tokenizer: Any
    image_token: int
    pixels_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    seen_boxes: Callable[[Sample], tuple[Box, ...]]
    positions: Callable[..., Tensor]
    project: Callable[[Tensor], Tensor]
    words: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def encode(
        self,
        samples: Sequence[Sample],
        extras: frozenset[str] = frozenset(),
        prepared: tuple[Any, list[Placed]] | None = None,
    ) -> Encoded:
        """Everything up to the language model's input. An image that several samples share is
        encoded once. `prepared` is what `processed` returned for these samples, in another thread
        perhaps.

        Raises:
            UserError: an extra that is not known here, `prompts_of`'s reasons, an image that the
                processor refuses, a processor that writes another number of placeholders than there
                are features, or tokens that are not finite.
        """
        # "region" is drawn from the sample's boxes, "word_attention" read in the language model.
        self.check_extras(extras, self.known_extras | {"region"})
        inputs, prompts = self.processed(samples) if prepared is None else prepared
        uids = [sample.uid for sample in samples]
        # Each distinct image passes the tower once, whatever number of samples show it.
        seen = Seen([], [], [], {})
        first, occurrences = unique_images(samples, self.by_company)
        if first:
            pixels = self.pixels_of(inputs)
            pixels = pick_images(pixels, self.rows_per_image(pixels), first)
            seen = self.look(pixels, of_tower(extras))
            self._check_seen(seen, pixels, of_tower(extras), occurrences, uids)
        is_image = inputs["input_ids"] == self.image_token
        lengths = [len(tokens) for tokens in seen.tokens]
        check_placeholders(is_image, occurrences, lengths, uids, self.one_run, self.remedy)
        # Where the question's words are, now that placeholders are as many as features.
        per_image = _of_images(lengths, occurrences)
        question = question_mask(
            self.tokenizer, inputs["offset_mapping"], is_image, prompts, per_image, self.placeholder
        )
        encoded = self._assemble(
            inputs, seen, occurrences, uids, question & inputs["attention_mask"].bool()
        )
        encoded = replace(
            encoded,
            questions=tuple(sample.question for sample in samples),
            seen=tuple(self.seen_boxes(sample) for sample in samples),
        )
        # What needs the assembled batch comes last: the region's cells, CLIP's texts, attention.
        if "region" in extras:
            width = encoded.visual_at.shape[1]
            encoded.extras["region"] = region_rank(samples, encoded.grids, width, encoded.seen).to(
                self.device
            )
        self._complete(encoded, extras)
        return encoded

    def _complete(self, encoded: Encoded, extras: frozenset[str]) -> None:
        """Extras that read the question and the assembled batch."""
        if RGB in extras and "pixels" in encoded.extras:
            pixels = encoded.extras["pixels"]
            encoded.extras[RGB] = colors_of(pixels, self.processor.image_processor)
            if "pixels" not in extras:
                del encoded.extras["pixels"]
        if extras & self.related:
            self.relate(encoded)
        if WORD_ATTENTION in extras:
            encoded.extras[WORD_ATTENTION] = self.word_attention(encoded)

    def processed(self, samples: Sequence[Sample]) -> tuple[Any, list[Placed]]:
        """What the stock processor makes of samples, with the place of every token in its text; and
        their prompts.

        Raises:
            UserError: `prompts_of`'s reasons, or an image that the processor refuses.
        """
        prompts = self.prompts_of(samples)
        images = [list(sample.images) for sample in samples]
        texts = [prompt.text for prompt in prompts]
        how = {
            "padding": True,
            "return_tensors": "pt",
            "text_kwargs": {"return_offsets_mapping": True},
        }
        try:
            return self.processor(
                text=texts, images=images if any(images) else None, **how
            ), prompts
        except REFUSALS as error:  # rows of datasets do not get here: `refusal` says so before
            self.check_shapes(samples, error)
            raise

    def twin(self) -> "Encoding":
        """The same for another thread, with a processor of its own: fast tokenizers refuse two at a
        time. It reads prompts and images; the model stays with this one."""
        twin = copy.copy(self)
        # What is kept of the texts holds on to the tokenizer.
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    vars(twin).pop(name, None)
        twin.processor = copy.deepcopy(self.processor)
        twin.tokenizer = getattr(twin.processor, "tokenizer", twin.processor)
        return twin

    @torch.no_grad()
    def encode_inputs(
        self, inputs: Mapping[str, Any], extras: frozenset[str], question: Bool[Tensor, "B S"]
    ) -> Encoded:
        """`encode` for prompts that the stock processor made tensors of; uids depend on own text
        and pixels alone.

        Raises:
            UserError: an extra that is not known here, or images that do not fit the prompts.
        """
        self.check_extras(extras, self.known_extras)
        seen = self.look(pixels := self.pixels_of(inputs), of_tower(extras))
        ids, attention = inputs["input_ids"], inputs["attention_mask"].bool()
        is_image, lengths = ids == self.image_token, [len(tokens) for tokens in seen.tokens]
        # No samples here: which images a prompt shows follows from its placeholders.
        occurrences = shown_images(is_image.sum(1).tolist(), lengths, self.remedy)
        names = [f"prompt {row}" for row in range(len(ids))]
        # Numbers first, then counts: a model that overflows fails whatever its prompt is.
        self._check_seen(seen, pixels, of_tower(extras), occurrences, names)
        check_placeholders(is_image, occurrences, lengths, names, self.one_run, self.remedy)
        uids = input_uids(
            ids, attention, pixels["pixel_values"].split(self.rows_per_image(pixels)), occurrences
        )
        encoded = self._assemble(inputs, seen, occurrences, uids, question)
        encoded = replace(encoded, questions=question_texts(self.tokenizer, ids, question))
        self._complete(encoded, extras)
        return encoded

    def _check_seen(
        self,
        seen: Seen,
        pixels: Mapping[str, Any],
        extras: frozenset[str],
        occurrences: Sequence[Sequence[int]],
        names: Sequence[str],
    ) -> None:
        """Refuse what is not finite; `seen` was made of `pixels`."""

        def again(image: int) -> Seen:
            read = self.sources(extras)
            return self.see(pick_images(pixels, self.rows_per_image(pixels), [image]), read)

        check_seen(self, seen, occurrences, names, again)

    def _assemble(
        self,
        inputs: Mapping[str, Any],
        seen: Seen,
        occurrences: Sequence[Sequence[int]],
        uids: Sequence[str],
        question: Bool[Tensor, "B S"],
    ) -> Encoded:
        """Prompts as token ids and images as tokens, put together; `occurrences[b]` are the images
        of sample b."""
        # Places are found where the processor left the ids, on the host: what is counted there
        # makes nobody wait for the device.
        tokens, real = inputs["input_ids"], inputs["attention_mask"].bool()
        ids, attention = tokens.to(self.device), real.to(self.device)
        # Columns of all image tokens, separators included, row by row.
        row, column = (tokens == self.image_token).nonzero(as_tuple=True)

        def spread(values: Sequence[Tensor]) -> Tensor:
            """One tensor per image -> [B V ...], image by image, zero where padded."""
            joined = [
                torch.cat(line) if line else values[0][:0]
                for line in _of_images(values, occurrences)
            ]
            # a sharded tower may be elsewhere
            return pad_sequence(joined, batch_first=True).to(self.device)

        def in_line(values: Sequence[Tensor]) -> Tensor:
            """One tensor per image -> [N ...], in the order of the image columns."""
            return torch.cat([values[image] for image in chain.from_iterable(occurrences)])

        # Words first, then visual tokens over their placeholders: [B S D].
        embeds = self.words(ids)
        visual, deep = torch.zeros_like(real), None
        kinds = _separators(seen)
        if row.numel():
            embeds[row, column] = in_line(seen.tokens).to(embeds)
            visual[row, column] = ~in_line(kinds).to(visual.device)
        # The same for features that deeper layers of the language model add: [B S F].
        if seen.deep is not None:
            deep = embeds.new_zeros(*ids.shape, seen.deep[0].shape[-1])
            deep[row, column] = in_line(seen.deep).to(embeds)
        # Separators stay in the prompt as text does: only the other image tokens are visual.
        visual_at, visual_mask = columns_of(visual)
        counts = torch.tensor([len(kind) for kind in kinds], dtype=torch.long)
        counts -= torch.stack([kind.sum() for kind in kinds]) if kinds else 0
        image_of = [torch.arange(len(line)).repeat_interleave(counts[line]) for line in occurrences]
        return Encoded(
            uids=tuple(uids),
            input_ids=ids,
            embeds=embeds,
            attention=attention,
            positions=self.positions(ids, attention, inputs),
            visual_at=visual_at.to(self.device),
            visual_mask=visual_mask.to(self.device),
            image_of=pad_sequence(image_of, batch_first=True).to(self.device),
            grids=tuple(map(tuple, _of_images(seen.views, occurrences))),
            tiles=tuple(map(tuple, _of_images(seen.tiles, occurrences))),
            question=question.to(self.device),
            extras={name: spread(value) for name, value in seen.extras.items()},
            deep=deep,
            # a sharded one may be elsewhere
            project=lambda features: self.project(features).to(features.device),
            tower=seen.tower,
            look=self.look_again,
        )


def of_tower(extras: frozenset[str]) -> frozenset[str]:
    """What the vision side is asked for, for these extras."""
    return (extras - ASSEMBLED) | ({"pixels"} if RGB in extras else set())


def colors_of(pixels: Shaped[Tensor, "B V 3 ..."], images: Any) -> Float[Tensor, "B V 3 ..."]:
    """Red, green and blue in [0, 1] of what an image processor of transformers made of them: its
    steps in reverse."""
    # [3 1 ...] a mean and a deviation per channel.
    channels = (3, *[1] * (pixels.ndim - 3))
    pixels = pixels.float()  # bytes, where it does not rescale
    if images.do_normalize:
        mean, std = (pixels.new_tensor(list(x)) for x in (images.image_mean, images.image_std))
        pixels = pixels * std.view(channels) + mean.view(channels)
    return pixels / (255 * (images.rescale_factor if images.do_rescale else 1))


def _of_images(values: Sequence[Any], occurrences: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Per prompt, what `values` holds of each of its images."""
    return [list(map(values.__getitem__, row)) for row in occurrences]


def _separators(seen: Seen) -> list[Bool[Tensor, " N"]]:
    """Which tokens of each image are separators, on the host; it waits for the device once at
    most."""
    lengths = [len(tokens) for tokens in seen.tokens]
    if not seen.separators:
        return [torch.zeros(length, dtype=torch.bool) for length in lengths]
    return list(torch.cat(seen.separators).cpu().split(lengths))
