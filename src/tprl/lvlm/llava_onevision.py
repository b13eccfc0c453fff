"""LLaVA-OneVision (SigLIP; crops of an image that is alone in its prompt) on the stock Hugging Face
class, frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tprl.errors import UserError
from tprl.lvlm.blueprint import (
    SMALL_CLIP,
    SMALL_TEXT,
    byte_tokenizer,
    random_weights,
    token_ids,
)
from tprl.lvlm.llava import feature_layers
from tprl.lvlm.llava_next import LlavaNext
from tprl.lvlm.loading import WithoutVideo, image_only
from tprl.lvlm.standing import RECEIVED, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, layer_of, query_key, received_attention
from tprl.types import Box, Sample

CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }} {% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}{% for part in turn.content %}"
    "{% if part.type == 'text' %}\n{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LlavaOnevision(LlavaNext):
    """A frozen LLaVA-OneVision; arguments as of `FrozenLVLM`.

    An image that is alone in its prompt is a small view and crops, as LLaVA-NeXT's; several images
    are one view each, padded to squares. A newline token ends each row of crops, and each single
    view. Crops with more tokens than `vision_aspect_ratio` allows are interpolated after the
    projector; extras are interpolated alike, so `project` of vision features is then near the
    token, not equal to it.
    """

    model_type = "llava_onevision"
    substitutes = RECEIVED
    pixel_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    by_company = True

    def __init__(
        self, pretrained: str | None, name: str = "llava_onevision", **options: Any
    ) -> None:
        super().__init__(pretrained, name, **options)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(
            ["<|im_start|>", "<|im_end|>"], image_token="<image>", video_token="<video>"
        )
        image, video = token_ids(tokenizer, "<image>", "<video>")
        # Every layout of crops, at tiny sizes: single, wide, high and square.
        pinpoints = [[24, 24], [24, 48], [48, 24], [48, 48]]
        tower = SiglipVisionConfig(**SMALL_CLIP, image_size=24, patch_size=8)
        # The published towers have no pooling head either.
        tower.vision_use_head = False
        config = LlavaOnevisionConfig(
            vision_config=tower,
            text_config=Qwen2Config(vocab_size=len(tokenizer), **SMALL_TEXT),
            image_token_index=image,
            video_token_index=video,
            image_grid_pinpoints=pinpoints,
        )
        images = LlavaOnevisionImageProcessorPil(
            size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints
        )
        model = random_weights(LlavaOnevisionForConditionalGeneration(config), tokenizer)
        settings = _settings(config)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT, **settings)

    @classmethod
    def load_processor(cls, source: str) -> Any:
        settings = _settings(AutoConfig.from_pretrained(source))
        return image_only(ImageOnly, source, **settings)

    def processor_settings(self) -> dict[str, Any]:
        config = self.model.config
        return _settings(config) | {"image_grid_pinpoints": config.image_grid_pinpoints}

    def pixels_of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The stock processor says how many images each prompt has; here each image says whether it
        is alone."""
        # [I] alone or in company decides between crops and a single padded view.
        counts = torch.as_tensor(inputs["batch_num_images"])
        return {
            "pixel_values": inputs["pixel_values"],
            "image_sizes": inputs["image_sizes"],
            "alone": (counts == 1).repeat_interleave(counts),
        }

    def seen_boxes(self, sample: Sample) -> tuple[Box, ...]:
        if len(sample.images) == 1:
            return super().seen_boxes(sample)
        return tuple(_square(*image.size) for image in sample.images)

    def _crops(self, pixels: Mapping[str, Any]) -> list[int]:
        # The processor pads every image to the same number of crops; in company only the view is
        # read.
        pairs = zip(super()._crops(pixels), pixels["alone"].tolist(), strict=True)
        return [count if alone else 1 for count, alone in pairs]

    def _tokens(
        self, values: Float[Tensor, "J N 3 Y X"], pixels: Mapping[str, Any]
    ) -> list[Float[Tensor, "_ D"]]:
        # Part by part: the stock class is told the images of each prompt, and these are any images.
        parts, counts = self.model.model, self._crops(pixels)
        tiles = [crops[:count] for crops, count in zip(values, counts, strict=True)]
        states = parts.vision_tower(torch.cat(tiles), output_hidden_states=True).hidden_states
        # The strategy "default" would drop a CLS token, which SigLIP does not have.
        skip = int(self.model.config.vision_feature_select_strategy == "default")
        layers = [states[layer][:, skip:] for layer in feature_layers(self.model.config)]
        features = self.project(torch.cat(layers, -1)).split(counts)
        return list(self._packed(features, pixels["image_sizes"], parts.image_newline))

    def _packed(
        self,
        features: Sequence[Float[Tensor, "_ N C"]],
        sizes: Int[Tensor, "J 2"],
        newline: Float[Tensor, " C"],
    ) -> Sequence[Float[Tensor, "_ C"]]:
        return self.model.model.pack_image_features(
            features,
            sizes,
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )[0]

    def _sources(self, extras: frozenset[str]) -> dict[str, nn.Module]:
        config, parts = self.model.config, self.model.model
        # Extras are read from one layer of patches; anything else has no agreed meaning.
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not extras:
            return {}
        if not isinstance(layer, int) or strategy != "full":
            raise UserError(
                f"{self.name} cannot provide {sorted(extras)}: it reads features of layer {layer} "
                f"by strategy {strategy}, and known is one layer by strategy full."
            )
        layers = parts.vision_tower.encoder.layers
        last = layer_of(layer, len(layers))
        middle = layers[object_layer(range(last + 1))].self_attn
        return reading(extras, layers[last].self_attn, middle, parts.multi_modal_projector)

    def _attention(self, layer: Any, call: Call) -> Float[Tensor, "I N"]:
        """Attention that each patch of a crop receives: the tower has no CLS token."""
        return received_attention(*query_key(layer, call.x))

    def _keys(self, layer: Any, call: Call) -> Float[Tensor, "I N C"]:
        return keys_of(layer, call.x)


def _settings(config: Any) -> dict[str, Any]:
    """What of the processor decides how many placeholders it writes."""
    vision = config.vision_config
    return {
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def _square(width: int, height: int) -> Box:
    """What the view of an image among others shows: the image, padded evenly to a square."""
    # The box reaches outside the image where the square is padding.
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return float(-left), float(-top), float(side - left), float(side - top)


class ImageOnly(WithoutVideo, LlavaOnevisionProcessor):
    """Images and text."""
