"""The engine's likelihoods of answers are those of `FrozenLVLM.score`, whatever tokens are kept,
and PPO is rewarded by them."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_vllm.engines import questions

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.serving.engine import EngineReading
from tprl.splice import splice
from tprl.types import TokenSelection

ROOT = Path(__file__).parents[1]
TRAIN = (
    *("-m", "src.train", "stage=ppo", "stage.init_from=tprl_tiny_llava", "logger=csv"),
    *("trainer=cpu", "threads=1", "cache=null", "stage.iterations=2", "stage.prompts=6"),
    *("stage.group=4", "stage.minibatch=24", "stage.update_epochs=1", "stage.validate_every=2"),
    *("stage.served.limit=20", "stage.served.keep_ratios=[0.1111]", "stage.calibrate=null"),
)


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def reader(lvlm: FrozenLVLM) -> Iterator[EngineReading]:
    from vllm.distributed import cleanup_dist_env_and_memory

    reader = load_component("scorer", "vllm", lvlm=lvlm)
    try:
        yield reader
    finally:
        reader.llm.llm_engine.engine_core.shutdown()
        del reader
        cleanup_dist_env_and_memory()


def test_it_leaves_random_numbers_and_dtype_alone(lvlm: FrozenLVLM, reader: Any) -> None:
    torch.manual_seed(7)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    samples = questions(2)
    reader.score(splice_of(lvlm, samples, "keep_all", 1.0), [s.answers[0] for s in samples])
    assert torch.get_rng_state().equal(state)
    assert torch.get_default_dtype() == dtype == torch.float32


def splice_of(lvlm: FrozenLVLM, samples: Any, pruner: str, ratio: float, *positions: str) -> Any:
    encoded = lvlm.encode(samples)
    return splice(encoded, load_component("pruner", pruner).select(encoded, ratio), *positions)


@pytest.mark.parametrize(
    ("pruner", "ratio"), [("random", 1 / 9), ("tprl", 1 / 3), ("keep_all", 1.0)]
)
def test_likelihoods_and_answers_are_equal(
    lvlm: FrozenLVLM, reader: EngineReading, pruner: str, ratio: float
) -> None:
    samples = questions(60, 300)
    answers = [sample.answers[0] for sample in samples]
    prompt = splice_of(lvlm, samples, pruner, ratio)
    ours, theirs = lvlm.score(prompt, answers), reader.score(prompt, answers)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4), (ours[0] - theirs[0]).abs().max()
    assert torch.equal(ours[1], theirs[1])
    assert 0 < int(ours[1].sum()) < len(samples) or pruner == "keep_all"
    assert reader.answer(prompt) == lvlm.answer(prompt)


def test_prompts_that_keep_differently_many_are_read_together(
    lvlm: FrozenLVLM, reader: EngineReading
) -> None:
    samples = questions(12, 400)
    encoded = lvlm.encode(samples)
    counts = torch.tensor([4, 16, 144]).repeat(4).unsqueeze(1)
    keep = torch.arange(encoded.visual_mask.shape[1]) % (144 // counts) == 0
    prompt = splice(encoded, TokenSelection(keep & encoded.visual_mask))
    answers = [sample.answers[0] for sample in samples]
    ours, theirs = lvlm.score(prompt, answers), reader.score(prompt, answers)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)


def test_other_positions_are_other_likelihoods_and_refused(
    lvlm: FrozenLVLM, reader: EngineReading
) -> None:
    samples = questions(20, 300)
    answers = [sample.answers[0] for sample in samples]
    kept, compact = (
        splice_of(lvlm, samples, "random", 1 / 9, positions) for positions in ("keep", "compact")
    )
    # it can fail
    assert (lvlm.score(compact, answers)[0] - lvlm.score(kept, answers)[0]).abs().max() > 1e-3
    with pytest.raises(UserError, match="whose survivors keep their places: use positions=keep"):
        reader.score(compact, answers)


def test_a_prompt_that_is_too_long_is_refused_in_a_sentence(
    lvlm: FrozenLVLM, reader: EngineReading
) -> None:
    (sample,) = questions(1)
    long = sample._replace(question="is there a red circle? " * 200)
    with pytest.raises(UserError, match=r"^vLLM refuses a prompt of tiny_llava: "):
        reader.score(splice_of(lvlm, [long], "keep_all", 1.0), ["yes"])


def trained(directory: Path, *words: str) -> list[dict[str, float]]:
    """The rows of metrics.csv of a training in a process of its own."""
    command = [sys.executable, *TRAIN, *words, f"hydra.run.dir={directory}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    with (directory / "metrics.csv").open() as lines:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]


def test_two_steps_of_ppo_are_rewarded_as_by_the_model_itself(tmp_path: Path) -> None:
    ours, theirs = trained(tmp_path / "a"), trained(tmp_path / "b", "scorer=vllm")
    names = sorted(k for k in ours[0] if k.startswith(("reward/", "ppo/served")))
    compared = 0
    for mine, its in zip(ours, theirs, strict=True):
        for name in set(names) & mine.keys():
            assert its[name] == pytest.approx(mine[name], abs=1e-3), name
            compared += 1
    assert compared >= 4
