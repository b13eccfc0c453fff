"""LLaVA (CLIP or SigLIP tower, MLP projector, Llama-like LM) on the stock Hugging Face class,
frozen."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_sides
from tprl.lvlm.blueprint import (
    SMALL_CLIP,
    SMALL_TEXT,
    USER_ASSISTANT,
    byte_tokenizer,
    random_weights,
    token_ids,
)
from tprl.lvlm.clip_text import ClipText
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import clip_settings, completed
from tprl.lvlm.patches import cells
from tprl.lvlm.shapes import crop_box
from tprl.lvlm.towers import StockBlock, cls_attention, layer_of, query_key, received_attention
from tprl.types import Box, Encoded, Tower

TOWERS = ("clip_vision_model", "siglip_vision_model")


def feature_layers(config: Any) -> list[int]:
    """The layers of the vision tower whose hidden states, side by side, the projector reads."""
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


class Llava(FrozenLVLM):
    """A frozen LLaVA-1.5; other arguments as of `FrozenLVLM`.

    Args:
        clip: the CLIP model that its vision tower is from (a folder or hub id), for clip_relevance;
            None: a folder `clip/` beside the weights.
    """

    model_type = "llava"
    known_extras = frozenset(
        {
            # [B V] mean over heads of the attention CLS -> patch in the layer that makes the
            # features
            "cls_attention",
            "vision_features",  # [B V C] what the projector reads
            "cls_feature",  # [B V C] the CLS token beside them, the same for all tokens of an image
            "vision_keys",  # [B V c] mean over heads of that layer's keys
            # [B V] CLS -> patch in the tower's last layer, heads not split (PruMerge)
            "last_cls_attention",
            "last_keys",  # [B V C] that layer's keys
            # [B V] attention received in the "object" layer: mean over heads and queries (HiPrune)
            "middle_attention",
            "last_attention",  # [B V] the same in the last layer
            # [B V C] patches as they enter the tower's first block; `Encoded.tower` is what follows
            "patch_embeds",
            # [B V 3 y x] those of the patch, as the processor made them; `Encoded.look` sees other
            # sizes
            "pixels",
            # [B V] cosine of CLIP's image and text embeddings, mean over 77-token segments
            "clip_relevance",
        }
    )
    derived, substitutes = frozenset(), {}

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
        vision = CLIPVisionConfig(**SMALL_CLIP, image_size=48, patch_size=8)
        text = LlamaConfig(vocab_size=len(tokenizer), **SMALL_TEXT)
        (image_token,) = token_ids(tokenizer, "<image>")
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=text,
                image_token_index=image_token,
                vision_feature_layer=-2,
            )
        )
        images = CLIPImageProcessorPil(
            size={"height": 48, "width": 48}, crop_size={"height": 48, "width": 48}
        )
        processor = LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=USER_ASSISTANT,
        )
        return random_weights(model, tokenizer), processor

    @classmethod
    def load_processor(cls, source: str) -> Any:
        return completed(super().load_processor(source), source)

    def processor_settings(self) -> dict[str, Any]:
        return clip_settings(self.model.config)

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        config = self.model.config
        vision = config.vision_config
        has_cls = vision.model_type == "clip_vision_model"
        dropped = config.vision_feature_select_strategy == "default"  # the first token, CLS or not
        count = (vision.image_size // vision.patch_size) ** 2 + has_cls - dropped
        return [count] * len(pixels["pixel_values"])

    def seen_box(self, width: int, height: int) -> Box:
        return crop_box(self.processor.image_processor, width, height)

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        side = self.model.config.vision_config.image_size
        check_sides(self.name, "images", values, (side, side))
        # [I M C] after every block; features and most extras are read off these.
        states = self.model.model.vision_tower(values, output_hidden_states=True).hidden_states
        layers, features = feature_layers(self.model.config), self._features(states)
        has_cls = self.model.config.vision_feature_select_strategy == "default"
        if not has_cls and extras - {"vision_features", "patch_embeds", "pixels"}:
            raise UserError(
                f"the vision tower of {self.name} has no CLS token whose attention could be read: "
                "use a pruner that reads projected tokens, e.g. divprune."
            )
        # One tensor per image of each extra: [N ...].
        inside = sorted(extras - {"pixels"})
        extra_features = {
            name: list(self._extra(name, states, layers[-1], features)) for name in inside
        }
        if "pixels" in extras:
            extra_features["pixels"] = list(
                cells(pixels["pixel_values"].to(self.device), self._patch)
            )
        # Methods that merge inside the tower run its blocks themselves, from the embedding on.
        tower = self._tower(states[0], layers) if "patch_embeds" in extras else None
        side = round(features.shape[1] ** 0.5)
        views = [((side, side),)] * len(features)
        return Seen(list(self.project(features)), views, views, extra_features, tower=tower)

    @torch.no_grad()
    def look_again(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> tuple[list[Tensor], None]:
        """Tokens of images of any whole number of patches, by the stock tower's interpolated
        positions."""
        tokens: dict[int, Tensor] = {}
        # Images of one size share a batch, of no more pixel values than memory was found to hold.
        for shape in {image.shape for image in images}:
            numbers = [number for number, image in enumerate(images) if image.shape == shape]
            most = max(1, self.values_at_once // shape.numel())
            for some in (numbers[start : start + most] for start in range(0, len(numbers), most)):
                values = torch.stack([images[number] for number in some])
                out = self.model.model.vision_tower(
                    values.to(self.device, self.model.dtype),
                    output_hidden_states=True,
                    interpolate_pos_encoding=True,
                )
                tokens |= zip(some, self.project(self._features(out.hidden_states)), strict=True)
        return [tokens[number] for number in range(len(images))], None

    @property
    def _patch(self) -> int:
        """Pixels a side of a patch."""
        return self.model.config.vision_config.patch_size

    def _features(self, states: Sequence[Float[Tensor, "I M C"]]) -> Float[Tensor, "I N F"]:
        """What the projector reads, of the tower's hidden states."""
        skip = int(self.model.config.vision_feature_select_strategy == "default")
        return torch.cat(
            [states[layer][:, skip:] for layer in feature_layers(self.model.config)], -1
        )

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.multi_modal_projector(vision_features)

    def _hold(self, model: Any, processor: Any, name: str) -> None:
        tower = model.config.vision_config.model_type
        if tower not in TOWERS:
            raise UserError(
                f"this LLaVA has a vision tower of type {tower}, and known "
                f"are {' and '.join(TOWERS)}: use a checkpoint with one of "
                "those, e.g. model.pretrained=llava-hf/llava-1.5-7b-hf."
            )
        super()._hold(model, processor, name)

    def relate(self, encoded: Encoded) -> None:
        relevance = self._clip_text.relevance(encoded.extras["clip_relevance"], encoded.questions)
        encoded.extras["clip_relevance"] = relevance * encoded.visual_mask

    @cached_property
    def _clip_text(self) -> ClipText:
        source = self.model.name_or_path
        beside = Path(source) / "clip" if source and (Path(source) / "clip").is_dir() else None
        return ClipText(self.clip or beside, self.device)

    def _tower(self, start: Float[Tensor, "I M C"], layers: Sequence[int]) -> Tower:
        """The blocks that make the features, and the first block's CLS token, the same for every
        image."""
        kind = self.model.config.vision_config.model_type
        strategy = self.model.config.vision_feature_select_strategy
        # Merging changes how many tokens there are: they must be patches, in one layer's features.
        has_cls = kind == "clip_vision_model"
        if has_cls != (strategy == "default"):
            raise UserError(
                f"{self.name} selects the features of its {kind} by "
                f"{strategy!r}, so its visual tokens are not all patches and "
                "only those, and none can merge inside the tower: use divprune."
            )
        if len(layers) > 1:
            raise UserError(
                f"{self.name} puts the features of layers {list(layers)} side by side, and tokens "
                "that merge inside the tower have those of the last one only: use divprune."
            )
        # Blocks behind the one that makes the features change nothing.
        stack = self.model.model.vision_tower.encoder.layers
        blocks = [StockBlock(block) for block in stack[: layer_of(layers[0], len(stack)) + 1]]
        return Tower(start[0, 0] if has_cls else None, blocks)

    def _extra(
        self, name: str, hidden: Sequence[Tensor], layer: int, features: Float[Tensor, "I N C"]
    ) -> Float[Tensor, "I N ..."]:
        """One of `known_extras`, per image, of the last `layer` that makes the features;
        clip_relevance is finished by `relate`."""
        layers = self.model.model.vision_tower.encoder.layers
        # `hidden[i]` is what block i reads, so that its attention can be computed from it alone.
        feature, last = layer_of(layer, len(layers)), len(layers) - 1
        skip = int(self.model.config.vision_feature_select_strategy == "default")

        # [I H Q c] and [I H M c] of a block, by its own norm and projections.
        def heads(number: int, queries: slice, count: int | None = None) -> tuple[Tensor, Tensor]:
            block = layers[number]
            return query_key(block.self_attn, block.layer_norm1(hidden[number]), queries, count)

        cls, everyone = slice(0, 1), slice(None)
        match name:
            case "vision_features":
                return features
            case "clip_relevance":
                return hidden[layer][:, skip:]
            case "patch_embeds":
                return hidden[0][:, skip:]
            case "cls_feature":
                return hidden[layer][:, :1].expand(-1, hidden[layer].shape[1] - 1, -1)
            case "cls_attention":
                return cls_attention(*heads(feature, cls))
            case "vision_keys":
                return heads(feature, cls)[1].mean(1)[:, 1:]
            case "last_keys":
                return heads(last, cls, 1)[1][:, 0, 1:]
            case "last_cls_attention":
                return cls_attention(*heads(last, cls, 1))
            case "middle_attention":
                return received_attention(*heads(round(last * 9 / 23), everyone))[:, 1:]
            case "last_attention":
                return received_attention(*heads(last, everyone))[:, 1:]
        raise KeyError(name)
