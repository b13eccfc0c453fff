"""Qwen3-VL (ViT with deepstack, M-RoPE) on the stock Hugging Face class, frozen."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers import Qwen3VLProcessor as StockProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tprl.lvlm.blueprint import byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import Seen
from tprl.lvlm.loading import WithoutVideo
from tprl.lvlm.qwen2_5_vl import CHAT, IMAGE, MARKS, VIDEO, Qwen25VL
from tprl.types import Encoded, Prompt


class ImageOnly(WithoutVideo, StockProcessor):
    """Images and text."""


class Qwen3VL(Qwen25VL):
    """A frozen Qwen3-VL; arguments as of `FrozenLVLM`.

    The first layers of the language model add features of deeper vision layers to the visual tokens: a token that goes
    takes its own with it.
    """

    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen3_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(MARKS, image_token=IMAGE, video_token=VIDEO)
        image, video, start, end = token_ids(tokenizer, IMAGE, VIDEO, *MARKS[2:])
        config = Qwen3VLConfig(
            vision_config={
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 48,
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            },
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
            },
            image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        )  # fmt: skip
        images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 64)
        model = random_weights(Qwen3VLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)

    def _seen(self, out: Any, views: list[tuple[tuple[int, int], ...]]) -> Seen:
        layers = zip(*out.deepstack_features, strict=True)
        return Seen(list(out.pooler_output), views, {}, [torch.cat(list(features), -1) for features in layers])

    def reads(self, prompt: Prompt, answer: Int[Tensor, "B A"] | None = None) -> dict[str, Any]:
        """Ids and features: embeddings alone would lose the deepstack features, without any error."""
        if prompt.deep is None:  # no image in the batch
            return super().reads(prompt, answer)
        gone = (prompt.input_ids == self.image_token) & ~prompt.visual  # the left padding, once image columns
        ids = prompt.input_ids.masked_fill(gone, self.tokenizer.pad_token_id)
        ids = ids if answer is None else torch.cat([ids, answer], 1)
        rows = range(len(ids))
        deep = [prompt.deep[row][prompt.visual[row]].split(self.width, -1) for row in rows]
        features = BaseModelOutputWithDeepstackFeatures(
            pooler_output=[prompt.embeds[row][prompt.visual[row]] for row in rows],  # type: ignore[arg-type]
            deepstack_features=[list(layer) for layer in zip(*deep, strict=True)],  # type: ignore[arg-type]
        )
        return {"input_ids": ids, "mm_encoder_outputs": {"image": features}}

    def _deep(self, encoded: Encoded, width: int) -> dict[str, Any]:
        if encoded.deep is None:
            return {}
        visual = torch.zeros_like(encoded.attention)
        b, v = encoded.visual_mask.nonzero(as_tuple=True)
        visual[b, encoded.visual_at[b, v]] = True
        padded = torch.nn.functional.pad(visual, (0, width))
        return {"visual_pos_masks": padded, "deepstack_visual_embeds": encoded.deep[visual].split(self.width, -1)}
