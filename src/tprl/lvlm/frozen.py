"""What every frozen LVLM on a stock Hugging Face class shares: encoding, answers, and their
likelihood."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.lvlm.batching import (
    Seen,
    axes,
    check_placeholders,
    check_template,
    input_uids,
    micro_batches,
    pick_images,
    question_texts,
    retry_smaller,
    shown_images,
    unique_images,
)
from tprl.lvlm.blueprint import random_model
from tprl.lvlm.layer_drop import LayerPlan, dropping
from tprl.lvlm.limits import Limits
from tprl.lvlm.loading import Placement, find_model, first_device, load
from tprl.lvlm.overflow import check_seen, watched
from tprl.lvlm.prompting import Prompting
from tprl.lvlm.reading import AnswerReading
from tprl.lvlm.regions import region_rank
from tprl.lvlm.seeing import Seeing
from tprl.lvlm.shapes import REFUSALS, ReadsShapes
from tprl.lvlm.texts import Placed, question_mask
from tprl.types import Box, Encoded, Prompt, Sample, columns_of

# Checkpoints come with settings of their own, such as a repetition penalty, and `score` knows of
# none.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class FrozenLVLM(Prompting, AnswerReading, ReadsShapes, Limits, Seeing, ABC):
    """A frozen model. Not a module: Lightning neither moves, trains nor saves it.

    It sees and writes here, words its prompts in `Prompting` and reads answers in `AnswerReading`;
    `ReadsShapes` says which images it refuses, and `Limits` how large it sees them.

    Subclasses name their `model_type` (of the stock config), say how they see (`see`, `project`),
    which extras they know, their `shape`, and how a small random model of their architecture is
    built (`blueprint`).

    Args:
        pretrained: a folder written by `save_pretrained`, the name of a folder in `tprl/assets`, or
            a hub id; None: a small model with random weights.
        geometry: with None, sizes of that model other than the small ones (see
            `blueprint.random_model`).
        name: how results call this model.
        prompt: template around `{question}` (other braces are text), "<image>" marks the image;
            None: the processor's chat template, one user turn with the images before the question.
        max_new_tokens: bound of a generated answer; None is what answers of the dataset in use
            usually need.
        micro_batch: prompts per forward; results do not depend on it.
        max_pixels, max_tiles: bounds of what the processor makes of an image, see `Limits`; None:
            its own.
        dtype: of weights and activations.
        device: where the model lives; "auto" is this process's GPU where there is one, else the
            CPU.
        placement, attention, load_in, max_memory, offload_folder: see `loading.Placement`.

    Raises:
        UserError: no weights there, damaged weights, or a placement that cannot be.
    """

    model_type: str
    known_extras: frozenset[str] = frozenset()
    # those of them that depend on the question too: `relate` finishes them
    related: frozenset[str] = frozenset()
    # extras that stand in for what the encoder lacks, and what they are
    substitutes: ClassVar[dict[str, str]] = {}
    pixel_inputs: tuple[str, ...] = ("pixel_values",)  # what its processor makes of images
    one_run = True  # whether the placeholders of an image follow each other
    coordinates: str = "relative"  # how it writes boxes, a key of `data.boxes.COORDINATES`
    # finishes the extras that are `related`; of families that have some
    relate: Callable[[Encoded], None]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.related and not hasattr(cls, "relate"):
            raise TypeError(
                f"{cls.__name__} has extras related to the "
                "question and no relate(encoded) for them."
            )

    def __init__(
        self,
        pretrained: str | None,
        name: str,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        micro_batch: int = 64,
        dtype: str = "float32",
        device: str = "auto",
        placement: str = "replicate",
        attention: str | None = None,
        load_in: str | None = None,
        max_memory: dict[int | str, str] | None = None,
        offload_folder: str | None = None,
        geometry: Mapping[str, Any] | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
    ) -> None:
        where = Placement(dtype, device, placement, attention, load_in, max_memory, offload_folder)
        if pretrained is None:
            where.check_random(name)
            model, processor = random_model(self.blueprint, geometry or {}, where)
        else:
            if geometry is not None:
                raise UserError(
                    "model.geometry sizes random weights: set "
                    "model.pretrained=null, or leave it out."
                )
            source = str(folder) if (folder := find_model(pretrained)).is_dir() else pretrained
            model, processor = load(source, name, self.model_type, where, self.load_processor)
        processor.tokenizer.padding_side = "left"
        self._hold(model.requires_grad_(False).eval(), processor, name)
        self.limit(max_pixels, max_tiles)
        self.prompt, self.micro_batch = check_template(prompt), micro_batch
        # see scoring.lengths
        self.max_new_tokens: int = 16 if max_new_tokens is None else max_new_tokens
        self.length_is_set = max_new_tokens is not None

    @classmethod
    def around(cls, model: Any, processor: Any = None) -> "FrozenLVLM":
        """The same view of a stock model that somebody else loaded and owns; for
        `encode_inputs`."""
        self = cls.__new__(cls)
        self._hold(model, processor, cls.model_type)
        return self

    def _hold(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device = first_device(model)
        self.width: int = model.config.text_config.hidden_size
        self.image_token: int = (
            getattr(model.config, "image_token_id", None) or model.config.image_token_index
        )

    @property
    def layers(self) -> int:
        """Decoder layers of the language model."""
        return self.model.config.text_config.num_hidden_layers

    @property
    @abstractmethod
    def shape(self) -> LVLMShape:
        """What decides its FLOPs, from the config.

        Raises:
            UserError: the cost model does not know this config.
        """

    @staticmethod
    @abstractmethod
    def blueprint() -> tuple[Any, Any]:
        """A small model of this architecture with random weights from torch's seed, and its
        processor."""

    @classmethod
    def load_processor(cls, source: str) -> Any:
        """The processor of a folder or hub id."""
        return AutoProcessor.from_pretrained(source)

    def pixels_of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the stock processor made of the images of a batch of prompts: `pixel_values`, of
        which every image has `rows_per_image`, and further inputs with one entry per image."""
        return {name: inputs[name] for name in self.pixel_inputs}

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an image of that size after the processor's resize; the same where
        boxes do not depend on it."""
        return width, height

    def seen_box(self, width: int, height: int) -> Box:
        """The part of an image of that size that the model sees, in its pixels: all of it, unless
        the processor crops. Where the processor pads, the box reaches outside of the image."""
        return 0.0, 0.0, float(width), float(height)

    def seen_boxes(self, sample: Sample) -> tuple[Box, ...]:
        """`seen_box` of every image of a sample."""
        return tuple(self.seen_box(*image.size) for image in sample.images)

    def rows_per_image(self, pixels: Mapping[str, Any]) -> list[int]:
        """How many rows of `pixel_values` are each image's."""
        return [1] * len(pixels["pixel_values"])

    @abstractmethod
    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        """How many features the vision side makes of each image, line ends included; no weights are
        needed."""

    @abstractmethod
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        """Vision tower and projector on what `pixels_of` returns; `extras` are known ones, "region"
        excepted."""

    @abstractmethod
    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The projector, for methods that merge tokens before it."""

    def refusal(self, sample: Sample) -> tuple[str, str] | None:
        """Why this model cannot read a sample: a reason, the same for all of its kind, and details.
        None if it can."""
        return Prompting.refusal(self, sample) or ReadsShapes.refusal(self, sample)

    # --- encode -----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        """Everything up to the language model's input. An image that several samples share is
        encoded once.

        Raises:
            UserError: an extra that is not known here, `prompts_of`'s reasons, an image that the
                processor refuses, a processor that writes another number of placeholders than there
                are features, or tokens that are not finite.
        """
        self.check_extras(extras, self.known_extras | {"region"})
        inputs, prompts = self.processed(samples)
        uids = [sample.uid for sample in samples]
        seen, (first, occurrences) = Seen([], [], [], {}), unique_images(samples)
        if first:
            pixels = self.pixels_of(inputs)
            pixels = pick_images(pixels, self.rows_per_image(pixels), first)
            seen = self.look(pixels, extras - {"region"})
            self._check_seen(seen, pixels, extras - {"region"}, occurrences, uids)
        is_image, lengths = (
            inputs["input_ids"] == self.image_token,
            [len(tokens) for tokens in seen.tokens],
        )
        check_placeholders(is_image, occurrences, lengths, uids, self.one_run, self.remedy)
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
        occurrences = shown_images(is_image.sum(1).tolist(), lengths, self.remedy)
        names = [f"prompt {row}" for row in range(len(ids))]
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

    def check_extras(self, extras: frozenset[str], known: frozenset[str]) -> None:
        """Refuse extras that are not among `known` ones."""
        if extras - known:
            raise UserError(
                f"{self.name} cannot provide {sorted(extras - known)}: it knows {sorted(known)}."
            )

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
        ids, attention = (
            inputs["input_ids"].to(self.device),
            inputs["attention_mask"].to(self.device).bool(),
        )
        at, real = columns_of(ids == self.image_token)

        def spread(values: Sequence[Tensor]) -> Tensor:
            """One tensor per image -> [B V ...], image by image, zero where padded."""
            joined = [
                torch.cat(row) if row else values[0][:0] for row in _of_images(values, occurrences)
            ]
            # a sharded tower may be elsewhere
            return pad_sequence(joined, batch_first=True).to(self.device)

        embeds = self.words(ids)
        b, v = real.nonzero(as_tuple=True)
        visual, deep = torch.zeros_like(attention), None
        kinds = seen.separators or [
            tokens.new_zeros(len(tokens), dtype=torch.bool) for tokens in seen.tokens
        ]
        if seen.tokens:
            embeds[b, at[b, v]] = spread(seen.tokens)[b, v].to(embeds)
            visual[b, at[b, v]] = ~spread(kinds)[b, v]
        if seen.deep is not None:
            deep = embeds.new_zeros(*ids.shape, seen.deep[0].shape[-1])
            deep[b, at[b, v]] = spread(seen.deep)[b, v].to(embeds)
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
        )

    def positions(
        self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"], inputs: Mapping[str, Any]
    ) -> Int[Tensor, "P B S"]:
        """Position ids of the unpruned prompts, 0 on padding; `inputs` is what the processor
        made."""
        return (attention.long().cumsum(1) - 1).clamp(min=0).unsqueeze(0)

    @contextmanager
    def deepstack(
        self, deep: Float[Tensor, "B S F"] | None, visual: Bool[Tensor, "B S"]
    ) -> Generator[None, None, None]:
        """While it lasts, the language model's next S columns also read `deep` where `visual` (see
        `Encoded.deep`)."""
        yield

    # --- answer -----------------------------------------------------------------------------------

    @retry_smaller
    def answer(self, prompt: Prompt, plan: LayerPlan | None = None) -> list[str]:
        """Greedy answers; with a plan, layers of the language model drop tokens of the unpruned
        prompt."""
        texts = [""] * len(prompt.uids)
        for _, numbers, part in micro_batches(prompt, self.micro_batch):
            out = self.generate(part, plan, max_new_tokens=self.max_new_tokens)
            decoded = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            for number, text in zip(numbers, decoded, strict=True):
                texts[number] = text
        return texts

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, plan: LayerPlan | None = None, **options: Any
    ) -> Int[Tensor, "B A"]:
        """Token ids of greedy answers, all prompts in one forward; further `options` are those of
        the stock class.

        Raises:
            UserError: logits are not finite.
        """
        ids: Any = None
        with self.deepstack(prompt.deep, prompt.visual), dropping(self.model, prompt, plan):
            inputs = {"inputs_embeds": prompt.embeds, "attention_mask": prompt.attention.long()}
            with watched(self.model) as watch:
                ids = self.model.generate(
                    **inputs, position_ids=axes(prompt.positions), **GREEDY, **options
                )
        self.check_written(watch.finite, prompt, plan, prompt.uids)
        return ids


def _of_images(values: Sequence[Any], occurrences: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Per prompt, what `values` holds of each of its images."""
    return [list(map(values.__getitem__, row)) for row in occurrences]


def _real_tokens(seen: Seen, kinds: Sequence[Tensor]) -> Int[Tensor, " _"]:
    """Tokens of each image that are no separators, on the host; it waits for the device once at
    most."""
    if seen.separators is None:
        return torch.tensor([len(tokens) for tokens in seen.tokens], dtype=torch.long)
    return torch.stack([(~kind).sum() for kind in kinds]).cpu()
