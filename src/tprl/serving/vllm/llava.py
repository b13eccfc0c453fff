"""LLaVA-1.5 in vLLM, pruned."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.choose import Image
from tprl.serving.places import Span, spans
from tprl.serving.vllm.model import Pruned, questions_in
from tprl.serving.vllm.processing import PrunedInfo, PrunedProcessor


class Info(PrunedInfo, LlavaProcessingInfo):
    """Counts of kept tokens."""

    def unpruned(self) -> int:
        """Visual tokens of an image before pruning: the same for all."""
        size = self.get_vision_encoder_info().get_image_size()
        return LlavaProcessingInfo.get_num_image_tokens(self, image_width=size, image_height=size)


class Processor(PrunedProcessor, LlavaMultiModalProcessor):
    """The question with every image."""

    def extent(self, number: int, inputs: Any) -> int:
        return self.info.unpruned()


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class TPRLLlavaForConditionalGeneration(Pruned, LlavaForConditionalGeneration):
    """Stock LLaVA-1.5 that keeps `tprl_keep_ratio` of an image's tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tower = self.vision_tower.vision_model.embeddings
        skip = int(self.config.vision_feature_select_strategy == "default")
        self._count = tower.num_positions - skip
        self._kept = self.settings.tokens(self._count)

    def embed_multimodal(self, **kwargs: object) -> Any:
        question = questions_in(kwargs)
        pixels: Any = kwargs.get("pixel_values")
        tokens = super().embed_multimodal(**kwargs)
        if not len(tokens):
            return tokens
        side = round(tokens[0].shape[0] ** 0.5)
        places = torch.arange(tokens[0].shape[0], device=tokens[0].device).unsqueeze(0)
        words = self.words_of(question, len(tokens))
        images = [
            Image(part, (side, side), asked, places, self.uid(seen))
            for part, asked, seen in zip(tokens, words, pixels, strict=True)
        ]
        return self.pruned(images)

    def layout(self, ids: Any) -> list[Span]:
        return spans(ids, self.config.image_token_index, self._kept)

    def extent(self, feature: Any) -> int:
        return self._count

    def extents_in(self, images: Sequence[Span]) -> list[int]:
        return [self._count] * len(images)
