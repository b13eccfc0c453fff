"""Files of every kind that a later process loads: cut, overwritten, with flipped bytes, empty."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.stages.toy_runs import policy

from tprl.errors import UserError
from tprl.evaluation.results import (
    Row,
    SampleRow,
    read_facts,
    read_results,
    read_samples,
    write_results,
    write_samples,
)
from tprl.pruners.learned import load_pruner
from tprl.runtime import run_directory
from tprl.runtime.checkpoint import KEY, Finished, checkpoint_of, save
from tprl.runtime.curves import read_curves, write_curves
from tprl.runtime.files import SUMS, write_sealed
from tprl.runtime.metrics_csv import MetricsCSV
from tprl.runtime.run_directory import DONE, LAST, PARTS, SETTINGS, STARTED
from tprl.runtime.store import Record, Shards, opened


def flipped(content: bytes) -> bytes:
    """One bit of 64 bytes in the middle, or of half of a short file."""
    count = min(64, len(content) // 2)
    start = (len(content) - count) // 2
    middle = bytes(byte ^ 1 for byte in content[start : start + count])
    return content[:start] + middle + content[start + count :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "head": lambda content: (
        b"\x00" * min(16, len(content) // 2) + content[min(16, len(content) // 2) :]
    ),
    "flipped": flipped,
    "empty": lambda content: b"",
}
every_damage = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


def checkpoint(part: str) -> dict[str, Any]:
    return {KEY: {"part": part}, "parts": ["lfd"], "state": {}, "weights": torch.arange(4096.0)}


def metrics(folder: Path, checksum: bool = True) -> MetricsCSV:
    logger = MetricsCSV(folder, name="", version="")
    for step in range(5):
        logger.log_metrics({"ppo/loss": step / 3}, step)
    logger.save()
    return logger


def keep_metrics(folder: Path) -> None:
    whole = metrics(folder.parent / "whole")
    MetricsCSV(folder, name="", version="").keep(**whole.mark())


ROW = Row("toy", "toy", "tprl", 0, 0.5, 3.0, "accuracy", 0.25, 0.125, 0.5, 1e9, 0.5)
SAMPLE = SampleRow("a", "color", "tprl", 0, 0.5, "red", 1.0, 3)
# What writes a file of this name into a folder, and what reads it.
KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    LAST: (lambda at: save(checkpoint("ppo"), at / LAST), lambda at: checkpoint_of(at, "ppo")),
    PARTS: (lambda at: save(checkpoint("lfd"), at / PARTS), lambda at: Finished(at, resume=True)),
    "model.safetensors": (lambda at: policy().save_pretrained(at), load_pruner),
    "config.json": (lambda at: policy().save_pretrained(at), load_pruner),
    STARTED: (lambda at: run_directory.begin(at, ["seed=1"]), run_directory.settings_of),
    DONE: (
        lambda at: run_directory.finish(at, ["seed=1"], 2.0),
        lambda at: run_directory.settings_of(at, DONE),
    ),
    SETTINGS: (
        lambda at: write_sealed(at / SETTINGS, "seed: 1\nstage:\n  keep_ratio: 0.333\n"),
        lambda at: run_directory.read_yaml(at / SETTINGS, "copy it again"),
    ),
    "metrics.csv": (metrics, keep_metrics),
    "curves.json": (lambda at: write_curves(at, {"lfd": [(1.0, 0.5)]}), read_curves),
    "samples.jsonl": (
        lambda at: write_samples(at / "samples.jsonl", [SAMPLE] * 3),
        lambda at: read_samples(at / "samples.jsonl"),
    ),
    "results.csv": (
        lambda at: write_results(at / "results.csv", [ROW] * 3),
        lambda at: read_results(at / "results.csv"),
    ),
    "evaluation.json": (
        lambda at: write_sealed(
            at / "evaluation.json", json.dumps({"dataset": "toy", "questions": 10})
        ),
        lambda at: read_facts(at / "evaluation.json"),
    ),
}


@every_damage
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_reported_with_the_file_and_the_remedy(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    write, read = KINDS[name]
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    read(folder)  # whole, it loads
    path = folder / name
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    with pytest.raises(UserError) as caught:
        read(folder)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} is damaged (")
    assert sentence.partition("): ")[2].startswith(("move", "copy", "remove"))
    assert "\n" not in sentence
    assert path.read_bytes() == broken  # nothing is deleted


@pytest.mark.parametrize("name", [LAST, PARTS])
@pytest.mark.parametrize(
    "damage", [DAMAGE["cut"], DAMAGE["head"], DAMAGE["empty"]], ids=["cut", "head", "empty"]
)
def test_checkpoints_of_an_older_version_too(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    torch.save(checkpoint("ppo"), tmp_path / name)
    assert checkpoint_of(tmp_path, "ppo") == (str(tmp_path / LAST) if name == LAST else None)
    Finished(tmp_path, resume=True)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(
        UserError, match=rf"{name} is damaged \(.*\): move {name} away and give resume="
    ):
        Finished(tmp_path, resume=True)


class TestTheWayOn:
    def broken(self, folder: Path, name: str) -> str:
        save(checkpoint("ppo"), folder / name)
        (folder / name).write_bytes(b"x")
        with pytest.raises(UserError) as caught:
            Finished(folder, resume=True)
        return str(caught.value)

    def test_after_the_parts_that_are_whole(self, tmp_path: Path) -> None:
        save(checkpoint("lfd"), tmp_path / PARTS)
        assert "parts.ckpt is whole, and the run goes on after the last part in it." in self.broken(
            tmp_path, LAST
        )
        (tmp_path / LAST).rename(tmp_path / "last.damaged")
        assert Finished(tmp_path, resume=True).parts == ["lfd"]

    def test_from_the_newest_pruner_that_is_whole(self, tmp_path: Path) -> None:
        for stage in ("autoencoder", "lfd", "pruner"):
            policy().save_pretrained(tmp_path / stage)
        assert f"stage.init_from={tmp_path}/pruner" in self.broken(tmp_path, PARTS)
        (tmp_path / "pruner/model.safetensors").write_bytes(b"x")
        assert f"stage.init_from={tmp_path}/lfd" in self.broken(tmp_path, PARTS)
        with pytest.raises(
            UserError, match=rf"or use {tmp_path}/lfd of the same run, which is whole"
        ):
            load_pruner(tmp_path)

    def test_anew_where_nothing_is_left(self, tmp_path: Path) -> None:
        assert self.broken(tmp_path, LAST).endswith(
            "nothing earlier is saved, and the run starts anew."
        )

    def test_a_table_of_metrics_that_was_moved_away_is_missed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        mark = metrics(tmp_path).mark()
        (tmp_path / "metrics.csv").unlink()
        MetricsCSV(tmp_path, name="", version="").keep(**mark)
        assert (
            "metrics.csv is gone: the 5 rows before this point are missing from it" in caplog.text
        )

    def test_settings_that_were_edited_on_purpose(self, tmp_path: Path) -> None:
        policy().save_pretrained(tmp_path)
        about = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(about | {"quality": 3.0}))
        with pytest.raises(UserError, match=r"if you edited it yourself, delete its checksum\.$"):
            load_pruner(tmp_path)
        (tmp_path / SUMS / "config.json.sha256").unlink()
        assert load_pruner(tmp_path).serving.quality == 3.0


class TestCaches:
    @every_damage
    def test_a_shard_is_made_again_and_named(
        self, damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def make(first: int, stop: int) -> dict[str, torch.Tensor]:
            return {"x": torch.arange(first, stop)}

        shards = Shards(tmp_path, 200, 100)
        shards.fill(make)
        path = shards.paths[1]
        path.write_bytes(damage(path.read_bytes()))
        counts: list[int] = []
        shards.fill(lambda first, stop: counts.append(first) or make(first, stop))
        assert counts == [100]
        assert f"{path} is damaged: its rows are computed again" in caplog.text
        with opened(path) as file:
            assert file.get_tensor("x").tolist() == list(range(100, 200))

    @every_damage
    def test_scores_and_answers_are_measured_again(
        self, damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "answers.jsonl"
        for name in "abc":
            Record(path).add({name: [0.25, -1.5]})
        lines = path.read_bytes().splitlines()
        lines[1] = damage(lines[1])
        path.write_bytes(b"\n".join(lines) + b"\n")
        caplog.set_level(logging.WARNING)
        assert Record(path).known == {"a": [0.25, -1.5], "c": [0.25, -1.5]}
        assert f"{path}, line 2 is damaged: it is measured again" in caplog.text

    def test_a_digit_that_changed_is_not_believed(self, tmp_path: Path) -> None:
        Record(tmp_path / "r").add({"a": 0.25})
        (tmp_path / "r").write_bytes((tmp_path / "r").read_bytes().replace(b"0.25", b"0.35"))
        assert Record(tmp_path / "r").known == {}


def test_a_config_of_a_run_without_settings(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("nonsense")
    with pytest.raises(UserError, match=r"config\.yaml is damaged \(it holds no settings\): copy"):
        run_directory.read_yaml(tmp_path / SETTINGS, "copy it again")
    write_sealed(tmp_path / SETTINGS, OmegaConf.to_yaml({"seed": 0}))
    assert run_directory.read_yaml(tmp_path / SETTINGS, "copy it again") == {"seed": 0}
