"""LLaVA (CLIP or SigLIP tower, MLP projector, Llama-like LM) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.lvlm.blueprint import USER_ASSISTANT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM, Seen


class Llava(FrozenLVLM):
    """A frozen LLaVA-1.5; arguments as of `FrozenLVLM`."""

    model_type = "llava"
    known_extras = frozenset({"cls_attention", "vision_features"})

    def __init__(
        self,
        pretrained: str | None,
        name: str = "llava",
        **options: Any,
    ) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        return LVLMShape.from_llava(self.model.config)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer([], image_token="<image>")
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096,
        )  # fmt: skip
        (image_token,) = token_ids(tokenizer, "<image>")
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-2)
        )
        images = CLIPImageProcessorPil(size={"height": 48, "width": 48}, crop_size={"height": 48, "width": 48})
        processor = LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=USER_ASSISTANT,
        )  # fmt: skip
        return random_weights(model, tokenizer), processor

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        out = self.model.model.vision_tower(values, output_hidden_states=True)
        layer = self.model.config.vision_feature_layer
        skip = int(self.model.config.vision_feature_select_strategy == "default")
        features = out.hidden_states[layer][:, skip:]
        found: dict[str, list[Tensor]] = {}
        if "vision_features" in extras:
            found["vision_features"] = list(features)
        if "cls_attention" in extras:
            if not skip:
                raise UserError(f"{self.name}'s vision tower has no CLS token, so there is no CLS attention to read.")
            found["cls_attention"] = list(self._cls_attention(out.hidden_states, layer))
        side = round(features.shape[1] ** 0.5)
        return Seen(list(self.project(features)), [((side, side),)] * len(features), found)

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.multi_modal_projector(vision_features)

    def _cls_attention(self, hidden: Sequence[Tensor], layer: int) -> Float[Tensor, "I N"]:
        """Mean over heads of softmax attention CLS -> patch in the layer whose output is `hidden[layer]`.

        Recomputed for the one row that is needed, so that the tower keeps SDPA.
        """
        # hidden[0] is the embedding: counted from the front, hidden[n] is made by layer n - 1.
        block = self.model.model.vision_tower.encoder.layers[layer - 1 if layer > 0 else layer]
        x = block.layer_norm1(hidden[layer - 1])
        heads = block.self_attn.num_heads
        query = block.self_attn.q_proj(x[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
        keys = block.self_attn.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        row = (query @ keys.mT).float() * query.shape[-1] ** -0.5
        return row.softmax(-1).mean(1)[:, 0, 1:]
