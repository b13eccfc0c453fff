"""What all our model classes share: the pruner beside the weights, and survivors at their
places."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.lvlm.batching import fingerprint
from tprl.serving.choose import Image, Kept, choose
from tprl.serving.places import Span, delta, rewritten, text_positions, with_places, without_places
from tprl.serving.settings import Settings
from tprl.serving.vllm.compiled import let_positions_have_axes
from tprl.serving.vllm.cpu import answer_for_pruning
from tprl.serving.vllm.processing import QUESTION


class Pruned(ABC):
    """Before a stock model class among the bases.

    vLLM calls `embed_multimodal` for images that are in no cache, `get_mrope_input_positions` for a
    new prompt, and `recompute_mrope_positions` for every chunk of it; text stands where it would
    stand before pruning. With positions=compact none but the first is called.

    Attributes:
        pruner_calls: images that the pruner has read; with a question, one per question.
    """

    supports_mrope: ClassVar[Any] = True
    supports_multimodal_pruning: ClassVar[Any] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ("evs",)
    supports_tower_connector_lora = False  # adapters would count the tokens before pruning
    axes = 1  # different position axes that travel with a token

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config
        settings = Settings.of(config.hf_config)
        with torch.device("cpu"), _float32():
            pruner = settings.load(config.model)
        # Not as a submodule: the loader would look for the pruner's weights among the model's.
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "pruner", pruner)
        self.pruner_calls = 0
        answer_for_pruning()
        let_positions_have_axes(self)

    settings: Settings
    pruner: Any

    # --- tokens ---------------------------------------------------------------------------------

    def pruned(self, images: Sequence[Image]) -> list[Float[Tensor, "K F"]]:
        """What vLLM caches and merges: kept tokens, and their places where they matter."""
        self.pruner_calls += len(images)
        with _float32():
            kept = choose(self.pruner, images, self.settings.keep_ratio)
        return [self.packed(image) for image in kept]

    def packed(self, kept: Kept) -> Float[Tensor, "K F"]:
        """A kept image as one tensor."""
        if self.settings.positions == "compact":
            return kept.tokens
        return with_places(kept.tokens, kept.places)

    def words_of(self, question: Any, images: int) -> list[Float[Tensor, "Q D"]]:
        """Embeddings of the question that came with each image."""
        embed = self.get_language_model().embed_input_ids  # type: ignore[attr-defined]
        if question is None:
            device = next(self.parameters()).device  # type: ignore[attr-defined]
            return [embed(torch.zeros(0, dtype=torch.long, device=device))] * images
        return [embed(ids) for ids in question]

    def uid(self, pixels: Tensor) -> str:
        """A name for pruners that draw; the others do not look at it."""
        serving = self.pruner.serving
        draws = self.pruner.seed is not None or (serving and serving.select == "gumbel")
        return str(fingerprint(pixels)) if draws else ""

    # --- positions ------------------------------------------------------------------------------

    @abstractmethod
    def layout(self, ids: Any) -> list[Span]:
        """The images of a prompt."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Int[Tensor, "3 S"], int]:
        """Positions of a new prompt, as if nothing was pruned; places follow once they are
        known."""
        images = [
            Span(feature.mm_position.offset, feature.mm_position.length) for feature in mm_features
        ]
        extents = [self.extent(feature) for feature in mm_features]
        if self.settings.positions == "compact":
            extents = [length for _, length in images]
        line = text_positions(len(input_tokens), images, extents)
        positions = line.expand(3, -1).contiguous()
        if self.settings.positions == "compact":
            positions = torch.arange(len(input_tokens)).expand(3, -1).contiguous()
        return positions, delta(positions)

    @abstractmethod
    def extent(self, feature: Any) -> int:
        """Positions that an image takes before pruning."""

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Tokens without their places, and positions with them."""
        if not len(multimodal_embeddings):
            return [], mrope_positions, delta(mrope_positions)
        parts = [without_places(part, self.axes) for part in multimodal_embeddings]
        images = self.layout(input_ids)
        extents = self.extents_in(images)
        places = [place.expand(3, -1) for _, place in parts]
        new = rewritten(mrope_positions, images, extents, places, num_computed_tokens)
        return [tokens for tokens, _ in parts], new, delta(new)

    @abstractmethod
    def extents_in(self, images: Sequence[Span]) -> list[int]:
        """Positions that each image takes before pruning, where images can follow each other."""


class _float32:
    """While it lasts, torch makes tensors in single precision: vLLM sets the model's dtype."""

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before)


def questions_in(kwargs: dict[str, Any]) -> Any:
    """The questions among the inputs of `embed_multimodal`, taken out of them."""
    return kwargs.pop(QUESTION, None)
