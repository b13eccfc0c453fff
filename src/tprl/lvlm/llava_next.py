"""LLaVA-NeXT (a small view and high-resolution crops, newline tokens) on the stock Hugging Face
class, frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_sides, check_size
from tprl.lvlm.blueprint import (
    SMALL_CLIP,
    SMALL_TEXT,
    USER_ASSISTANT,
    byte_tokenizer,
    random_weights,
    token_ids,
)
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import clip_settings, completed
from tprl.lvlm.standing import ATTENTIONS, WITH_CLS, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, cls_attention, in_place, layer_of, overheard, query_key


class LlavaNext(FrozenLVLM):
    """A frozen LLaVA-NeXT; arguments as of `FrozenLVLM`.

    The newline token after every row of the crops stays with its row: it is not counted, and never
    pruned.
    """

    model_type = "llava_next"
    substitutes = WITH_CLS
    pixel_inputs = ("pixel_values", "image_sizes")
    bounds = frozenset({"max_tiles"})

    def __init__(
        self,
        pretrained: str | None,
        name: str = "llava_next",
        **options: Any,
    ) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        return LVLMShape.from_llava(self.model.config)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer([], image_token="<image>")
        (image_token,) = token_ids(tokenizer, "<image>")
        vision = CLIPVisionConfig(**SMALL_CLIP, image_size=24, patch_size=8)
        text = LlamaConfig(vocab_size=len(tokenizer), **SMALL_TEXT)
        pinpoints = [[24, 48], [48, 24], [48, 48]]
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            image_grid_pinpoints=pinpoints,
        )
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 24},
            crop_size={"height": 24, "width": 24},
            image_grid_pinpoints=pinpoints,
        )
        processor = LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=USER_ASSISTANT,
        )
        return random_weights(LlavaNextForConditionalGeneration(config), tokenizer), processor

    @classmethod
    def load_processor(cls, source: str) -> Any:
        return completed(super().load_processor(source), source)

    def processor_settings(self) -> dict[str, Any]:
        pinpoints = self.model.config.image_grid_pinpoints
        return clip_settings(self.model.config) | {"image_grid_pinpoints": pinpoints}

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        config = self.model.config
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # The stock class packs blank features: how many it cuts off depends on the image's shape.
        blank = [torch.zeros(count, patches, 1) for count in self._crops(pixels)]
        packed = self._packed(blank, pixels["image_sizes"], torch.zeros(1))
        return [len(tokens) for tokens in packed]

    def limit_tiles(self, most: int) -> None:
        side, config = self.model.config.vision_config.image_size, self.model.config
        # A layout is a canvas (height, width); its area in tiles bounds the number of crops.
        within = [
            [high, wide]
            for high, wide in config.image_grid_pinpoints
            if high * wide <= most * side**2
        ]
        if not within:
            least = min(high * wide for high, wide in config.image_grid_pinpoints) // side**2
            raise UserError(
                f"model.max_tiles={most} is less than the {least} tiles of "
                f"the smallest layout of {self.name}: give {least} or more."
            )
        config.image_grid_pinpoints = self.processor.image_processor.image_grid_pinpoints = within

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        self._check_crops(values, pixels)
        modules = self._sources(extras)
        # The newline is a bare parameter: offloading brings it here only while the module runs.
        with overheard(modules) as calls, in_place(self.model.model):
            tokens = self._tokens(values, pixels)
            newline = self.model.model.image_newline.to(tokens[0])
        features = {name: call.x for name, call in calls.items()}
        for name in ATTENTIONS & calls.keys():
            features[name] = self._attention(modules[name], calls[name])
        if "last_keys" in calls:
            features["last_keys"] = self._keys(modules["last_keys"], calls["last_keys"])
        # The stock class returns newlines among the tokens: what equals the newline is one.
        separators = [(image == newline).all(-1) for image in tokens]
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        # Extras go through the same packing as the tokens, so that each stays beside its own.
        packed = {name: self._pack(value, pixels, separators) for name, value in features.items()}
        tiles = [((side, side),) * count for count in self._crops(pixels)]
        return Seen(
            tokens, [_views(rows, side) for rows in separators], tiles, packed, None, separators
        )

    def _tokens(
        self, values: Float[Tensor, "J N 3 Y X"], pixels: Mapping[str, Any]
    ) -> list[Float[Tensor, "_ D"]]:
        """Tokens of each image with its newlines, by the stock class."""
        out = self.model.model.get_image_features(
            values, image_sizes=pixels["image_sizes"], return_dict=True
        )
        return list(out.pooler_output)

    def _attention(self, layer: Any, call: Call) -> Float[Tensor, "I N"]:
        """Attention of the CLS token of every crop to its patches."""
        return cls_attention(*query_key(layer, call.x, slice(0, 1)))

    def _keys(self, layer: Any, call: Call) -> Float[Tensor, "I N C"]:
        """Keys of the patches of every crop."""
        return keys_of(layer, call.x)[:, 1:]

    def _crops(self, pixels: Mapping[str, Any]) -> list[int]:
        """Crops of each image, the small view included."""
        config = self.model.config
        side = config.vision_config.image_size
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, side)
            for size in pixels["image_sizes"]
        ]

    def _packed(
        self,
        features: Sequence[Float[Tensor, "_ N C"]],
        sizes: Int[Tensor, "J 2"],
        newline: Float[Tensor, " C"],
    ) -> Sequence[Float[Tensor, "_ C"]]:
        """Features of the crops of each image as the stock class puts them into a row."""
        strategy = self.model.config.vision_feature_select_strategy
        return self.model.model.pack_image_features(
            features, sizes, strategy, image_newline=newline
        )[0]

    def _check_crops(self, values: Float[Tensor, "J N 3 Y X"], pixels: Mapping[str, Any]) -> None:
        """The stock class drops crops that it does not expect; those of zeros alone are padding."""
        side = self.model.config.vision_config.image_size
        check_sides(self.name, "crops", values, (side, side))
        # Crops that are missing, or more of them than the stock class will read.
        for crops, count in zip(values, self._crops(pixels), strict=True):
            beyond = int(crops[count:].flatten(1).any(1).sum())
            produced = len(crops[:count]) + beyond
            check_size(self.name, "a number of crops", [produced], [count], self.remedy)

    def _sources(self, extras: frozenset[str]) -> dict[str, nn.Module]:
        """The module whose input each of the extras is read from."""
        config, parts = self.model.config, self.model.model
        if not extras:
            return {}
        if (
            not isinstance(config.vision_feature_layer, int)
            or config.vision_feature_select_strategy != "default"
        ):
            raise UserError(
                f"{self.name} cannot provide {sorted(extras)}: it reads "
                f"features of layer {config.vision_feature_layer} by strategy "
                f"{config.vision_feature_select_strategy}, and known is one "
                "layer by strategy default, of a tower with a CLS token."
            )
        # Attention is that of the layer whose output is read, features are the projector's input.
        layers = parts.vision_tower.encoder.layers
        last = layer_of(config.vision_feature_layer, len(layers))
        middle = layers[object_layer(range(last + 1))].self_attn
        return reading(extras, layers[last].self_attn, middle, parts.multi_modal_projector)

    def _pack(
        self,
        values: Float[Tensor, "I N ..."],
        pixels: Mapping[str, Any],
        separators: Sequence[Bool[Tensor, " _"]],
    ) -> list[Float[Tensor, "_ ..."]]:
        """Values of the patches of all crops in the order of each image's visual tokens, without
        separators."""
        # Numbers per patch are packed as features of one channel: [I N 1].
        rows = values if values.ndim == 3 else values.unsqueeze(-1)
        packed = self._packed(
            rows.split(self._crops(pixels)), pixels["image_sizes"], rows.new_zeros(rows.shape[-1])
        )
        return [
            x[~newline.to(x.device)].flatten(1 if values.ndim == 3 else 0)
            for x, newline in zip(packed, separators, strict=True)
        ]

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.multi_modal_projector(vision_features)


def _views(separators: Tensor, side: int) -> tuple[tuple[int, int], ...]:
    """The small view, and the high-resolution one whose rows end with separators (a small image has
    only the first)."""
    crops = separators[side * side :]
    rows = int(crops.sum())
    columns = int(len(crops) / max(rows, 1)) - 1
    return ((side, side), (rows, columns)) if columns else ((side, side),)
