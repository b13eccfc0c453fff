"""Qwen3-VL in vLLM, pruned: a token that goes takes what deeper layers would read of it along."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.vllm.qwen import QwenInfo, QwenProcessor, QwenPruned


class Info(QwenInfo, Qwen3VLProcessingInfo):
    """Counts of kept tokens."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # None is served, but the stock class looks for options of videos among those of known
        # modalities.
        return {**super().get_supported_mm_limits(), "video": 0}


class Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """The question with every image."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class TPRLQwen3VLForConditionalGeneration(QwenPruned, Qwen3VLForConditionalGeneration):
    """Stock Qwen3-VL that keeps `tprl_keep_ratio` of an image's tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.width = self.visual_dim
