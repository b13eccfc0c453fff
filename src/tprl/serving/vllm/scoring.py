"""LLaVA-1.5 in vLLM as a reader of tokens that somebody else has kept: see `serving.engine`."""

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.places import Span, spans
from tprl.serving.vllm.model import Pruned


class Info(LlavaProcessingInfo):
    """Images come as embeddings with places."""

    def _get_expected_hidden_size(self) -> int | None:
        return super()._get_expected_hidden_size() + 2


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder
)
class TPRLLlavaForScoring(Pruned, LlavaForConditionalGeneration):
    """Stock LLaVA-1.5 that reads embeddings at their places; pixels are refused by its caller."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        skip = int(self.config.vision_feature_select_strategy == "default")
        self._count = self.vision_tower.vision_model.embeddings.num_positions - skip

    def embed_multimodal(self, **kwargs: object) -> Any:
        # [K F] of each image. The stock class takes images of one step only if they have equally
        # many tokens, and here the ratios of a policy in training meet.
        embeds: Any = kwargs.get("image_embeds", ())
        return list(embeds)

    def layout(self, ids: Any) -> list[Span]:
        return spans(ids, self.config.image_token_index)

    def extent(self, feature: Any) -> int:
        return self._count

    def extents_in(self, images: Sequence[Span]) -> list[int]:
        return [self._count] * len(images)
