"""What every frozen LVLM on a stock Hugging Face class shares: encoding, answers, and their
likelihood."""

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import AutoProcessor

from tprl.cost import FULL, LVLMShape, layer_kinds, patch_bytes
from tprl.errors import UserError
from tprl.lvlm.adapters import merge_adapter
from tprl.lvlm.base import BaseLVLM
from tprl.lvlm.batching import (
    Seen,
    axes,
    check_template,
    micro_batches,
    retry_smaller,
)
from tprl.lvlm.blueprint import random_model
from tprl.lvlm.encoding import RGB, Encoding
from tprl.lvlm.layer_drop import LayerPlan, check_layers, dropping
from tprl.lvlm.listening import WORD_ATTENTION
from tprl.lvlm.loading import Placement, find_model, first_device, load
from tprl.lvlm.overflow import watched
from tprl.lvlm.prompting import Prompting
from tprl.lvlm.reading import AnswerReading
from tprl.lvlm.shapes import ReadsShapes
from tprl.lvlm.standing import EVERY, RECEIVED
from tprl.lvlm.towers import check_feature_layers
from tprl.runtime import memory
from tprl.types import Box, Prompt, Sample

WORKERS = 4  # on a GPU: an image takes a core 0.15 to 0.26 s


def workers_on(device: torch.device) -> int:
    """Threads that prepare images, where no setting says how many."""
    return 0 if device.type == "cpu" else min(WORKERS, max(1, (os.cpu_count() or 1) - 1))


# Checkpoints come with settings of their own, such as a repetition penalty, and `score` knows of
# none.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,  # SmolVLM2's config leaves it off
}


class FrozenLVLM(Encoding, AnswerReading, BaseLVLM, ABC):
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
        working_gib: GiB that one activity may hold on the device beside the weights (encoding,
            observing, selecting, splicing): sizes of batches follow from it.
        workers: threads that prepare images while the model works (`scoring.ahead`); None: 4 where
            it is on a GPU, none on a CPU, whose cores are the model's.
        max_pixels, max_tiles: bounds of what the processor makes of an image, see `Limits`; None:
            its own.
        dtype: of weights and activations.
        device: where the model lives; "auto" is this process's GPU where there is one, else the
            CPU.
        placement, attention, load_in, max_memory, offload_folder: see `loading.Placement`.
        adapter: a folder or run of stage=tune, whose adapter is merged into the weights.

    Raises:
        UserError: no weights there, damaged weights, a placement that cannot be, or an adapter of
            another model.
    """

    model_type: str
    known_extras: frozenset[str] = EVERY
    # those of them that depend on the question too: `relate` finishes them
    related: frozenset[str] = frozenset({"clip_relevance"})
    # extras that stand in for what the encoder lacks, and what they are (`standing`)
    substitutes: ClassVar[dict[str, str]] = RECEIVED
    pixel_inputs: tuple[str, ...] = ("pixel_values",)  # what its processor makes of images
    one_run = True  # whether the placeholders of an image follow each other
    by_company = False  # whether the processor makes other pixels of an image that is not alone
    coordinates: str = "relative"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "pixels" in cls.known_extras:  # colors follow from them: see `Encoding._complete`
            cls.known_extras |= {RGB}

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
        working_gib: int | float = memory.WORKING,
        workers: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
        adapter: str | None = None,
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
        if adapter is not None:
            merge_adapter(model, adapter)
        # Prompts end in one column, so that answers of a batch begin in one.
        processor.tokenizer.padding_side = "left"
        self._hold(model.requires_grad_(False).eval(), processor, name)
        self.limit(max_pixels, max_tiles)
        self.prompt, self.micro_batch = check_template(prompt), micro_batch
        self.workers = workers_on(self.device) if workers is None else workers
        self.working_gib = working_gib
        self.values_at_once = self._values_at_once()
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
        # What `around` shares with `__init__`: nothing that a setting decides.
        check_feature_layers(model.config, name)
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device = first_device(model)
        self.width: int = model.config.text_config.hidden_size
        self.image_token: int = (
            getattr(model.config, "image_token_id", None) or model.config.image_token_index
        )

    def _values_at_once(self) -> int:
        """Pixel values that the vision side gets at once, by what a patch of them holds."""
        try:
            vision = self.shape.vision
        except UserError:  # the cost model does not know this tower
            return memory.working_bytes(self) // memory.PER_PIXEL_VALUE
        values = vision.channels * vision.frames * vision.patch_size**2
        each = patch_bytes(vision, self.model.dtype.itemsize) / values
        return int(memory.working_bytes(self) / each)

    @property
    def layers(self) -> int:
        """Decoder layers of the language model."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def definition(self) -> str:
        """What "pruned" means exactly. "masked": the same model with the dropped tokens masked out
        of attention. "shorter": the stock model given a prompt without them, every other token at
        its position; where layers do not attend to all tokens, masking is something else, since it
        leaves gaps in windows and steps in recurrent states."""
        kinds = layer_kinds(self.model.config.text_config)
        return "masked" if set(kinds) == {FULL} else "shorter"

    def check_extras(self, extras: frozenset[str], known: frozenset[str]) -> None:
        """Refuse extras that are not among `known` ones, and attention of words in layers that
        cannot be read.

        Raises:
            UserError: there is one.
        """
        super().check_extras(extras, known)
        if WORD_ATTENTION in extras:
            self.check_layers(WORD_ATTENTION)

    def check_layers(self, name: str) -> None:
        """Refuse a method, by name, that drops tokens between layers which cannot be reached into.

        Raises:
            UserError: this model has such layers.
        """
        check_layers(self.model.config.text_config, name)

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

    def positions(
        self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"], inputs: Mapping[str, Any]
    ) -> Int[Tensor, "P B S"]:
        """Position ids of the unpruned prompts, 0 on padding; `inputs` is what the processor
        made."""
        return (attention.long().cumsum(1) - 1).clamp(min=0).unsqueeze(0)

    def inputs_beside(
        self, ids: Int[Tensor, "B S1"], visual: Bool[Tensor, "B S"]
    ) -> dict[str, Shaped[Tensor, "B S1 ..."]]:
        """What the stock class reads beside embeddings and padding, its arguments by name: what its
        masks depend on, say. `ids` are of prompts with these visual columns, and of answers after
        them."""
        return {}

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
        # Micro-batches are sorted by length: answers go back to their own places.
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
        # Embeddings in place of ids: the stock class then neither sees images nor looks up words.
        with self.deepstack(prompt.deep, prompt.visual), dropping(self.model, prompt, plan):
            inputs = {"inputs_embeds": prompt.embeds, "attention_mask": prompt.attention.long()}
            inputs |= self.inputs_beside(prompt.input_ids, prompt.visual)
            with watched(self.model) as watch:
                ids = self.model.generate(
                    **inputs, position_ids=axes(prompt.positions), **GREEDY, **options
                )
        self.check_written(watch.finite, prompt, plan, prompt.uids)
        return ids
