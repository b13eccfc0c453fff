"""Files that several processes fill, that survive what ends a process, and that are never read
half-written."""

import json
import logging
import math
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import time
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tprl.errors import UserError
from tprl.runtime.files import SUMS
from tprl.runtime.store import Cache, Record, Shards, claim, commit, opened

fork = multiprocessing.get_context("fork")


def square(first: int, stop: int) -> dict[str, Tensor]:
    return {"x": torch.arange(first, stop) ** 2}


def contents(shards: Shards) -> list[int]:
    values: list[int] = []
    for path in shards.paths:
        with opened(path) as file:
            values += file.get_tensor("x").tolist()
    return values


class Making:
    """`square`, with a list of what was made."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, first: int, stop: int) -> dict[str, Tensor]:
        self.made.append(first)
        return square(first, stop)


def started(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=work)
    process.start()
    return process


def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise TimeoutError


class TestShards:
    def test_are_made_once_and_read_back(self, tmp_path: Path) -> None:
        making, seen = Making(), list[tuple[int, int]]()
        for _ in range(2):
            Shards(tmp_path, 25, 10).fill(making, lambda *now: seen.append(now))
        assert contents(Shards(tmp_path, 25, 10)) == [i * i for i in range(25)]
        assert making.made == [0, 10, 20]
        assert seen == [(10, 25), (20, 25), (25, 25)]
        assert sorted(tmp_path.glob("*.safetensors")) == Shards(tmp_path, 25, 10).paths

    def test_more_rows_use_the_whole_ones_that_are_there(self, tmp_path: Path) -> None:
        making = Making()
        Shards(tmp_path, 25, 10).fill(making)
        Shards(tmp_path, 40, 10).fill(making)
        assert making.made == [0, 10, 20, 20, 30]
        assert contents(Shards(tmp_path, 40, 10)) == [i * i for i in range(40)]

    def test_processes_share_the_work_and_read_the_same(self, tmp_path: Path) -> None:
        """Each shard is made by one of them, and none returns before all are there."""
        shards, notes = Shards(tmp_path / "shards", 120, 10), tmp_path / "notes"
        shards.folder.mkdir()
        notes.mkdir()

        def work() -> None:
            def make(first: int, stop: int) -> dict[str, Tensor]:
                (notes / f"made-{first}-{os.getpid()}").touch()
                # all are at it
                until(lambda: len({path.name.split("-")[2] for path in notes.glob("made-*")}) == 3)
                time.sleep(0.01)
                return square(first, stop)

            shards.fill(make)
            (notes / f"read-{os.getpid()}").write_text(
                str(contents(shards) == [i * i for i in range(120)])
            )

        processes = [started(work) for _ in range(3)]
        for process in processes:
            process.join(60)
        names = [path.name.split("-") for path in notes.glob("made-*")]
        assert sorted(int(first) for _, first, _ in names) == list(range(0, 120, 10))
        assert [path.read_text() for path in notes.glob("read-*")] == ["True"] * 3
        assert not list(shards.folder.glob("*.part"))

    def test_after_kill_9_the_next_goes_on(self, tmp_path: Path) -> None:
        shards = Shards(tmp_path, 40, 10)
        torn = tmp_path / f"{shards.paths[2].name}.part"

        def work() -> None:
            def make(first: int, stop: int) -> dict[str, Tensor]:
                if first == 20:
                    torn.write_bytes(b"half a fi")
                    time.sleep(60)
                return square(first, stop)

            shards.fill(make)

        process = started(work)
        until(lambda: torn.exists() and torn.stat().st_size == 9)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        assert torn.exists()
        making = Making()
        shards.fill(making)
        assert making.made == [20, 30]
        assert contents(shards) == [i * i for i in range(40)]
        assert not torn.exists()

    def test_takes_over_from_one_that_is_killed_while_we_wait(self, tmp_path: Path) -> None:
        shards, claimed = Shards(tmp_path, 20, 10), tmp_path / "claimed"

        def work() -> None:
            with claim(shards.paths[0]):
                claimed.touch()
                until(lambda: shards.paths[1].exists())
                time.sleep(0.05)
                os._exit(9)

        process = started(work)
        until(claimed.exists)
        making = Making()
        shards.fill(making)
        process.join(10)
        assert making.made == [10, 0]
        assert contents(shards) == [i * i for i in range(20)]

    @pytest.mark.parametrize("length", [0, 7, -1])
    def test_a_damaged_one_is_made_again_and_named(
        self, length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shards, making = Shards(tmp_path, 30, 10), Making()
        shards.fill(square)
        whole = shards.paths[1].read_bytes()
        shards.paths[1].write_bytes(whole[:length])
        with caplog.at_level(logging.WARNING):
            shards.fill(making)
        assert making.made == [10]
        # wandb's console of a test before may speak, too
        records = [record for record in caplog.records if record.name.startswith("tprl")]
        messages = [record.getMessage() for record in records]
        assert messages == [f"{shards.paths[1]} is damaged: its rows are computed again"]
        assert shards.paths[1].read_bytes() == whole

    @pytest.mark.parametrize("fault", ["gone", "short"])
    def test_one_that_is_lost_while_it_is_used_is_one_sentence(
        self, fault: str, tmp_path: Path
    ) -> None:
        shards = Shards(tmp_path, 10, 10)
        shards.fill(square)
        if fault == "gone":
            shards.paths[0].unlink()
        else:
            shards.paths[0].write_bytes(b"")
        with pytest.raises(
            UserError, match=r"00000000-00000010\.safetensors was deleted or damaged .* start again"
        ):
            contents(shards)


class TestFullDisk:
    def test_is_noticed_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
        large = {"x": torch.zeros(100, 1000, dtype=torch.uint8)}
        with pytest.raises(
            UserError, match=r"needs about 0\.001 GB for the 1000 questions .* has 0\.0005 GB free"
        ):
            Shards(tmp_path, 1000, 100).fill(lambda first, stop: large)
        assert not list(tmp_path.iterdir())
        Shards(tmp_path, 400, 100).fill(lambda first, stop: large)

    def test_only_what_is_missing_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = {"x": torch.zeros(100, 1000, dtype=torch.uint8)}
        Shards(tmp_path, 800, 100).fill(lambda first, stop: large)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=250_000))
        filled = list[int]()
        Shards(tmp_path, 1000, 100).fill(lambda first, stop: filled.append(first) or large)
        assert filled == [800, 900]

    def test_half_way_leaves_what_is_complete(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shards, sync = Shards(tmp_path, 30, 10), os.fsync

        def full(descriptor: int) -> None:
            if shards.paths[0].exists() and os.path.samestat(os.fstat(descriptor), part.stat()):
                raise OSError(ENOSPC, "No space left on device")
            sync(descriptor)

        part = tmp_path / f"{shards.paths[1].name}.part"
        part.touch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                UserError, match=r"cannot write .*00000010-00000020\.safetensors \(No space left"
            ):
                shards.fill(square)
        assert sorted(os.listdir(tmp_path)) == [SUMS, shards.paths[0].name]
        making = Making()
        shards.fill(making)
        assert making.made == [10, 20]


class TestCache:
    def test_a_folder_for_every_key_with_the_key_in_words(self, tmp_path: Path) -> None:
        item = Cache(tmp_path, {"model": {"name": "a"}})
        folders = [
            item.folder("scores", seed=0),
            item.folder("scores", seed=1),
            item.folder("codes", seed=0),
            Cache(tmp_path, {"model": {"name": "b"}}).folder("scores", seed=0),
        ]
        assert len(set(folders)) == 4
        assert item.folder("scores", seed=0) == folders[0]
        assert json.loads((folders[0] / "meta.json").read_text()) == {
            "format": 1,
            "model": {"name": "a"},
            "seed": 0,
        }
        assert [path.name for path in folders[0].iterdir()] == ["meta.json"]

    def test_a_place_that_cannot_be_written_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(
            UserError, match=r"cannot write .*file/x-.* \(Not a directory\): .*cache=<folder>"
        ):
            Cache(tmp_path / "file", {}).folder("x")

    def test_a_claim_is_exclusive_and_leaves_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with claim(path) as part, claim(path, wait=False) as other:
            assert other is None
            commit(part, path, b"contents")
        assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [
            ("file", b"contents")
        ]
        with pytest.raises(ZeroDivisionError), claim(path):
            raise ZeroDivisionError
        assert [item.name for item in tmp_path.iterdir()] == ["file"]


class TestRecord:
    def test_values_come_back_bit_for_bit(self, tmp_path: Path) -> None:
        value = [float(torch.tensor(0.1)), -1e-30, math.nan]
        Record(tmp_path / "r").add({"a/ü": value, "b": "two\nlines"})
        Record(tmp_path / "r").add({"c": None})
        values = Record(tmp_path / "r").known
        assert values["a/ü"][:2] == value[:2]
        assert math.isnan(values["a/ü"][2])
        assert values == {"a/ü": values["a/ü"], "b": "two\nlines", "c": None}

    def test_a_batch_is_lost_as_a_whole(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A batch that is half known would be measured in another batch, and rounded otherwise."""
        path = tmp_path / "r"
        Record(path).add({"a": 1, "b": 2})
        Record(path).add({"c": 3, "d": 4})
        path.write_bytes(path.read_bytes()[:-4])
        with caplog.at_level(logging.WARNING):
            again = Record(path)
        assert again.known == {"a": 1, "b": 2}
        assert f"{path}, line 2 is damaged: it is measured again" in caplog.text
        again.add({"c": 3, "d": 4})
        assert Record(path).known == {"a": 1, "b": 2, "c": 3, "d": 4}

    def test_processes_append_whole_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "r"

        def work(number: int) -> None:
            record = Record(path)
            for i in range(50):
                record.add({f"{number}/{i}": "x" * 5000})

        processes = [started(lambda n=n: work(n)) for n in range(3)]
        for process in processes:
            process.join(60)
        assert len(Record(path).known) == 150
        assert len(path.read_bytes().splitlines()) == 150

    def test_without_a_file_it_is_only_memory(self) -> None:
        record = Record()
        record.add({"a": 1})
        assert record.known == {"a": 1}
