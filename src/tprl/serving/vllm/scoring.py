"""Likelihoods of answers to pruned prompts, by vLLM: `FrozenLVLM.score` for models that need an engine.

The kept tokens are the caller's (a policy in training draws them), so they arrive as embeddings, and their places with
them; the engine's language model reads what ours would read.
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
from tprl.serving.places import Span, rewritten, spans, text_positions, with_places, without_places
from tprl.serving.settings import Settings
from tprl.serving.vllm.model import Pruned
from tprl.types import Prompt

ARCHITECTURE = "TPRLLlavaForScoring"
NOTHING = {"_target_": "tprl.pruners.keep_all.KeepAll"}


class Info(LlavaProcessingInfo):
    """Images come as embeddings with places."""

    def _get_expected_hidden_size(self) -> int | None:
        return super()._get_expected_hidden_size() + 2


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
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

    def extents_in(self, positions: Tensor, images: Sequence[Span]) -> list[int]:
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
                f"an engine scores llava alone, and {lvlm.name} is a {lvlm.model_type}: leave the scorer out."
            )
        self.lvlm = lvlm
        self.count = (lvlm.model.config.vision_config.image_size // lvlm.model.config.vision_config.patch_size) ** 2
        keys = Settings(1.0, "keep", NOTHING).keys
        overrides = {"architectures": [ARCHITECTURE], **keys}
        self.llm = LLM(model=str(folder), enable_mm_embeds=True, hf_overrides=overrides, **options)

    def score(self, prompt: Prompt, answers: Sequence[str]) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """See `FrozenLVLM.score`.

        Raises:
            UserError: positions that are not those of an unpruned prompt with gaps.
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
        """A prompt and its answer as vLLM reads them: a placeholder per image, and what is kept of it."""
        real = prompt.attention[row]
        ids, visual = prompt.input_ids[row, real], prompt.visual[row, real]
        number, positions = prompt.image[row, real], prompt.positions[:, row, real]
        embeds = prompt.embeds[row, real]
        short: list[int] = []
        images, lengths = [], []
        for column, token in enumerate(ids.tolist()):
            if not visual[column]:
                short.append(token)
                continue
            tokens_of_image = visual & (number == number[column])
            if column == int(tokens_of_image.nonzero()[0]):
                begin = int(positions[0, column - 1]) + 1 if column else 0
                images.append(with_places(embeds[tokens_of_image], positions[:, tokens_of_image] - begin).cpu())
                lengths.append(Span(column, int(tokens_of_image.sum())))
                short.append(token)
        self._check(positions.cpu(), lengths, [without_places(image, 1)[1] for image in images])
        return {"prompt_token_ids": [*short, *target], "multi_modal_data": {"image": images}}

    def _check(self, positions: Tensor, images: Sequence[Span], places: Sequence[Tensor]) -> None:
        extents = [self.count] * len(images)
        start = text_positions(positions.shape[1], images, extents).unsqueeze(0)
        if not torch.equal(rewritten(start, images, extents, places, 0), positions):
            raise UserError("an engine scores prompts whose survivors keep their places: use positions=keep.")
