"""vLLM in this process reads pruned prompts, in place of the model that sees images."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.errors import UserError
from tprl.kinds import LARGEST, Number
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.keep_all import KeepAll
from tprl.runtime import distributed
from tprl.serving.folder import write_folder
from tprl.serving.reading import engine_prompt
from tprl.serving.settings import Settings
from tprl.serving.versions import check_vllm
from tprl.types import Prompt

ARCHITECTURE = "TPRLLlavaForScoring"  # of `serving.vllm.scoring`: reads embeddings at their places
SETTINGS = Settings(1.0, "keep", {"_target_": "tprl.pruners.keep_all.KeepAll"})
COUNT = Number(1, LARGEST, whole=True, example="8")
SHARE = Number(0, 1, above=True, example="0.5")
# The engine steps in this process and says nothing of its own. On a CPU it would bind the threads
# of this process to cores, and take its share of all memory. What the environment says wins.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class EngineReading:
    """Likelihoods and answers of pruned prompts by an engine, a `scoring.scorer.Reader`.

    Kept tokens are the caller's, since a policy in training draws them. They arrive as embeddings
    with their places, and the engine's language model reads what that of `lvlm` would read.

    Args:
        lvlm: a LLaVA-1.5. It encodes images and words; its language model is not used. The engine
            has a copy of its weights, written to a temporary folder that goes with this object.
        tensor_parallel_size: GPUs over which the engine spreads its copy.
        gpu_memory_utilization: share of each GPU that the engine takes.
        max_num_seqs: prompts at a time.
        max_model_len: tokens of the longest prompt with its answer; None: what the model knows.
        enforce_eager: False compiles the model and records CUDA graphs, a longer start.

    Raises:
        UserError: vLLM is missing or another version, several ranks, another family, or weights
            that cannot be written (`serving.folder.check_export`).
    """

    name = "vllm"

    def __init__(
        self,
        lvlm: Any,
        tensor_parallel_size: Annotated[int, COUNT] = 1,
        gpu_memory_utilization: Annotated[float, SHARE] = 0.5,
        max_num_seqs: Annotated[int, COUNT] = 256,
        max_model_len: Annotated[int, COUNT] | None = None,
        enforce_eager: bool = True,
    ) -> None:
        _check(lvlm)
        self.lvlm: FrozenLVLM = lvlm
        (self.count,) = lvlm.feature_counts({"pixel_values": torch.zeros(1)})
        self._folder = tempfile.TemporaryDirectory(prefix="tprl-engine-")
        write_folder(lvlm, KeepAll(), SETTINGS, Path(self._folder.name))
        # Every prompt is read once: nothing is worth caching.
        settings = {
            "dtype": str(lvlm.model.dtype).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            "skip_mm_profiling": True,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "enable_mm_embeds": True,
            "hf_overrides": {"architectures": [ARCHITECTURE], **SETTINGS.keys},
        }
        self.llm = _started(self._folder.name, settings)

    @staticmethod
    def check_installed() -> None:
        """Refuse an environment without vLLM, or with a version that was not tried."""
        check_vllm()

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """See `LVLM.score`.

        Raises:
            UserError: see `engine_prompt`; or the engine refuses a prompt.
        """
        targets = [self.lvlm.answer_row(answer) for answer in answers]
        requests = [self.request(prompt, row, target) for row, target in enumerate(targets)]
        log_probs, exact = [], []
        for output, target in zip(
            self._read(requests, max_tokens=1, prompt_logprobs=0), targets, strict=True
        ):
            # One entry per token of the prompt, of which the answer's are the last.
            places = output.prompt_logprobs[-len(target) :]
            read = [place[token] for place, token in zip(places, target, strict=True)]
            log_probs.append(sum(entry.logprob for entry in read) / len(read))
            exact.append(all(entry.rank == 1 for entry in read))
        device = self.lvlm.device
        return torch.tensor(log_probs, device=device), torch.tensor(exact, device=device)

    def answer(self, prompt: Prompt) -> list[str]:
        """Greedy answers.

        Raises:
            UserError: as `score`.
        """
        requests = [self.request(prompt, row) for row in range(len(prompt.uids))]
        # Ends are the checkpoint's, as in `FrozenLVLM.generate`.
        ends = {"ignore_eos": True, "stop_token_ids": self.lvlm.ends}
        outputs = self._read(requests, max_tokens=self.lvlm.max_new_tokens, **ends)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return self.lvlm.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def request(self, prompt: Prompt, row: int, target: Sequence[int] = ()) -> Mapping[str, Any]:
        """A prompt and its answer as vLLM reads them: a placeholder per image, and what is kept of
        it."""
        ids, images = engine_prompt(prompt, row, self.count)
        words = {"prompt_token_ids": [*ids, *target]}
        return {**words, "multi_modal_data": {"image": images}} if images else words

    def _read(self, requests: Sequence[Mapping[str, Any]], **how: Any) -> list[Any]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        sampling = SamplingParams(temperature=0, detokenize=False, **how)
        try:
            return self.llm.generate(list(requests), sampling, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM refuses a prompt of {self.lvlm.name}: {reason}") from error


def _check(lvlm: Any) -> None:
    check_vllm()
    if lvlm.model_type != "llava":
        raise UserError(
            f"scorer=vllm reads for LLaVA-1.5 alone, and model={lvlm.name} is another family: "
            "leave scorer out."
        )
    if distributed.count() > 1:
        raise UserError(
            f"scorer=vllm reads for one process, and this run has {distributed.count()}: use "
            "trainer.devices=1, and scorer.tensor_parallel_size for more GPUs."
        )


def _started(folder: str, options: Mapping[str, Any]) -> Any:
    """The engine; random numbers and the default dtype of this process stay as they are."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    from tprl.runtime.checkpoint import draw_from, draws

    # vLLM seeds all generators of the process that runs its model.
    before, dtype = draws(), torch.get_default_dtype()
    try:
        return LLM(model=folder, **options)
    finally:
        draw_from(before)
        torch.set_default_dtype(dtype)
