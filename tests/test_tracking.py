"""What W&B gets, read back from the files of an offline run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tprl.evaluation.results import Row
from tprl.tracking import log_results, wandb_logger


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("mode", "key", "offline"), [(None, None, True), (None, "k", False), ("online", None, False)])
def test_offline_without_a_key(
    mode: str | None, key: str | None, offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("WANDB_MODE", mode), ("WANDB_API_KEY", key)):
        if value:
            monkeypatch.setenv(name, value)
    assert wandb_logger(tmp_path)._offline is offline


def row(pruner: str, kept: float, metric: str, value: float, seed: int = 0) -> Row:
    return Row("toy", "toy", pruner, seed, kept / 16, kept, metric, value, 0.0, 1.0, 1e6, kept / 20)


def read_back(folder: Path) -> list[dict[str, object]]:
    """Records of the only offline run in a folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_an_offline_run_holds_the_table_of_the_evaluation(tmp_path: Path) -> None:
    import wandb

    rows = [row("tprl", 8.0, "accuracy", 0.75), row("tprl", 8.0, "mean_iou", 0.5)]
    rows.append(row("random", 4.0, "accuracy", 0.25, seed=1))
    log_results(wandb_logger(tmp_path), rows)
    wandb.finish()
    wandb.teardown()  # the file may be unflushed before
    records = read_back(tmp_path)
    text = json.dumps([record for record in records if record["type"] == "history"])
    for name in ("eval/tprl/accuracy", "eval/tprl/mean_iou", "eval/random/seed1/flops_ratio", "eval/results"):
        assert name in text
    assert "0.75" in text
    axes = json.dumps([record for record in records if record["type"] == "metric"])
    for name in ("eval/tprl/accuracy", "eval/random/seed1/flops_ratio"):
        assert name in axes
    assert "kept_tokens" in axes
