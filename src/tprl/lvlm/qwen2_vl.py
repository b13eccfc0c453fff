"""Qwen2-VL (ViT, 2x2 merge, M-RoPE) on the stock Hugging Face class, frozen."""

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers import Qwen2VLProcessor as StockProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tprl.cost import LVLMShape
from tprl.lvlm.blueprint import random_weights
from tprl.lvlm.loading import WithoutVideo
from tprl.lvlm.qwen2_5_vl import CHAT, Qwen25VL, small_text


class ImageOnly(WithoutVideo, StockProcessor):
    """Images and text."""


class Qwen2VL(Qwen25VL):
    """A frozen Qwen2-VL, or a GUI model built on it; arguments as of `FrozenLVLM`."""

    model_type = "qwen2_vl"
    windows = False
    coordinates = "thousand"
    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen2_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        v = self.model.config.vision_config
        return self._shape(v.embed_dim, int(v.embed_dim * v.mlp_ratio))

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer, text = small_text()
        vision = {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2}
        config = Qwen2VLConfig(vision_config=vision, **text)
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64)
        model = random_weights(Qwen2VLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)
