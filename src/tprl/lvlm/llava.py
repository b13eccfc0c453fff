"""LLaVA (CLIP or SigLIP tower, MLP projector, Llama-like LM) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.lvlm.blueprint import USER_ASSISTANT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.clip_text import ClipText
from tprl.lvlm.frozen import FrozenLVLM, Seen
from tprl.types import Encoded

TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(FrozenLVLM):
    """A frozen LLaVA-1.5; other arguments as of `FrozenLVLM`.

    Args:
        clip: the CLIP model that its vision tower is from (a folder or hub id), for clip_relevance; None: a folder
            `clip/` beside the weights.
    """

    model_type = "llava"
    known_extras = frozenset(
        {
            "cls_attention",  # [B V] mean over heads of the attention CLS -> patch in the layer that makes the features
            "vision_features",  # [B V C] what the projector reads
            "cls_feature",  # [B V C] the CLS token beside them, the same for all tokens of an image
            "vision_keys",  # [B V c] mean over heads of that layer's keys
            "last_cls_attention",  # [B V] CLS -> patch in the tower's last layer, heads not split (PruMerge)
            "last_keys",  # [B V C] that layer's keys
            "middle_attention",  # [B V] attention received in the "object" layer: mean over heads and queries (HiPrune)
            "last_attention",  # [B V] the same in the last layer
            "clip_relevance",  # [B V] cosine of CLIP's image and text embeddings, mean over 77-token segments
        }
    )

    def __init__(
        self,
        pretrained: str | None,
        name: str = "llava",
        clip: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pretrained, name, **options)
        self.clip = clip

    clip: str | None = None

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
        if not skip and extras - {"vision_features"}:
            raise UserError(f"{self.name}'s vision tower has no CLS token, so there is no CLS attention to read.")
        found = {name: list(self._extra(name, out.hidden_states, layer)) for name in sorted(extras)}
        side = round(features.shape[1] ** 0.5)
        return Seen(list(self.project(features)), [((side, side),)] * len(features), found)

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.multi_modal_projector(vision_features)

    def _hold(self, model: Any, processor: Any, name: str) -> None:
        tower, layer = model.config.vision_config.model_type, model.config.vision_feature_layer
        if tower not in TOWERS or not isinstance(layer, int):
            raise UserError(
                f"this LLaVA has a vision tower of type {tower} and features of layer {layer}: known are one layer of "
                f"{' or '.join(TOWERS)}."
            )
        super()._hold(model, processor, name)

    def relate(self, encoded: Encoded, questions: Sequence[str]) -> None:
        if "clip_relevance" in encoded.extras:
            found = self._clip_text.relevance(encoded.extras["clip_relevance"], questions)
            encoded.extras["clip_relevance"] = found * encoded.visual_mask

    @cached_property
    def _clip_text(self) -> ClipText:
        source = self.model.name_or_path
        beside = Path(source) / "clip" if source and (Path(source) / "clip").is_dir() else None
        return ClipText(self.clip or beside, self.device)

    def _extra(self, name: str, hidden: Sequence[Tensor], layer: int) -> Float[Tensor, "I N ..."]:
        """One of `known_extras`, per image; clip_relevance is finished by `relate`."""
        # hidden[0] is the embedding: counted from the front, hidden[n] is made by layer n - 1.
        feature, last = (layer - 1 if layer > 0 else len(hidden) - 1 + layer), len(hidden) - 2
        match name:
            case "vision_features" | "clip_relevance":
                return hidden[layer][:, int(self.model.config.vision_feature_select_strategy == "default") :]
            case "cls_feature":
                return hidden[layer][:, :1].expand(-1, hidden[layer].shape[1] - 1, -1)
            case "cls_attention":
                return self._attention(hidden, feature, slice(0, 1))[..., 0, 1:].mean(1)
            case "vision_keys":
                return self._query_key(hidden, feature, slice(0, 0))[1].mean(1)[:, 1:]
            case "last_keys":
                return self._query_key(hidden, last, slice(0, 0), heads=1)[1][:, 0, 1:]
            case "last_cls_attention":
                return self._attention(hidden, last, slice(0, 1), heads=1)[:, 0, 0, 1:]
            case "middle_attention":
                return self._attention(hidden, round(last * 9 / 23), slice(None)).mean((1, 2))[:, 1:]
            case "last_attention":
                return self._attention(hidden, last, slice(None)).mean((1, 2))[:, 1:]
        raise KeyError(name)

    def _attention(
        self, hidden: Sequence[Tensor], layer: int, queries: slice, heads: int | None = None
    ) -> Float[Tensor, "I H Q M"]:
        """Softmax attention of these queries in a layer, in float32; recomputed for the rows that are needed, so that
        the tower keeps SDPA."""
        query, keys = self._query_key(hidden, layer, queries, heads)
        return ((query @ keys.mT).float() * query.shape[-1] ** -0.5).softmax(-1)

    def _query_key(
        self, hidden: Sequence[Tensor], layer: int, queries: slice, heads: int | None = None
    ) -> tuple[Float[Tensor, "I H Q c"], Float[Tensor, "I H M c"]]:
        """Queries and keys of a layer of the tower (0-based), split into its heads or into `heads`."""
        block = self.model.model.vision_tower.encoder.layers[layer]
        x = block.layer_norm1(hidden[layer])
        count = heads or block.self_attn.num_heads
        query = block.self_attn.q_proj(x[:, queries]).unflatten(-1, (count, -1)).transpose(1, 2)
        return query, block.self_attn.k_proj(x).unflatten(-1, (count, -1)).transpose(1, 2)
