"""Qwen2.5-VL in vLLM, pruned."""

from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.vllm.qwen import QwenInfo, QwenProcessor, QwenPruned


class Info(QwenInfo, Qwen2_5_VLProcessingInfo):
    """Counts of kept tokens."""


class Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """The question with every image."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TPRLQwen2_5_VLForConditionalGeneration(QwenPruned, Qwen2_5_VLForConditionalGeneration):
    """Stock Qwen2.5-VL that keeps `tprl_keep_ratio` of an image's tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.width = self.config.get_text_config().hidden_size
