"""Qwen3.5 (ViT, M-RoPE, three layers of linear attention before each of full attention) on the
stock Hugging Face class, frozen."""

from typing import Any

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from tprl.cost import LVLMShape
from tprl.lvlm.blueprint import random_weights
from tprl.lvlm.qwen2_5_vl import Qwen25VL, small_text
from tprl.lvlm.qwen3_vl import SMALL_TOWER, ImageOnly, small_processor


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
        config = Qwen3_5Config(vision_config=dict(SMALL_TOWER), **text)
        model = random_weights(Qwen3_5ForConditionalGeneration(config), tokenizer)
        return model, small_processor(tokenizer)
