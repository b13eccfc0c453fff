"""A lock ends with the process that took it, whatever children that has left behind."""

import logging
import multiprocessing
import os
import signal
from errno import ENOLCK
from pathlib import Path

import pytest

from tprl.runtime import locks
from tprl.runtime.locks import lock

fork = multiprocessing.get_context("fork")


def test_one_that_is_killed_leaves_no_lock_to_its_forked_worker(tmp_path: Path) -> None:
    ready, locked = fork.Pipe(duplex=False)
    end, stop = fork.Pipe(duplex=False)

    def own() -> None:
        with (tmp_path / "file").open("ab") as file:
            lock(file, False, "")
            file.write(b"once")  # in the buffer, which the fork copies
            if os.fork() == 0:
                locked.send("worker")
                end.recv()
                file.flush()
                locked.send("worker has flushed")
                os._exit(0)
            file.flush()
            locked.send("owner")
            signal.pause()

    owner = fork.Process(target=own)
    owner.start()
    assert {ready.recv(), ready.recv()} == {"owner", "worker"}
    with (tmp_path / "file").open("ab") as file:
        assert not lock(file, False, "")
        owner.kill()
        owner.join()
        assert lock(file, False, "")  # the worker still runs
        stop.send("")
        assert ready.recv() == "worker has flushed"
    assert (tmp_path / "file").read_bytes() == b"once"


def test_a_file_system_without_locks_is_said_and_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with caplog.at_level(logging.WARNING), (tmp_path / "file").open("ab") as file:
        assert lock(file, True, "nobody is kept out")
    assert "file: file locks do not work here" in caplog.text
    assert "nobody is kept out" in caplog.text
