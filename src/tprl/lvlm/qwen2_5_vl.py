"""Qwen2.5-VL (window-attention ViT, 2x2 merge, M-RoPE) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tprl.lvlm.blueprint import byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM, Seen
from tprl.lvlm.loading import WithoutVideo, chat_template

CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class ImageOnly(WithoutVideo, Qwen2_5_VLProcessor):
    """Images and text."""


class Qwen25VL(FrozenLVLM):
    """A frozen Qwen2.5-VL; arguments as of `FrozenLVLM`."""

    model_type = "qwen2_5_vl"
    pixel_inputs = ("pixel_values", "image_grid_thw")
    processor_class: type[Any] = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen2_5_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(MARKS, image_token=IMAGE, video_token=VIDEO)
        image, video, start, end = token_ids(tokenizer, IMAGE, VIDEO, *MARKS[2:])
        config = Qwen2_5_VLConfig(
            vision_config={
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 48,
                "window_size": 56, "fullatt_block_indexes": [1],
            },
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
            },
            image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        )  # fmt: skip
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64)
        model = random_weights(Qwen2_5_VLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)

    @classmethod
    def load_processor(cls, source: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source)
        images = AutoImageProcessor.from_pretrained(source, backend="pil")
        template = chat_template(cls.processor_class, source, tokenizer)
        return cls.processor_class(images, tokenizer, None, chat_template=template)

    def rows_per_image(self, pixels: Mapping[str, Any]) -> list[int]:
        return pixels["image_grid_thw"].prod(1).tolist()

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        grid = pixels["image_grid_thw"].to(self.device)
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        out = self.model.model.get_image_features(values, image_grid_thw=grid, return_dict=True)
        merge = self.model.config.vision_config.spatial_merge_size
        return self._seen(out, [((h // merge, w // merge),) for _, h, w in grid.tolist()])

    def _seen(self, out: Any, views: list[tuple[tuple[int, int], ...]]) -> Seen:
        return Seen(list(out.pooler_output), views, {})

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.visual.merger(vision_features)

    def positions(
        self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"], inputs: Mapping[str, Any]
    ) -> Int[Tensor, "P B S"]:
        if "image_grid_thw" not in inputs:  # text only
            return super().positions(ids, attention, inputs).expand(3, -1, -1)
        kinds, grid = (ids == self.image_token).int(), inputs["image_grid_thw"].to(self.device)
        found, _ = self.model.model.get_rope_index(ids, kinds, grid, attention_mask=attention.long())
        return (found.to(self.device) * attention).long()
