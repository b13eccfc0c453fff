"""Likelihoods of answers to pruned prompts, by vLLM: `FrozenLVLM.score` for models that need an
engine.

The kept tokens are the caller's (a policy in training draws them), so they arrive as embeddings,
and their places with them; the engine's language model reads what ours would read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.serving.places import Span, spans
from tprl.serving.reading import engine_prompt
from tprl.serving.settings import Settings
from tprl.serving.vllm.model import Pruned
from tprl.types import Prompt

ARCHITECTURE = "TPRLLlavaForScoring"
NOTHING = {"_target_": "tprl.pruners.keep_all.KeepAll"}


class Info(LlavaProcessingInfo):
    """Images come as embeddings with places."""

    def _get_expected_hidden_size(self) -> int | None:
        return super()._get_expected_hidden_size() + 2


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder
)
class TPRLLlavaForScoring(Pruned, LlavaForConditionalGeneration):
    """Stock LLaVA-1.5 that reads embeddings at their places; pixels are refused by its caller."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        skip = int(self.config.vision_feature_select_strategy == "default")
        self._count = self.vision_tower.vision_model.embeddings.num_positions - skip

    def layout(self, ids: Any) -> list[Span]:
        return spans(ids, self.config.image_token_index)

    def extent(self, feature: Any) -> int:
        return self._count

    def extents_in(self, images: Sequence[Span]) -> list[int]:
        return [self._count] * len(images)


class EngineReading:
    """Reads answers with an engine in this process.

    Args:
        lvlm: a LLaVA-1.5, which still encodes images; its language model is not used.
        folder: with its weights, written by `serving.folder.write_folder`.
        options: of `vllm.LLM`, such as tensor_parallel_size.

    Raises:
        UserError: another family.
    """

    def __init__(self, lvlm: FrozenLVLM, folder: str | Path, **options: Any) -> None:
        from vllm import LLM

        if lvlm.model_type != "llava":
            raise UserError(
                f"an engine scores llava alone, and {lvlm.name} "
                f"is a {lvlm.model_type}: leave the scorer out."
            )
        self.lvlm = lvlm
        (self.count,) = lvlm.feature_counts({"pixel_values": torch.zeros(1)})
        keys = Settings(1.0, "keep", NOTHING).keys
        overrides = {"architectures": [ARCHITECTURE], **keys}
        self.llm = LLM(model=str(folder), enable_mm_embeds=True, hf_overrides=overrides, **options)

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """See `FrozenLVLM.score`.

        Raises:
            UserError: see `engine_prompt`.
        """
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        targets = [self.lvlm.answer_row(answer) for answer in answers]
        requests = [self.request(prompt, row, target) for row, target in enumerate(targets)]
        outputs = self.llm.generate(requests, how, use_tqdm=False)
        log_probs, exact = [], []
        for output, target in zip(outputs, targets, strict=True):
            places = output.prompt_logprobs[-len(target) :]
            read = [place[token] for place, token in zip(places, target, strict=True)]
            log_probs.append(sum(entry.logprob for entry in read) / len(read))
            exact.append(all(entry.rank == 1 for entry in read))
        device = self.lvlm.device
        return torch.tensor(log_probs, device=device), torch.tensor(exact, device=device)

    def request(self, prompt: Prompt, row: int, target: Sequence[int]) -> Mapping[str, Any]:
        """A prompt and its answer as vLLM reads them: a placeholder per image, and what is kept of
        it."""
        ids, images = engine_prompt(prompt, row, self.count)
        return {"prompt_token_ids": [*ids, *target], "multi_modal_data": {"image": images}}
