"""Questions, the answers that `tprl.prune` gives in transformers, and engines that serve the same
folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tprl
from tprl.build import choices, load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import load_pruner
from tprl.serving.folder import settings_for, write_folder
from tprl.types import Sample

LENGTH = 16  # new tokens
ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_mm_profiling": True,
    "distributed_executor_backend": "uni",
    "seed": 0,
    "max_num_seqs": 16,
}


class Answer(NamedTuple):
    """Greedy token ids, and how much the best token leads the second at each of them."""

    ids: list[int]
    gaps: list[float]


def questions(count: int, first: int = 0, world: type[Scenes] = Scenes) -> list[Sample]:
    """That many test questions, five about each image."""
    data = world("test")
    return [data[index] for index in range(first, first + count)]


def pruner_of(name: str) -> Any:
    """That of a yaml, or one that ships in a folder."""
    return load_component("pruner", name) if name in choices("pruner") else load_pruner(name)


def node_of(name: str) -> Mapping[str, Any]:
    """How the pruner of a yaml is built; of a folder, nothing."""
    if name not in choices("pruner"):
        return {}
    from omegaconf import OmegaConf

    from tprl.build import conf_dir

    config = OmegaConf.load(conf_dir() / "pruner" / f"{name}.yaml")
    return dict(OmegaConf.to_container(config))  # type: ignore[arg-type]


def export(
    folder: Path, lvlm: FrozenLVLM, pruner: str, keep_ratio: float, positions: str = "keep"
) -> Path:
    """A served folder."""
    loaded = pruner_of(pruner)
    settings = settings_for(loaded, node_of(pruner), keep_ratio, positions)
    write_folder(lvlm, loaded, settings, folder)
    return folder


@torch.no_grad()
def reference(
    lvlm: FrozenLVLM,
    samples: Sequence[Sample],
    pruner: str,
    keep_ratio: float,
    positions: str = "keep",
    length: int = LENGTH,
) -> list[Answer]:
    """What the stock model answers under `tprl.prune`, in float32."""
    processor = lvlm.processor
    answers = []
    chosen = pruner_of(pruner)
    with tprl.prune(lvlm.model, chosen, keep_ratio, processor=processor, positions=positions):
        for start in range(0, len(samples), 32):
            part = samples[start : start + 32]
            texts = [lvlm.render(sample) for sample in part]
            images = [list(sample.images) for sample in part]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            out = lvlm.model.generate(
                **inputs,
                max_new_tokens=length,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
            answers += _answers(out, inputs["input_ids"].shape[1], lvlm)
    return answers


def _answers(out: Any, prompt: int, lvlm: FrozenLVLM) -> list[Answer]:
    ids = out.sequences[:, prompt:].tolist()
    best = torch.stack(out.scores, 1).topk(2, -1).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    end = lvlm.model.generation_config.eos_token_id
    answers = []
    for line, gap in zip(ids, gaps, strict=True):
        stop = line.index(end) + 1 if end in line else len(line)
        answers.append(Answer(line[:stop], gap[:stop]))
    return answers


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=str(folder), **{**ENGINE, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def chat(sample: Sample) -> list[dict[str, Any]]:
    """One user turn with the images before the question."""
    images = [{"type": "image_pil", "image_pil": image} for image in sample.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": sample.question}]}]


def ask(llm: Any, samples: Sequence[Sample], length: int = LENGTH) -> list[list[int]]:
    """Greedy ids of the engine, all questions queued at once."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=length)
    outputs = llm.chat([chat(sample) for sample in samples], how, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class Match(NamedTuple):
    """How many answers are equal, and how many others are excused by a near tie."""

    equal: int
    excused: int
    wrong: list[int]  # numbers of the questions

    @property
    def line(self) -> str:
        return f"{self.equal} equal, {self.excused} excused, {len(self.wrong)} wrong"


def compare(answers: Sequence[Answer], served: Sequence[Sequence[int]], tie: float = 1e-3) -> Match:
    """Token by token; a difference is excused where the reference's two best tokens are nearer than
    `tie`."""
    equal, excused, wrong = 0, 0, []
    for number, (answer, ids) in enumerate(zip(answers, served, strict=True)):
        if answer.ids == list(ids):
            equal += 1
            continue
        pairs = zip(answer.ids, ids, strict=False)
        differs = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if differs is not None and answer.gaps[differs] < tie:
            excused += 1
        else:
            wrong.append(number)
    return Match(equal, excused, wrong)


def model_of(llm: Any) -> Any:
    """The model object of an engine in this process."""
    return llm.apply_model(lambda model: model)[0]
