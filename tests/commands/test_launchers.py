"""Sweeps by Hydra's launchers: every job in a directory of its own, finished ones skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = (
    "stage=lfd",
    "model=toy",
    "dataset=toy",
    "pruner=cls_attention",
    "policy.code_width=0",
    "policy.select=topk",
)
SHORT = (
    "stage.demonstrations=20",
    "stage.epochs=1",
    "stage.served.limit=10",
    "stage.calibrate=null",
    "logger=wandb",
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_do_not_collide_and_finished_jobs_are_skipped(launcher: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "src.train",
        "-m",
        f"hydra/launcher={launcher}",
        "hydra.sweep.dir=sweep",
        *TOY,
        *SHORT,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> None:
        done = subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    start("seed=0,1")
    jobs = [tmp_path / "sweep" / str(number) for number in range(2)]
    records = [json.loads((job / "done.json").read_text()) for job in jobs]
    assert ["seed=0" in record["overrides"] for record in records] == [True, False]
    assert all((job / "pruner" / "model.safetensors").is_file() for job in jobs)
    assert all(len(list((job / "wandb").glob("offline-run-*"))) == 1 for job in jobs)
    start("seed=0,1,2")
    assert records == [json.loads((job / "done.json").read_text()) for job in jobs]
    assert (tmp_path / "sweep" / "2" / "done.json").is_file()
