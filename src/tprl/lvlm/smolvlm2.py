"""SmolVLM2 (tiles and a thumbnail, pixel shuffle) on the stock Hugging Face class, frozen."""

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import product
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_sides, runs
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import WithoutVideo, image_only
from tprl.lvlm.standing import ATTENTIONS, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, joined_tiles, overheard, query_key, received_attention

CHAT = (
    "<|im_start|>{% for turn in messages %}{{ turn.role | capitalize }}:{% for "
    "part in turn.content %}{% if part.type == 'image' %}<image>{% else %}{{ "
    "part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
)
MARKS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<video>",
)


class SmolVLM2(FrozenLVLM):
    """A frozen SmolVLM2; arguments as of `FrozenLVLM`.

    Raises:
        UserError: no num2words, which its stock processor needs; or as `FrozenLVLM`.
    """

    model_type = "smolvlm"
    bounds = frozenset({"max_tiles"})
    one_run = False  # every tile is announced
    pixel_inputs = ("pixel_values", "pixel_attention_mask")

    def __init__(self, pretrained: str | None, name: str = "smolvlm2", **options: Any) -> None:
        if find_spec("num2words") is None:
            raise UserError(
                f"model={name} needs the package num2words: pip install 'tprl[smolvlm]'."
            )
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        config = self.model.config
        v, text = config.vision_config, LMShape.of(config.text_config)
        side = _side(config) * config.scale_factor
        vision = VisionShape(
            v.num_hidden_layers,
            v.hidden_size,
            v.intermediate_size,
            v.num_attention_heads,
            side**2,
            v.patch_size,
            v.num_channels,
            cls=False,
            unused=0,
            merge=config.scale_factor,
        )
        return LVLMShape(vision, (v.hidden_size * config.scale_factor**2, text.width), text)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tiles = [f"<row_{row}_col_{column}>" for row, column in product(range(1, 5), repeat=2)]
        tokenizer = byte_tokenizer([*MARKS, *tiles], image_token="<image>")
        (image,) = token_ids(tokenizer, "<image>")
        config = SmolVLMConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 24,
                "patch_size": 4,
            },
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                **SMALL_TEXT,
                "pad_token_id": tokenizer.pad_token_id,
            },
            image_token_id=image,
            scale_factor=2,
        )
        images = SmolVLMImageProcessorPil(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
        )
        model = random_weights(SmolVLMForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, image_seq_len=9, chat_template=CHAT)

    @classmethod
    def load_processor(cls, source: str) -> Any:
        return image_only(
            ImageOnly, source, image_seq_len=_side(AutoConfig.from_pretrained(source)) ** 2
        )

    def processor_settings(self) -> dict[str, Any]:
        return {"image_seq_len": _side(self.model.config) ** 2}

    def limit_tiles(self, most: int) -> None:
        images = self.processor.image_processor
        # The longer side is scaled first: a square of tiles that is within the bound holds every
        # shape.
        longest = isqrt(most) * dict(images.max_image_size)["longest_edge"]
        images.size = {"longest_edge": min(longest, dict(images.size)["longest_edge"])}

    def pixels_of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The stock processor lists tiles per prompt. An image ends with its thumbnail, which the
        same token announces everywhere, also before the prompt's last run of image tokens."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.pixel_inputs}
        ids = inputs["input_ids"]
        for row, spans in enumerate(runs(ids == self.image_token)):
            # The token before a tile says which it is; the last one announces a thumbnail.
            announced = [int(ids[row, start - 1]) for start, _ in spans]
            ends = [i + 1 for i, token in enumerate(announced) if token == announced[-1]]
            # An image is the tiles from behind one thumbnail up to its own.
            for first, end in zip([0, *ends], ends, strict=False):
                for name, tiles in parts.items():
                    tiles.append(inputs[name][row, first:end])
            # Rows behind the announced tiles must be padding, and none may be missing.
            beyond = inputs["pixel_attention_mask"][row, len(spans) :]
            count = len(spans) + int(beyond.flatten(1).any(1).sum())
            if count != len(spans) or len(spans) > inputs["pixel_values"].shape[1]:
                raise UserError(
                    f"prompt {row} announces {len(spans)} tiles of images, and the "
                    f"processor made {min(count, inputs['pixel_values'].shape[1])}: pass "
                    f"what one call of the processor returned, complete, and {self.remedy}."
                )
        return {name: pad_sequence(tiles, batch_first=True) for name, tiles in parts.items()}

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        # those that are no padding
        tiles = pixels["pixel_attention_mask"].flatten(2).any(2).sum(1).tolist()
        return [count * _side(self.model.config) ** 2 for count in tiles]

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        # The shuffle would take tiles of another size apart in the wrong places.
        edge = self.model.config.vision_config.image_size
        check_sides(self.name, "tiles", pixels["pixel_values"], (edge, edge))
        parts = self.model.model
        layers = parts.vision_model.encoder.layers
        middle = layers[object_layer(range(len(layers)))].self_attn
        projection = parts.connector.modality_projection
        modules = reading(extras, layers[-1].self_attn, middle, projection)
        with overheard(modules) as calls:
            out = parts.get_image_features(
                pixels["pixel_values"].to(self.device, self.model.dtype),
                pixel_attention_mask=pixels["pixel_attention_mask"].to(self.device),
                return_dict=True,
            )
        # A token is `scale` x `scale` patches of a tile of `side` x `side` tokens.
        side, scale = _side(self.model.config), self.model.config.scale_factor
        pixel_mask = pixels["pixel_attention_mask"]
        real = pixel_mask.flatten(2).any(2)  # tiles that are no padding
        counts = real.sum(1).tolist()
        features = {name: call.x for name, call in calls.items()}
        for name in ATTENTIONS & calls.keys():
            patches = self._attention(modules[name], calls[name], pixel_mask[real])
            features[name] = self._by_token(patches.unsqueeze(-1)).squeeze(-1)
        if "last_keys" in calls:
            keys = keys_of(modules["last_keys"], calls["last_keys"].x)
            features["last_keys"] = self._by_token(keys)
        # One tensor per tile in transformers 5.18, one per prompt in 5.23.
        tokens = torch.cat(list(out.pooler_output)).split([count * side**2 for count in counts])
        return Seen(
            list(tokens),
            [((side, side),) * count for count in counts],
            [((side * scale, side * scale),) * count for count in counts],
            {name: joined_tiles(value, counts) for name, value in features.items()},
        )

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The projector after its pixel shuffle, for methods that merge tokens before it."""
        return self.model.model.connector.modality_projection(vision_features)

    def _attention(
        self, layer: Any, call: Call, pixel_mask: Shaped[Tensor, "I Y X"]
    ) -> Float[Tensor, "I P"]:
        """Attention received by every patch of a tile. A patch is real where any of its pixels is
        `shown`."""
        # Padded patches neither give nor receive attention: [I P].
        patch = self.model.config.vision_config.patch_size
        real = max_pool2d(pixel_mask.float(), patch).flatten(1).bool()
        return received_attention(*query_key(layer, call.x), real)

    def _by_token(self, patches: Float[Tensor, "I P C"]) -> Float[Tensor, "I N C"]:
        """Means over the patches of every token of a tile: the pixel shuffle that makes tokens
        tells which are its."""
        # The shuffle of the features: its order is theirs, channels of a patch stay together.
        scale = self.model.config.scale_factor
        shuffled = self.model.model.connector.pixel_shuffle(patches, scale)
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(-2)


def _side(config: Any) -> int:
    """Rows and columns of the tokens of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor


class ImageOnly(WithoutVideo, SmolVLMProcessor):
    """Images and text."""
