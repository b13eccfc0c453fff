"""What runs keep for each other, from the command line."""

import csv
import json
from pathlib import Path

import pytest
from tests.commands.calls import call

from tprl.commands.train import train
from tprl.pruners.folder import WEIGHTS

TOY = ("model=toy", "dataset=toy", "policy.code_width=0", "logger=none", "trainer=cpu")
SMALL = ("stage.served.limit=6", "stage.calibrate=null")
LFD = (
    *TOY,
    *SMALL,
    "stage=lfd",
    "pruner=cls_attention",
    "stage.demonstrations=12",
    "stage.epochs=1",
)
PPO = (
    *TOY,
    *SMALL,
    "stage=ppo",
    "stage.iterations=2",
    "stage.prompts=8",
    "stage.group=1",
    "stage.advantage=gae",
)


def kept(folder: Path) -> dict[Path, int]:
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def logged(run: Path) -> list[tuple[str, str]]:
    """What every iteration earned, and how far it moved the policy."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            (row["reward/return"], row["ppo/kl"]) for row in csv.DictReader(file) if row["ppo/kl"]
        ]


def test_the_same_run_again_reads_demonstrations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"cache={tmp_path}/cache"
    runs = [call("train", train, tmp_path / "cold", *LFD, cache)]
    assert "demonstrate  [####################] 12/12  0:00<0:00" in capsys.readouterr().out
    before = kept(tmp_path / "cache")
    runs.append(call("train", train, tmp_path / "warm", *LFD, cache))
    assert len({(run / "pruner" / WEIGHTS).read_bytes() for run in runs}) == 1
    assert kept(tmp_path / "cache") == before


@pytest.mark.slow
def test_seeds_and_learning_rates_share_demonstrations(tmp_path: Path) -> None:
    cache = f"cache={tmp_path}/cache"
    runs = [
        call("train", train, tmp_path / "cold", *LFD, cache),
        call("train", train, tmp_path / "none", *LFD),
    ]
    before = kept(tmp_path / "cache")
    assert len({(run / "pruner" / WEIGHTS).read_bytes() for run in runs}) == 1
    call("train", train, tmp_path / "seed", *LFD, cache, "seed=1", "stage.lr=1e-3")
    assert kept(tmp_path / "cache") == before
    call("train", train, tmp_path / "other", *LFD, cache, "pruner=uniform")
    call("train", train, tmp_path / "wider", *LFD, cache, "model.width=40")
    folders = {
        path.parent: json.loads(path.read_text())
        for path in (tmp_path / "cache").glob("*/meta.json")
    }
    assert len(folders) == 3
    about = folders[tmp_path / "cache" / next(iter(before)).parent]
    assert (about["model"]["config"]["name"], about["data"]["split"]) == ("toy", "train")
    assert about["demonstrator"]["config"]["_target_"].endswith("ClsAttentionPruner")


def test_the_same_prompts_again_read_scores(tmp_path: Path) -> None:
    cache = f"cache={tmp_path}/cache"
    ppo = tuple(word.replace("logger=none", "logger=csv") for word in PPO)
    cold = call("train", train, tmp_path / "cold", *ppo, cache)
    before = kept(tmp_path / "cache")
    assert {path.name for path in before} == {"meta.json", "full.0.jsonl"}
    warm = call("train", train, tmp_path / "warm", *ppo, cache)
    # What PPO keeps may be its start: what it logged tells whether it went the same way.
    assert len(logged(cold)) == 2
    assert logged(warm) == logged(cold)
    assert (cold / "pruner" / WEIGHTS).read_bytes() == (warm / "pruner" / WEIGHTS).read_bytes()
    assert kept(tmp_path / "cache") == before


@pytest.mark.slow
def test_runs_of_the_same_prompts_share_scores(tmp_path: Path) -> None:
    cache = f"cache={tmp_path}/cache"
    ppo = tuple(word.replace("logger=none", "logger=csv") for word in PPO)
    cold = call("train", train, tmp_path / "cold", *ppo, cache)
    before = kept(tmp_path / "cache")
    assert logged(call("train", train, tmp_path / "none", *ppo)) == logged(cold)
    assert logged(
        call("train", train, tmp_path / "rate", *ppo, cache, "stage.lr_actor=1e-2")
    ) != logged(cold)
    assert kept(tmp_path / "cache") == before
