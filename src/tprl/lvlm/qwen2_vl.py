"""Qwen2-VL (ViT, 2x2 merge, M-RoPE) on the stock Hugging Face class, frozen."""

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers import Qwen2VLProcessor as StockProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tprl.lvlm.blueprint import byte_tokenizer, random_weights, token_ids
from tprl.lvlm.loading import WithoutVideo
from tprl.lvlm.qwen2_5_vl import CHAT, IMAGE, MARKS, VIDEO, Qwen25VL


class ImageOnly(WithoutVideo, StockProcessor):
    """Images and text."""


class Qwen2VL(Qwen25VL):
    """A frozen Qwen2-VL, or a GUI model built on it; arguments as of `FrozenLVLM`."""

    model_type = "qwen2_vl"
    windows = False
    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen2_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(MARKS, image_token=IMAGE, video_token=VIDEO)
        image, video, start, end = token_ids(tokenizer, IMAGE, VIDEO, *MARKS[2:])
        config = Qwen2VLConfig(
            vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2},
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
            },
            image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        )  # fmt: skip
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64)
        model = random_weights(Qwen2VLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)
