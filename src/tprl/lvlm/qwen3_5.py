"""Qwen3.5 (ViT, M-RoPE, three layers of linear attention before each of full attention) on the
stock Hugging Face class, frozen."""

from typing import Any

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tprl.cost import LVLMShape
from tprl.lvlm.blueprint import random_weights
from tprl.lvlm.qwen2_5_vl import CHAT, Qwen25VL, small_text
from tprl.lvlm.qwen3_vl import ImageOnly


class Qwen35(Qwen25VL):
    """A frozen Qwen3.5 of the dense kind, or a later model of its class; arguments as of
    `FrozenLVLM`.

    A layer of linear attention carries a state from token to token. A dropped token leaves no step
    in it, where a masked one would still let the state decay.
    """

    model_type = "qwen3_5"
    windows = False
    coordinates = "thousand"
    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen3_5", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        v = self.model.config.vision_config
        return self._shape(v.hidden_size, v.intermediate_size)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer, text = small_text()
        # A quarter of a head turns with its place, as in those that are published.
        text["text_config"]["rope_parameters"] = {
            "rope_type": "default",
            "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        }
        text["text_config"] |= {
            "head_dim": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
        }
        config = Qwen3_5Config(
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 48,
                "num_position_embeddings": 64,
            },
            **text,
        )
        images = Qwen2VLImageProcessorPil(
            patch_size=16, min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 64
        )
        model = random_weights(Qwen3_5ForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)
