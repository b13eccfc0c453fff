"""InternVL3 (tiles and a thumbnail, pixel shuffle) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tprl.cost import LMShape, LVLMShape, VisionShape, unknown
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_sides, runs
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import WithoutVideo, image_only
from tprl.lvlm.standing import ATTENTIONS, WITH_CLS, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, cls_attention, joined_tiles, layer_of, overheard, split_heads

ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


class InternVL3(FrozenLVLM):
    """A frozen InternVL3; arguments as of `FrozenLVLM`."""

    model_type = "internvl"
    substitutes = WITH_CLS
    coordinates = "thousand"
    bounds = frozenset({"max_tiles"})

    def __init__(self, pretrained: str | None, name: str = "internvl3", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        config = self.model.config
        v, text = config.vision_config, LMShape.of(config.text_config)
        merge = round(1 / config.downsample_ratio)
        # With "full" CLS would be among the tokens; the pixel shuffle needs a square of patches.
        if (v.patch_size[0], config.vision_feature_select_strategy) != (v.patch_size[1], "default"):
            raise unknown(
                f"an InternVL with patches of {list(v.patch_size)} pixels and features selected by "
                f"{config.vision_feature_select_strategy!r} (it knows square patches and 'default')"
            )
        (rows, columns), layers = self._patches, v.num_hidden_layers
        vision = VisionShape(
            layers,
            v.hidden_size,
            v.intermediate_size,
            v.num_attention_heads,
            rows * columns,
            v.patch_size[0],
            v.num_channels,
            unused=layers - 1 - layer_of(config.vision_feature_layer, layers),
            merge=merge,
        )
        return LVLMShape(vision, (v.hidden_size * merge**2, text.width, text.width), text)

    @property
    def _patches(self) -> tuple[int, int]:
        """Rows and columns of the patches of a tile."""
        v = self.model.config.vision_config
        return v.image_size[0] // v.patch_size[0], v.image_size[1] // v.patch_size[1]

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], **ROLES)
        (context,) = token_ids(tokenizer, ROLES["context_image_token"])
        config = InternVLConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": [24, 24],
                "patch_size": [4, 4],
            },
            text_config={
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                **SMALL_TEXT,
            },
            image_token_id=context,
            image_seq_length=9,
        )
        images = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, max_patches=4)
        model = random_weights(InternVLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, image_seq_length=9, chat_template=CHAT)

    @classmethod
    def load_processor(cls, source: str) -> Any:
        return image_only(
            ImageOnly, source, image_seq_length=AutoConfig.from_pretrained(source).image_seq_length
        )

    def processor_settings(self) -> dict[str, Any]:
        # The pixel shuffle merges patches in both directions: by its ratio squared.
        rows, columns = self._patches
        merged = round(rows * columns * self.model.config.downsample_ratio**2)
        return {"image_seq_length": merged}

    def limit_tiles(self, most: int) -> None:
        images = self.processor.image_processor
        # `max_patches` counts tiles, though its name says patches.
        images.max_patches, images.min_patches = most, min(most, images.min_patches)

    def pixels_of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The stock processor does not say how many tiles an image has: as many as its run of
        tokens is long."""
        values, each = inputs["pixel_values"], self.processor_settings()["image_seq_length"]
        # (start, length) of every run of placeholders in the batch: one run is one image.
        images = chain.from_iterable(runs(inputs["input_ids"] == self.image_token))
        lengths = [length for _, length in images]
        if any(length % each for length in lengths) or sum(lengths) != each * len(values):
            raise UserError(
                f"the processor wrote runs of {lengths} image placeholders for {len(values)} "
                f"tiles, each of which makes {each} features: pass what one call of the processor "
                f"returned, complete, and {self.remedy}."
            )
        return {"pixel_values": values, "num_patches": [length // each for length in lengths]}

    def rows_per_image(self, pixels: Mapping[str, Any]) -> list[int]:
        return [int(count) for count in pixels["num_patches"]]

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        return [
            count * self.processor_settings()["image_seq_length"]
            for count in self.rows_per_image(pixels)
        ]

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        size = self.model.config.vision_config.image_size
        check_sides(self.name, "tiles", values, size)
        parts = self.model.model
        layers = parts.vision_tower.encoder.layer
        # Extras are inputs of modules on the way: CLS attention is computed from one of them.
        feature = layer_of(self.model.config.vision_feature_layer, len(layers))
        middle = layers[object_layer(range(feature + 1))].attention
        modules = reading(extras, layers[feature].attention, middle, parts.multi_modal_projector)
        # [I N D] tokens of all tiles, tile by tile.
        with overheard(modules) as calls:
            tiles = parts.get_image_features(values, return_dict=True).pooler_output
        features = {name: call.x for name, call in calls.items()}
        for name in ATTENTIONS & calls.keys():
            patches = self._attention(modules[name], calls[name])
            features[name] = self._by_token(patches.unsqueeze(-1)).squeeze(-1)
        if "last_keys" in calls:
            keys = keys_of(modules["last_keys"], calls["last_keys"].x)
            # without CLS, which is no token
            features["last_keys"] = self._by_token(keys[:, 1:])
        # Tokens of a tile are a square; those of an image are its tiles, one after the other.
        counts = self.rows_per_image(pixels)
        side = round(tiles.shape[1] ** 0.5)
        return Seen(
            joined_tiles(tiles, counts),
            [((side, side),) * n for n in counts],
            [(self._patches,) * n for n in counts],
            {name: joined_tiles(value, counts) for name, value in features.items()},
        )

    def _attention(self, layer: Any, call: Call) -> Float[Tensor, "I P"]:
        """CLS attention of the patches of each tile, before they are merged."""
        # CLS stands first. InternViT may normalize queries and keys before it splits the heads.
        query = split_heads(layer.q_norm(layer.q_proj(call.x[:, :1])), layer.num_heads)
        return cls_attention(
            query, split_heads(layer.k_norm(layer.k_proj(call.x)), layer.num_heads)
        )

    def _by_token(self, patches: Float[Tensor, "I P C"]) -> Float[Tensor, "I N C"]:
        """Means over the patches of every token of a tile: the pixel shuffle that makes tokens
        tells which are its."""
        # The shuffle of the features: its order is theirs, channels of a patch stay together.
        side = round(patches.shape[1] ** 0.5)
        shuffled = self.model.model.pixel_shuffle(
            patches.unflatten(1, (side, side)), scale_factor=self.model.config.downsample_ratio
        )
        # [I rows columns 4C] to a mean over the patches that share a token.
        return shuffled.flatten(1, 2).unflatten(-1, (-1, patches.shape[-1])).mean(-2)

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.multi_modal_projector(vision_features)


class ImageOnly(WithoutVideo, InternVLProcessor):
    """Images and text."""
