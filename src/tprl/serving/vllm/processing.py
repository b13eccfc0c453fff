"""What vLLM does with a request before the model runs: counts of kept tokens, and the question."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig

from tprl.serving.question import Questions
from tprl.serving.settings import Settings, sees_other_images
from tprl.types import Pruner

QUESTION = "tprl_question"  # the question's ids, one copy per image: a part of every cache key


class PrunedInfo:
    """Before a stock `...ProcessingInfo` among the bases: images take as many tokens as are
    kept."""

    ctx: Any

    @cached_property
    def settings(self) -> Settings:
        return Settings.of(self.ctx.model_config.hf_config)

    @cached_property
    def pruner(self) -> Pruner:
        return self.settings.load(self.ctx.model_config.model)

    @cached_property
    def longest(self) -> int:
        """Positions that the language model knows."""
        return self.ctx.model_config.hf_text_config.max_position_embeddings

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # Images of a prompt are encoded and cached one by one.
        return {"image": 1 if sees_other_images(self.pruner) else None}

    def get_num_image_tokens(self, **size: Any) -> int:
        return self.settings.tokens(super().get_num_image_tokens(**size))  # type: ignore[misc]

    def get_hf_processor(self, **options: object) -> Any:
        options.pop(QUESTION, None)
        return super().get_hf_processor(**options)  # type: ignore[misc]


class PrunedProcessor(ABC):
    """Before a stock `...MultiModalProcessor` among the bases: the question goes with every
    image."""

    info: Any

    @cached_property
    def _questions(self) -> Questions | None:
        if not self.info.pruner.reads_question:
            return None
        config = self.info.ctx.model_config.hf_config
        image_token = getattr(config, "image_token_id", None) or config.image_token_index
        return Questions(self.info.get_hf_processor(), image_token)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Stock `apply`, of a prompt with a placeholder for each image and no position beyond what
        the language model knows."""
        # Before the stock method caches an image: of a refused request it would stay in the
        # server's cache alone, and the next request with this image and question would fail.
        self._check(inputs)
        options = {
            name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name != QUESTION
        }
        if self._questions is not None:
            options[QUESTION] = self._questions(inputs.prompt)
        inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _check(self, inputs: Any) -> None:
        config = self.info.ctx.model_config.hf_config
        image_token = getattr(config, "image_token_id", None) or config.image_token_index
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        if (written := inputs.prompt.count(image_token)) != count:
            raise VLLMValidationError(  # status 400
                (
                    f"the prompt has {written} image placeholders for {count} "
                    f"image{'s' if count != 1 else ''}: write one for each image, "
                    "and none in the text of a question."
                ),
                parameter="image",
            )
        if self.info.settings.positions == "compact":
            return
        longest = self.info.longest
        if (length := self.unpruned_length(inputs)) > longest:
            raise VLLMValidationError(
                (
                    f"the prompt reaches position {length} before pruning, "
                    f"and the language model knows {longest}: send fewer "
                    "or smaller images, or serve with positions=compact."
                ),
                parameter="image",
            )

    def unpruned_length(self, inputs: Any) -> int:
        """Positions that a prompt takes with all its visual tokens."""
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        return len(inputs.prompt) - count + sum(self.extent(at, inputs) for at in range(count))

    @abstractmethod
    def extent(self, number: int, inputs: Any) -> int:
        """Positions that an image takes before pruning.

        Args:
            number: of the image in its prompt.
            inputs: what vLLM made of the request.
        """

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> Any:
        options = {name: value for name, value in hf_kwargs.items() if name != QUESTION}
        return super()._call_hf_processor(hf_data, options)  # type: ignore[misc]

    def _postprocess_hf_mm_data(
        self, mm_data: Any, hf_processor_mm_kwargs: Any, processed_data: Any
    ) -> Any:
        data = super()._postprocess_hf_mm_data(  # type: ignore[misc]
            mm_data, hf_processor_mm_kwargs, processed_data
        )
        if QUESTION in hf_processor_mm_kwargs:
            ids = torch.tensor(hf_processor_mm_kwargs[QUESTION], dtype=torch.long)
            data[QUESTION] = ids.expand(self.images_in(data), -1)
        return data

    def images_in(self, data: Any) -> int:
        """Images among what the stock processor made."""
        return len(data.get("pixel_values", ()))

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Any
    ) -> Mapping[str, Any]:
        stock: Any = super()
        fields = dict(stock._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if QUESTION in hf_processor_mm_kwargs:
            fields[QUESTION] = MultiModalFieldConfig.batched("image")
        return fields
