"""GLM-4.1V (ViT, 2x2 convolution and gated merger, M-RoPE) on the stock Hugging Face class,
frozen."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import (
    Glm4vImageProcessorPil,
    smart_resize,
)

from tprl.cost import LVLMShape
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.loading import WithoutVideo
from tprl.lvlm.qwen2_5_vl import Qwen25VL

CHAT = (
    "[gMASK]<sop>{% for turn in messages %}<|{{ turn.role }}|>\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
IMAGE, VIDEO = "<|image|>", "<|video|>"
MARKS = (
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)


class ImageOnly(WithoutVideo, Glm4vProcessor):
    """Images and text."""


class Glm4v(Qwen25VL):
    """A frozen GLM-4.1V, or another model of its dense class; arguments as of `FrozenLVLM`."""

    model_type = "glm4v"
    windows = False
    coordinates = "thousand"
    processor_class = ImageOnly

    def __init__(self, pretrained: str | None, name: str = "glm4v", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        v = self.model.config.vision_config
        # An MLP of the tower is as wide as what leaves it, and the merger has three matrices.
        shape = self._shape(v.hidden_size, v.out_hidden_size, gated=True)
        joined, width = shape.projector[0], v.out_hidden_size
        chain = (joined, width, width, v.intermediate_size, width)
        return replace(shape, projector=chain, beside=(width, v.intermediate_size))

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(MARKS, image_token=IMAGE, video_token=VIDEO)
        # The first four marks enclose images and videos and have settings in the config.
        image, video, *marks = token_ids(tokenizer, IMAGE, VIDEO, *MARKS[:4])
        image_start, image_end, video_start, video_end = marks
        # Half of a head turns with its place, as in those that are published.
        rope = {
            "rope_type": "default",
            "mrope_section": [1, 1, 1],
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }
        config = Glm4vConfig(
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "num_heads": 4,
                "image_size": 56,
                "out_hidden_size": 48,
                "intermediate_size": 40,
            },
            text_config={"vocab_size": len(tokenizer), **SMALL_TEXT, "rope_parameters": rope},
            image_token_id=image,
            video_token_id=video,
            image_start_token_id=image_start,
            image_end_token_id=image_end,
            video_start_token_id=video_start,
            video_end_token_id=video_end,
        )
        # bounds in pixels of both frames of a patch
        images = Glm4vImageProcessorPil(
            size={"shortest_edge": 2 * 28 * 28 * 4, "longest_edge": 2 * 28 * 28 * 64}
        )
        model = random_weights(Glm4vForConditionalGeneration(config), tokenizer)
        return model, ImageOnly(images, tokenizer, None, chat_template=CHAT)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        # The stock function counts both frames of a patch, and answers (height, width).
        images = self.processor.image_processor
        frames, size = images.temporal_patch_size, images.size
        seen = smart_resize(
            frames,
            height,
            width,
            temporal_factor=frames,
            factor=images.patch_size * images.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return seen[1], seen[0]

    def limit_pixels(self, most: int) -> None:
        # The stock bounds count the pixels of all frames of a patch.
        images = self.processor.image_processor
        frames, size = images.temporal_patch_size, dict(images.size)
        images.size = {name: bound // frames for name, bound in size.items() if bound}
        super().limit_pixels(most)
        images.size = {name: bound * frames for name, bound in dict(images.size).items() if bound}

    @property
    def image_text(self) -> str:
        return f"<|begin_of_image|>{self.placeholder}<|end_of_image|>"

    @property
    def _merger(self) -> Any:
        return self.model.model.visual.downsample

    def _side_by_side(self, x: Float[Tensor, "N C y x"]) -> Float[Tensor, "N c"]:
        # [N C y x] -> [N y*x*C]: patches of a token side by side, each with all its channels.
        return x.flatten(2).mT.flatten(1)

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The convolution that joins the patches of a token, which stand side by side, and the
        merger behind it."""
        tower, merge = self.model.model.visual, self.model.config.vision_config.spatial_merge_size
        # [T m*m c]: the patches of each token, as the convolution wants them on a grid.
        patches = vision_features.reshape(-1, merge**2, vision_features.shape[-1] // merge**2)
        joined = tower.downsample(patches.mT.unflatten(-1, (merge, merge))).flatten(1)
        return tower.merger(joined).view(*vision_features.shape[:-1], self.width)
