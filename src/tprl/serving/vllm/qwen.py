"""What the Qwen-VL families share in vLLM: images of any size, three position axes, no videos."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from tprl.serving.choose import Image, Kept
from tprl.serving.places import Span, spans, with_places
from tprl.serving.vllm.model import Pruned, questions_in
from tprl.serving.vllm.processing import PrunedInfo, PrunedProcessor


class QwenInfo(PrunedInfo):
    """Images alone: videos are not pruned, so they are not served."""

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}  # type: ignore[attr-defined]


class QwenProcessor(PrunedProcessor):
    """The question with every image, and as many placeholders as are kept of it."""

    def images_in(self, data: Any) -> int:
        return len(data.get("image_grid_thw", ()))

    def extent(self, number: int, inputs: Any) -> int:
        """As many positions as the longer side has tokens."""
        images, options = inputs.mm_data_items["image"], inputs.hf_processor_mm_kwargs
        if images.get(number) is None:
            # Named by its hash alone, so that its size is not known here: at least one.
            return 1
        vision, size = self.info.get_hf_config().vision_config, images.get_image_size(number)
        seen, _ = self.info._get_vision_info(
            image_width=size.width,
            image_height=size.height,
            image_processor=self.info.get_image_processor(**options),
            mm_kwargs=options,
        )
        return max(seen.width, seen.height) // (vision.patch_size * vision.spatial_merge_size)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        merge, token = config.vision_config.spatial_merge_size, config.image_token_id

        def kept(number: int) -> list[int]:
            patches = int(out_mm_kwargs["image"][number]["image_grid_thw"].data.prod())
            return [token] * self.info.settings.tokens(patches // merge**2)

        return [PromptReplacement(modality="image", target=[token], replacement=kept)]


class QwenPruned(Pruned):
    """Before a stock Qwen-VL class among the bases.

    Attributes:
        width: of a token as the language model's first layer reads it; what deeper layers add
            follows it.
    """

    axes = 3
    supports_encoder_cudagraph = False  # its replay goes past `embed_multimodal`
    width: int

    def embed_multimodal(self, **kwargs: object) -> Any:
        question = questions_in(kwargs)
        pixels = self._parse_and_validate_image_input(**kwargs)  # type: ignore[attr-defined]
        if pixels is None:
            return []
        grids = pixels["image_grid_thw"].tolist()
        tokens = self._process_image_input(pixels)  # type: ignore[attr-defined]
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        rows = pixels["pixel_values"].split([t * h * w for t, h, w in grids])
        images = []
        for part, (_, h, w), asked, seen in zip(
            tokens, grids, self.words_of(question, len(grids)), rows, strict=True
        ):
            grid = (h // merge, w // merge)
            deep = part[:, self.width :] if part.shape[1] > self.width else None
            places = raster(*grid).to(part.device)
            images.append(Image(part[:, : self.width], grid, asked, places, self.uid(seen), deep))
        return self.pruned(images)

    def packed(self, kept: Kept) -> Float[Tensor, "K F"]:
        tokens = kept.tokens if kept.deep is None else torch.cat([kept.tokens, kept.deep], 1)
        return tokens if self.settings.positions == "compact" else with_places(tokens, kept.places)

    def layout(self, ids: Any) -> list[Span]:
        return spans(ids, self.config.image_token_id)  # type: ignore[attr-defined]

    def extent(self, feature: Any) -> int:
        _, h, w = feature.data["image_grid_thw"].data.tolist()
        vision = self.config.vision_config  # type: ignore[attr-defined]
        return max(h, w) // vision.spatial_merge_size

    def extents_in(self, images: Sequence[Span]) -> list[int]:
        # A word stands between two images always, so that none begins where another one ends.
        return [0] * len(images)


def raster(rows: int, columns: int) -> Int[Tensor, "3 N"]:
    """Time, row and column of every token of an image, relative to where it begins."""
    row = torch.arange(rows).repeat_interleave(columns)
    return torch.stack([torch.zeros_like(row), row, torch.arange(columns).repeat(rows)])
