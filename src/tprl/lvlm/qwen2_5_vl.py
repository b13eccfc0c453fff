"""Qwen2.5-VL (window-attention ViT, 2x2 merge, M-RoPE) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_size
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import WithoutVideo, image_only
from tprl.lvlm.patches import cells, merged_cells, patches_of
from tprl.lvlm.standing import ATTENTIONS, EVERY, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, overheard, received_attention, rotated, window_order

CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}{% if "
    "part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text "
    "}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def small_text() -> tuple[Any, dict[str, Any]]:
    """What the blueprints of all Qwen-VL share: a tokenizer, and the config of a small language
    model that uses it."""
    tokenizer = byte_tokenizer(MARKS, image_token=IMAGE, video_token=VIDEO)
    image, video, start, end = token_ids(tokenizer, IMAGE, VIDEO, *MARKS[2:])
    text = {
        "vocab_size": len(tokenizer),
        **SMALL_TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }
    return tokenizer, {
        "text_config": text,
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }


class ImageOnly(WithoutVideo, Qwen2_5_VLProcessor):
    """Images and text."""


class Qwen25VL(FrozenLVLM):
    """A frozen Qwen2.5-VL; arguments as of `FrozenLVLM`."""

    model_type = "qwen2_5_vl"
    # Features are what the merger reads, before its norm. pixels: [B V 3 y x] those of a token, as
    # the processor made them; `Encoded.look` sees other sizes.
    known_extras = EVERY | {"pixels"}
    bounds = frozenset({"max_pixels"})
    # all blocks of the tower but a few see windows, and its tokens are in window order
    windows = True
    pixel_inputs = ("pixel_values", "image_grid_thw")
    coordinates = "resized"
    processor_class: type[Any] = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen2_5_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        v = self.model.config.vision_config
        whole = sum(block in v.fullatt_block_indexes for block in range(v.depth))
        window = v.window_size // v.spatial_merge_size // v.patch_size * v.spatial_merge_size
        return self._shape(
            v.hidden_size, v.intermediate_size, gated=True, window=window, whole=whole
        )

    def _shape(self, width: int, mlp: int, projectors: int = 1, **differs: Any) -> LVLMShape:
        """What the towers of all Qwen-VL share; `differs` are further fields of `VisionShape`."""
        config = self.model.config
        v, text = config.vision_config, LMShape.of(config.text_config)
        vision = VisionShape(
            v.depth,
            width,
            mlp,
            v.num_heads,
            patches=0,
            patch_size=v.patch_size,
            channels=v.in_channels,
            cls=False,
            unused=0,
            frames=v.temporal_patch_size,
            merge=v.spatial_merge_size,
            **differs,
        )
        # The merger is an MLP over the patches of a token side by side; deepstack has further ones.
        side_by_side = width * v.spatial_merge_size**2
        return LVLMShape(vision, (side_by_side, side_by_side, text.width), text, projectors)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer, text = small_text()
        config = Qwen2_5_VLConfig(
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 48,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **text,
        )
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64)
        model = random_weights(Qwen2_5_VLForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)

    @classmethod
    def load_processor(cls, source: str) -> Any:
        return image_only(cls.processor_class, source)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        images = self.processor.image_processor
        factor, size = images.patch_size * images.merge_size, images.size
        seen = smart_resize(
            height,
            width,
            factor=factor,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return seen[1], seen[0]

    @property
    def image_text(self) -> str:
        return f"<|vision_start|>{self.placeholder}<|vision_end|>"

    def processor_settings(self) -> dict[str, Any]:
        config = self.model.config.vision_config
        sizes = {"merge_size": config.spatial_merge_size, "patch_size": config.patch_size}
        return sizes | {"temporal_patch_size": config.temporal_patch_size}

    def rows_per_image(self, pixels: Mapping[str, Any]) -> list[int]:
        return pixels["image_grid_thw"].prod(1).tolist()

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        merge = self.model.config.vision_config.spatial_merge_size
        return [patches // merge**2 for patches in self.rows_per_image(pixels)]

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        grid = pixels["image_grid_thw"].to(self.device)
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        tower, config = self.model.model.visual, self.model.config.vision_config
        # Processors of other checkpoints make patches or grids that the tower would misread.
        numbers = config.in_channels * config.temporal_patch_size * config.patch_size**2
        check_size(self.name, "patches", values.shape[-1:], [numbers], self.remedy)
        for _, rows, columns in grid.tolist():
            if rows % config.spatial_merge_size or columns % config.spatial_merge_size:
                raise UserError(
                    f"the processor makes a grid of {rows} x {columns} patches, "
                    f"and {self.name} merges {config.spatial_merge_size} x "
                    f"{config.spatial_merge_size} of them: {self.remedy}."
                )
        # Blocks that see windows say nothing of the whole image.
        whole = config.fullatt_block_indexes if self.windows else range(len(tower.blocks))
        last, middle = tower.blocks[max(whole)].attn, tower.blocks[object_layer(whole)].attn
        modules = reading(extras, last, middle, self._merger)
        with overheard(modules) as calls:
            out = self.model.model.get_image_features(values, image_grid_thw=grid, return_dict=True)
        merge = config.spatial_merge_size
        # A token is `merge` x `merge` patches, which follow each other.
        views = [(h // merge, w // merge) for _, h, w in grid.tolist()]
        counts = [rows * columns for rows, columns in views]
        features: dict[str, Tensor] = {}
        if "vision_features" in calls:
            features["vision_features"] = self._side_by_side(calls["vision_features"].x)
        sizes = [count * merge**2 for count in counts]
        for name in ATTENTIONS & calls.keys():
            patches = self._attention(modules[name], calls[name], sizes)
            features[name] = patches.view(-1, merge**2).mean(1)
        if "last_keys" in calls:
            keys = keys_of(modules["last_keys"], calls["last_keys"].x)
            features["last_keys"] = keys.unflatten(0, (-1, merge**2)).mean(1)
        if self.windows:
            # The stock tower sorts its output back itself, what was overheard inside it is not.
            back = window_order(views, config.window_size // merge // config.patch_size).argsort()
            features = {name: value[back.to(value.device)] for name, value in features.items()}
        if "pixels" in extras:
            frames, side = config.temporal_patch_size, config.patch_size
            features["pixels"] = merged_cells(
                pixels["pixel_values"].to(self.device), merge, frames, side
            )
        tiles = [((h, w),) for _, h, w in grid.tolist()]
        extra = {name: list(value.split(counts)) for name, value in features.items()}
        return Seen(
            list(out.pooler_output), [(view,) for view in views], tiles, extra, self._deep(out)
        )

    def look_again(
        self, images: Sequence[Float[Tensor, "3 _ _"]]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Tokens of images of any whole number of them a side, as the stock class sees images of
        any size."""
        v = self.model.config.vision_config
        side = v.patch_size * v.spatial_merge_size
        patches = [
            patches_of(cells(image, side), v.spatial_merge_size, v.temporal_patch_size)
            for image in images
        ]
        grid = [
            [1, image.shape[1] // v.patch_size, image.shape[2] // v.patch_size] for image in images
        ]
        pixels = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grid)}
        seen = self.look(pixels, frozenset())
        return list(seen.tokens), None if seen.deep is None else list(seen.deep)

    @property
    def _merger(self) -> Any:
        """The module that reads the patches which become a token."""
        return self.model.model.visual.merger

    def _side_by_side(self, x: Float[Tensor, "..."]) -> Float[Tensor, "N C"]:
        """What the merger was given, the patches of a token side by side."""
        merge = self.model.config.vision_config.spatial_merge_size
        return x.view(-1, merge**2 * x.shape[-1])

    def _deep(self, out: Any) -> list[Float[Tensor, "N F"]] | None:
        """What deeper layers of the tower add, per image (see `Encoded.deep`)."""
        return None

    def _attention(self, layer: Any, call: Call, sizes: list[int]) -> Float[Tensor, " N"]:
        """Attention that each patch receives from those of its own image, in the tower's order;
        `sizes` are patches per image."""
        # [P H c] with rotary places, then apart by image: patches of two images never attend.
        query, keys, _ = layer.qkv(call.x).unflatten(-1, (3, layer.num_heads, -1)).unbind(1)
        cosine, sine = call.options["position_embeddings"]
        turned = (
            rotated(x, cosine, sine).transpose(0, 1).unsqueeze(0).split(sizes, 2)
            for x in (query, keys)
        )
        return torch.cat([received_attention(q, k)[0] for q, k in zip(*turned, strict=True)])

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The merger, for methods that merge tokens before it; it reads the patches of a token side
        by side, and its norm is part of it."""
        patches = vision_features.unflatten(
            -1, (self.model.config.vision_config.spatial_merge_size**2, -1)
        )
        return self.model.model.visual.merger(patches).view(*vision_features.shape[:-1], self.width)

    def positions(
        self, ids: Int[Tensor, "B S"], attention: Bool[Tensor, "B S"], inputs: Mapping[str, Any]
    ) -> Int[Tensor, "P B S"]:
        if "image_grid_thw" not in inputs:  # text only
            return super().positions(ids, attention, inputs).expand(3, -1, -1)
        # M-RoPE counts time, rows and columns: text counts alike on all three.
        # Where the processor left its inputs: the stock method reads their numbers one by one.
        tokens, real = inputs["input_ids"], inputs["attention_mask"]
        kinds, grid = (tokens == self.image_token).int(), inputs["image_grid_thw"].to(tokens.device)
        positions, _ = self.model.model.get_rope_index(
            tokens, kinds, grid, attention_mask=real.long()
        )
        return (positions.to(self.device) * attention).long()
