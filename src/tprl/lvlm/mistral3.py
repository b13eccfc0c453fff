"""Mistral 3 (Pixtral tower for images of any grid, 2x2 merge) on the stock Hugging Face class,
frozen: Mistral Small 3.1 and later, Ministral 3."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral import image_processing_pil_pixtral as pil

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import processor_parts
from tprl.lvlm.patches import cells, whole
from tprl.lvlm.standing import ATTENTIONS, EVERY, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, layer_of, overheard, received_attention, rotated

CHAT = (
    "{% for turn in messages %}{% if turn.role == 'user' %}[INST]{% for part in turn.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{% for part in turn.content %}{{ part.text }}{% endfor %}</s>{% endif %}{% endfor %}"
)
MARKS = ("[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]")


def stock_processor() -> Any:
    """PixtralProcessor. Its module takes one function from the torchvision half of its image
    processor; the PIL half has the same."""
    # The PIL module stands in for the import only; a loaded torchvision half stays.
    half = "transformers.models.pixtral.image_processing_pixtral"
    loaded = sys.modules.get(half)
    sys.modules[half] = loaded or pil
    try:
        return import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
    finally:
        if loaded is None:
            del sys.modules[half]


class Mistral3(FrozenLVLM):
    """A frozen Mistral 3; arguments as of `FrozenLVLM`.

    A break token ends every row of an image, and stays as text does. The stock class puts the
    images of a batch into one sequence under a mask of blocks; here each passes the tower alone,
    which is the same up to rounding and costs no pairs of patches of two images.
    """

    model_type = "mistral3"
    known_extras = EVERY | {"pixels"}
    bounds = frozenset({"max_pixels"})
    one_run = False  # rows are broken
    pixel_inputs = ("pixel_values", "image_sizes")

    def __init__(self, pretrained: str | None, name: str = "mistral3", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        config = self.model.config
        v, text = config.vision_config, LMShape.of(config.text_config)
        # The features may come from an inner layer; later layers add nothing to them.
        vision = VisionShape(
            v.num_hidden_layers,
            v.hidden_size,
            v.intermediate_size,
            v.num_attention_heads,
            patches=0,
            patch_size=v.patch_size,
            channels=v.num_channels,
            cls=False,
            unused=v.num_hidden_layers - 1 - self._feature,
            gated=True,
            merge=config.spatial_merge_size,
        )
        # The merger reads the patches of a token side by side, an MLP what it makes of them.
        side_by_side = v.hidden_size * config.spatial_merge_size**2
        return LVLMShape(vision, (side_by_side, v.hidden_size, text.width, text.width), text)

    @property
    def _feature(self) -> int:
        """The layer of the tower, counted from 0, that makes the features."""
        config = self.model.config
        return layer_of(config.vision_feature_layer, config.vision_config.num_hidden_layers)

    @property
    def _patch(self) -> int:
        """Pixels a side of a patch."""
        return self.model.config.vision_config.patch_size

    @property
    def _merge(self) -> int:
        """Patches a side of a token."""
        return self.model.config.spatial_merge_size

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(MARKS, image_token="[IMG]")
        (image,) = token_ids(tokenizer, "[IMG]")
        tower = PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        )
        # Up to 8 x 8 patches, so up to 4 x 4 tokens: a few rows, each with its break.
        config = Mistral3Config(
            vision_config=tower,
            text_config=MistralConfig(
                vocab_size=len(tokenizer), **SMALL_TEXT, head_dim=16, sliding_window=None
            ),
            image_token_index=image,
        )
        processor = stock_processor()(
            pil.PixtralImageProcessorPil(size={"longest_edge": 112}),
            tokenizer,
            patch_size=14,
            spatial_merge_size=2,
            chat_template=CHAT,
        )
        return random_weights(Mistral3ForConditionalGeneration(config), tokenizer), processor

    @classmethod
    def load_processor(cls, source: str) -> Any:
        stock, config = stock_processor(), AutoConfig.from_pretrained(source)
        images, tokenizer, template = processor_parts(stock, source)
        return stock(images, tokenizer, chat_template=template, **_settings(config))

    def processor_settings(self) -> dict[str, Any]:
        return _settings(self.model.config)

    def limit_pixels(self, most: int) -> None:
        images, side = self.processor.image_processor, self._patch * self._merge
        if most < side**2:
            raise UserError(
                f"model.max_pixels={most} is less than the {side**2} pixels of one token of "
                f"{self.name}: give {side**2} or more."
            )
        # Only the longer side has a bound: that of a square, in whole tokens.
        longest = isqrt(most) // side * side
        images.size = {"longest_edge": min(longest, dict(images.size)["longest_edge"])}

    def pixels_of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Patches of all images without the padding that the stock processor puts around smaller
        ones, and the grid of each."""
        # Padding would become patches of its own in the tower.
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        images = zip(inputs["pixel_values"], sizes, strict=True)
        patches = [cells(image[:, :high, :wide], self._patch) for image, (high, wide) in images]
        grid = [[1, high // self._patch, wide // self._patch] for high, wide in sizes]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grid)}

    def rows_per_image(self, pixels: Mapping[str, Any]) -> list[int]:
        return pixels["image_grid_thw"].prod(-1).tolist()

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        return [patches // self._merge**2 for patches in self.rows_per_image(pixels)]

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        grids = [(rows, columns) for _, rows, columns in pixels["image_grid_thw"].tolist()]
        # A remainder of patches would belong to no token.
        for rows, columns in grids:
            if rows % self._merge or columns % self._merge:
                raise UserError(
                    f"the processor makes a grid of {rows} x {columns} patches, and {self.name} "
                    f"merges {self._merge} x {self._merge} of them: {self.remedy}."
                )
        # One image at a time, so that no patch is paired with those of another one.
        counts, side = self.rows_per_image(pixels), self._patch * self._merge
        raw = pixels["pixel_values"].to(self.device).split(counts)
        tokens: list[Tensor] = []
        features: dict[str, list[Tensor]] = {name: [] for name in extras}
        for patches, squares, grid in zip(values.split(counts), raw, grids, strict=True):
            # Raw pixels are cut here, all other extras are overheard in the tower.
            seen, beside = self._see_image(whole(patches, *grid), grid, extras - {"pixels"})
            tokens.append(seen)
            if "pixels" in extras:
                beside["pixels"] = cells(whole(squares, *grid), side)
            for name, value in beside.items():
                features[name].append(value)
        # Grids in tokens for places, in patches for whoever maps attention.
        views = [((rows // self._merge, columns // self._merge),) for rows, columns in grids]
        return Seen(tokens, views, [(grid,) for grid in grids], features)

    def _see_image(
        self, image: Float[Tensor, "3 Y X"], grid: tuple[int, int], extras: frozenset[str]
    ) -> tuple[Float[Tensor, "N D"], dict[str, Float[Tensor, "N ..."]]]:
        """Tokens of an image, and its extras."""
        parts = self.model.model
        layers = parts.vision_tower.transformer.layers
        last, middle = layers[self._feature], layers[object_layer(range(self._feature + 1))]
        modules = reading(extras, last.attention, middle.attention, parts.multi_modal_projector)
        with overheard(modules) as calls:
            # Inputs of these modules are noted during the stock forward.
            out = parts.get_image_features(
                image.unsqueeze(0), image_sizes=[tuple(image.shape[1:])], return_dict=True
            )
        features = {}
        if "vision_features" in calls:
            features["vision_features"] = self._by_token(calls["vision_features"].x, grid)
        # A token's attention and key are means over its patches, side by side in the last axis.
        for name in ATTENTIONS & calls.keys():
            patches = self._attention(modules[name], calls[name])
            features[name] = self._by_token(patches.unsqueeze(-1), grid).mean(-1)
        if "last_keys" in calls:
            keys = keys_of(modules["last_keys"], calls["last_keys"].x[0])
            beside = self._by_token(keys, grid)
            features["last_keys"] = beside.unflatten(-1, (-1, keys.shape[-1])).mean(-2)
        return out.pooler_output[0], features

    def _by_token(
        self, patches: Float[Tensor, "P C"], grid: tuple[int, int]
    ) -> Float[Tensor, "N c"]:
        """Patches of an image in raster order -> those of each token side by side."""
        # [rows m columns m C] -> tokens in raster order, each with its m x m patches.
        squares = patches.unflatten(0, (grid[0] // self._merge, self._merge, -1, self._merge))
        return squares.transpose(1, 2).flatten(0, 1).flatten(1)

    def _attention(self, layer: Any, call: Call) -> Float[Tensor, " P"]:
        """Attention that each patch of an image receives."""
        # [P H c] each, rotated as the layer rotates them; then heads come first.
        query, keys = (
            rotated(
                project(call.x)[0].unflatten(-1, (layer.num_heads, -1)),
                *call.options["position_embeddings"],
            )
            for project in (layer.q_proj, layer.k_proj)
        )
        return received_attention(query.transpose(0, 1)[None], keys.transpose(0, 1)[None])[0]

    def look_again(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> tuple[list[Tensor], None]:
        """Tokens of images of any whole number of them a side, as the stock class sees images of
        any size."""
        sizes = (image.shape[1:] for image in images)
        grid = [[1, high // self._patch, wide // self._patch] for high, wide in sizes]
        # Images of any size take the way of `see`, only without a processor.
        patches = torch.cat([cells(image, self._patch) for image in images])
        pixels = {"pixel_values": patches, "image_grid_thw": torch.tensor(grid)}
        return list(self.look(pixels, frozenset()).tokens), None

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The projector from its norm on; it reads the patches of a token side by side."""
        projector = self.model.model.multi_modal_projector
        patches = vision_features.unflatten(-1, (self._merge**2, -1))
        # The stock merger orders by channel first.
        merged = projector.patch_merger.merging_layer(projector.norm(patches).mT.flatten(-2))
        return projector.linear_2(projector.act(projector.linear_1(merged)))


def _settings(config: Any) -> dict[str, Any]:
    """What of the processor decides how many placeholders it writes."""
    return {
        "patch_size": config.vision_config.patch_size,
        "spatial_merge_size": config.spatial_merge_size,
    }
