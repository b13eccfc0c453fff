"""Two ranks do what one process does: the same gradients, weights, metrics and tables (see
`rank_runs`)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.rank_runs import STAGES
from tests.stages.toy_runs import same
from torch import Tensor

ROOT = Path(__file__).parents[2]


# What these do on two ranks the other kinds of advantage do as well.
SLOW = ("lagrange", "grpo")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three processes for all stages that are asked for: starting them takes longest."""
    folder = tmp_path_factory.mktemp("ranks")
    selected: Any = [item for item in request.session.items if item.path == request.path]
    stages = [name for name in STAGES if any(f"[{name}]" in item.name for item in selected)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-m", "tests.stages.rank_runs", str(folder), *stages]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def apart(item: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert item.keys() == other.keys()
    return max(float((item[name] - other[name]).abs().max()) for name in item)


@pytest.mark.parametrize(
    "stage",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STAGES],
)
def test_a_stage_on_two_ranks_is_the_stage_on_one(stage: str, runs: Path) -> None:
    alone, first, second = (
        torch.load(runs / f"{stage}.{name}.pt") for name in ("1.0", "2.0", "2.1")
    )
    assert same(first["weights"], second["weights"])
    assert same(first["best"], second["best"])
    assert first["curves"] == second["curves"]
    assert apart(alone["gradient"], first["gradient"]) < 1e-6
    assert apart(alone["weights"], first["weights"]) < 1e-6
    assert apart(alone["start"], alone["weights"]) > 1e-4
    # a mean over steps, rank by rank
    loose: dict[str, Any] = {"ppo/ratio_max": 1e-2} if stage == "lagrange" else {}
    for name, value in alone["metrics"].items():
        if name.startswith("time/") or name.endswith("_per_second"):
            continue
        expected = pytest.approx(value, abs=loose.get(name, 1e-5), nan_ok=True)
        assert first["metrics"][name] == second["metrics"][name] == expected, name


@pytest.mark.parametrize("file", ["results.csv", "samples.jsonl", "evaluation.json", "paired.json"])
def test_an_evaluation_on_two_ranks_writes_the_files_of_one(file: str, runs: Path) -> None:
    content = (runs / "evaluation.1" / file).read_bytes()
    assert (runs / "evaluation.2" / file).read_bytes() == content
    assert len(content) > 100  # not two empty files
