"""A directory belongs to one process at a time, and says whether there is something to go on
with."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tprl.errors import UserError
from tprl.runtime.run_directory import (
    DONE,
    LAST,
    LOCK,
    PARTS,
    STARTED,
    begin,
    copy,
    finish,
    interrupted,
    locked,
    settings_of,
)

HOLD = """
import sys, time
from pathlib import Path
from tprl.runtime.run_directory import locked
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_the_second_process_is_told_who_is_there_and_a_dead_one_leaves_no_lock(
        self, tmp_path: Path
    ) -> None:
        first = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "in\n"
            with (
                pytest.raises(
                    UserError, match=rf"is in use by process {first.pid} on .* hydra\.run\.dir"
                ),
                locked(tmp_path),
            ):
                pass
        finally:
            first.kill()
            first.wait()
        with locked(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
        assert (tmp_path / LOCK).read_text() == ""

    def test_a_forked_worker_that_outlives_its_run_does_not_hold_it(self, tmp_path: Path) -> None:
        code = (
            f"{HOLD.partition('with')[0]}import os\nread, write = os.pipe()\nwith "
            "locked(Path(sys.argv[1])):\n    if os.fork():\n        os.read(read, 1)\n"
            "    else:\n        os.write(write, b'x')\n        time.sleep(5)"
        )
        started = time.monotonic()
        parent = subprocess.Popen([sys.executable, "-c", f"{code}\n    os._exit(0)", str(tmp_path)])
        parent.wait()
        assert time.monotonic() - started < 5  # the child still sleeps
        with locked(tmp_path):
            pass


class TestMarkers:
    def test_a_run_from_its_start_to_its_end(self, tmp_path: Path) -> None:
        assert settings_of(tmp_path) is None
        begin(tmp_path, ["seed=1"])
        assert settings_of(tmp_path) == ["seed=1"]
        assert not interrupted(tmp_path)  # nothing to go on with yet
        for name in (LAST, PARTS):
            (tmp_path / name).write_text("x")
            assert interrupted(tmp_path)
        finish(tmp_path, ["seed=1"], 2.0)
        assert not interrupted(tmp_path)
        assert settings_of(tmp_path, DONE) == ["seed=1"]
        assert not (tmp_path / LAST).exists()
        begin(tmp_path, ["seed=2"])
        assert not (tmp_path / DONE).exists()

    def test_a_damaged_marker_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / STARTED).write_text('{"over')
        with pytest.raises(UserError, match=r"started\.json is damaged"):
            settings_of(tmp_path)

    def test_a_copy_leaves_out_what_belongs_to_the_place(self, tmp_path: Path) -> None:
        old = tmp_path / "old"
        (old / "pruner").mkdir(parents=True)
        for name in (LAST, LOCK, "train.log", "pruner/config.json", "last.ckpt.3.part"):
            (old / name).write_text("x")
        copy(old, tmp_path / "new")
        there = {
            str(path.relative_to(tmp_path / "new"))
            for path in (tmp_path / "new").rglob("*")
            if path.is_file()
        }
        assert there == {LAST, "pruner/config.json"}
