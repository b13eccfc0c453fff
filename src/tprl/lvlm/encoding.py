"""From questions about images to what the language model reads: everything before the pruning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
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
from tprl.lvlm.overflow import check_seen
from tprl.lvlm.prompting import Prompting
from tprl.lvlm.regions import region_rank
from tprl.lvlm.seeing import Seeing
from tprl.lvlm.shapes import REFUSALS, ReadsShapes
from tprl.lvlm.texts import Placed, question_mask
from tprl.types import Box, Encoded, Sample, columns_of


class Encoding(Prompting, ReadsShapes, Limits, Seeing):
    """The half of `FrozenLVLM` that encodes: prompts as token ids, images as tokens, put together.

    Attributes:
        known_extras, related, pixel_inputs, one_run: see `FrozenLVLM`.
        positions: position ids of the unpruned prompts.
        project: the projector.
        relate: finishes the extras that are `related`; of families that have some.
    """

    known_extras: frozenset[str]
    related: frozenset[str]
    one_run: bool
    device: torch.device
    processor: Any
    tokenizer: Any
    image_token: int
    pixels_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    seen_boxes: Callable[[Sample], tuple[Box, ...]]
    positions: Callable[..., Tensor]
    project: Callable[[Tensor], Tensor]
    relate: Callable[[Encoded], None]

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        """Everything up to the language model's input. An image that several samples share is
        encoded once.

        Raises:
            UserError: an extra that is not known here, `prompts_of`'s reasons, an image that the
                processor refuses, a processor that writes another number of placeholders than there
                are features, or tokens that are not finite.
        """
        # "region" is drawn from the sample's boxes, not seen: no tower provides it.
        self.check_extras(extras, self.known_extras | {"region"})
        inputs, prompts = self.processed(samples)
        uids = [sample.uid for sample in samples]
        # Each distinct image passes the tower once, whatever number of samples show it.
        seen, (first, occurrences) = Seen([], [], [], {}), unique_images(samples)
        if first:
            pixels = self.pixels_of(inputs)
            pixels = pick_images(pixels, self.rows_per_image(pixels), first)
            seen = self.look(pixels, extras - {"region"})
            self._check_seen(seen, pixels, extras - {"region"}, occurrences, uids)
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
        # What needs the assembled batch comes last: the region's cells, and CLIP's texts.
        if "region" in extras:
            width = encoded.visual_at.shape[1]
            encoded.extras["region"] = region_rank(samples, encoded.grids, width, encoded.seen).to(
                self.device
            )
        if extras & self.related:
            self.relate(encoded)
        return encoded

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
        seen = self.look(pixels := self.pixels_of(inputs), extras)
        ids, attention = inputs["input_ids"], inputs["attention_mask"].bool()
        is_image, lengths = ids == self.image_token, [len(tokens) for tokens in seen.tokens]
        # No samples here: which images a prompt shows follows from its placeholders.
        occurrences = shown_images(is_image.sum(1).tolist(), lengths, self.remedy)
        names = [f"prompt {row}" for row in range(len(ids))]
        # Numbers first, then counts: a model that overflows fails whatever its prompt is.
        self._check_seen(seen, pixels, extras, occurrences, names)
        check_placeholders(is_image, occurrences, lengths, names, self.one_run, self.remedy)
        uids = input_uids(
            ids, attention, pixels["pixel_values"].split(self.rows_per_image(pixels)), occurrences
        )
        encoded = self._assemble(inputs, seen, occurrences, uids, question)
        encoded = replace(encoded, questions=question_texts(self.tokenizer, ids, question))
        if extras & self.related:
            self.relate(encoded)
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
            return self.see(pick_images(pixels, self.rows_per_image(pixels), [image]), extras)

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
        ids = inputs["input_ids"].to(self.device)
        attention = inputs["attention_mask"].to(self.device).bool()
        # [B V] columns of all image tokens, separators included.
        at, real = columns_of(ids == self.image_token)

        def spread(values: Sequence[Tensor]) -> Tensor:
            """One tensor per image -> [B V ...], image by image, zero where padded."""
            joined = [
                torch.cat(row) if row else values[0][:0] for row in _of_images(values, occurrences)
            ]
            # a sharded tower may be elsewhere
            return pad_sequence(joined, batch_first=True).to(self.device)

        # Words first, then visual tokens over their placeholders: [B S D].
        embeds = self.words(ids)
        b, v = real.nonzero(as_tuple=True)
        visual, deep = torch.zeros_like(attention), None
        kinds = seen.separators or [
            tokens.new_zeros(len(tokens), dtype=torch.bool) for tokens in seen.tokens
        ]
        if seen.tokens:
            embeds[b, at[b, v]] = spread(seen.tokens)[b, v].to(embeds)
            visual[b, at[b, v]] = ~spread(kinds)[b, v]
        # The same for features that deeper layers of the language model add: [B S F].
        if seen.deep is not None:
            deep = embeds.new_zeros(*ids.shape, seen.deep[0].shape[-1])
            deep[b, at[b, v]] = spread(seen.deep)[b, v].to(embeds)
        # Separators stay in the prompt as text does: only the other image tokens are visual.
        visual_at, visual_mask = columns_of(visual)
        counts = _real_tokens(seen, kinds)
        image_of = [torch.arange(len(row)).repeat_interleave(counts[row]) for row in occurrences]
        return Encoded(
            uids=tuple(uids),
            input_ids=ids,
            embeds=embeds,
            attention=attention,
            positions=self.positions(ids, attention, inputs),
            visual_at=visual_at,
            visual_mask=visual_mask,
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


def _of_images(values: Sequence[Any], occurrences: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Per prompt, what `values` holds of each of its images."""
    return [list(map(values.__getitem__, row)) for row in occurrences]


def _real_tokens(seen: Seen, kinds: Sequence[Tensor]) -> Int[Tensor, " _"]:
    """Tokens of each image that are no separators, on the host; it waits for the device once at
    most."""
    if seen.separators is None:
        return torch.tensor([len(tokens) for tokens in seen.tokens], dtype=torch.long)
    return torch.stack([(~kind).sum() for kind in kinds]).cpu()
