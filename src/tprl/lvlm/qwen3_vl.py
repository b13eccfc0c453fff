"""Qwen3-VL (ViT with deepstack, M-RoPE) on the stock Hugging Face class, frozen."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers import Qwen3VLProcessor as StockProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tprl.cost import LVLMShape
from tprl.lvlm.blueprint import random_weights
from tprl.lvlm.loading import WithoutVideo
from tprl.lvlm.qwen2_5_vl import CHAT, Qwen25VL, small_text

# Of small builds, also of later families with this tower.
SMALL_TOWER: Mapping[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 64,
}


class ImageOnly(WithoutVideo, StockProcessor):
    """Images and text."""


def small_processor(tokenizer: Any) -> ImageOnly:
    """For small builds: images of 4 to 64 tokens."""
    images = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 64
    )
    return ImageOnly(images, tokenizer, None, chat_template=CHAT)


class Qwen3VL(Qwen25VL):
    """A frozen Qwen3-VL; arguments as of `FrozenLVLM`.

    The first layers of the language model add features of deeper vision layers to the visual
    tokens: a token that goes takes its own with it.
    """

    model_type = "qwen3_vl"
    windows = False
    coordinates = "thousand"
    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "qwen3_vl", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        v = self.model.config.vision_config
        deeper = sum(block in v.deepstack_visual_indexes for block in range(v.depth))
        return self._shape(v.hidden_size, v.intermediate_size, projectors=1 + deeper)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer, text = small_text()
        text["text_config"] |= {"num_hidden_layers": 3, "head_dim": 12}
        # The stock class does so anyway; engines ask the config, as those that are published say
        # it.
        text["text_config"]["rope_parameters"]["mrope_interleaved"] = True
        config = Qwen3VLConfig(
            vision_config={**SMALL_TOWER, "deepstack_visual_indexes": [0, 1]},
            **text,
        )
        model = random_weights(Qwen3VLForConditionalGeneration(config), tokenizer)
        return model, small_processor(tokenizer)

    def _deep(self, out: Any) -> list[Float[Tensor, "N F"]] | None:
        # the mergers of a model that is cut may be on several
        home = out.deepstack_features[0][0].device
        deep = []
        for layers in zip(*out.deepstack_features, strict=True):  # of one image
            deep.append(torch.cat([layer.to(home) for layer in layers], -1))
        return deep

    @contextmanager
    def deepstack(
        self, deep: Float[Tensor, "B S F"] | None, visual: Bool[Tensor, "B S"]
    ) -> Generator[None, None, None]:
        if deep is None:  # no image in the batch
            yield
            return
        done = 0  # columns that the language model has read

        def give(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal done
            # Given embeddings, the stock class adds no deep features: they come here.
            rows, columns, _ = kwargs["inputs_embeds"].shape
            copies = rows // len(visual)  # beams
            columns_now, features = (
                part[:, done : done + columns].repeat_interleave(copies, 0)
                for part in (visual, deep)
            )
            done += columns
            # Columns after the prompt are no images; features of a layer are `width` wide.
            if columns_now.any():
                kwargs["visual_pos_masks"] = pad(columns_now, (0, columns - columns_now.shape[1]))
                kwargs["deepstack_visual_embeds"] = list(
                    features[columns_now].split(self.width, -1)
                )
            return args, kwargs

        handle = self.model.model.language_model.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
