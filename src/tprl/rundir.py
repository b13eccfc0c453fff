"""A run's directory: who works in it, with which settings, how far it got."""

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path

from tprl.errors import UserError
from tprl.files import sweep, write_atomically

STARTED, DONE, FAILED, LOCK = "started.json", "done.json", "FAILED", ".lock"
LAST, PARTS = "last.ckpt", "parts.ckpt"  # the stage that is being trained, and the parts of the run before it
ANSWERS = "answers-*.jsonl"  # what an evaluation has answered so far
log = logging.getLogger(__name__)


@contextmanager
def locked(directory: Path) -> Generator[None, None, None]:
    """Work alone in a directory. The system ends the lock with its process, so a killed run leaves none.

    A record lock, not flock: worker processes forked meanwhile do not inherit it.

    Raises:
        UserError: another process works there.
        OSError: the directory cannot be written.
    """
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                other = os.read(descriptor, 1000).decode().strip() or "another process"
                raise UserError(
                    f"{directory} is in use by {other}: wait for it, stop it, or choose another folder with "
                    "hydra.run.dir=<folder>."
                ) from None
            log.warning("%s: file locks do not work here (%s), a second run in it would go unnoticed", directory, error)
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %T')})".encode()
        )
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def begin(directory: Path, overrides: Sequence[str]) -> None:
    """Mark a directory as that of a run with these settings that has not finished."""
    sweep(directory)
    for name in (DONE, FAILED):
        (directory / name).unlink(missing_ok=True)
    record = {"overrides": list(overrides), "started": time.strftime("%F %T%z")}
    write_atomically(directory / STARTED, json.dumps(record, indent=1) + "\n")


def forget(directory: Path) -> None:
    """Remove the checkpoints and answers of an earlier run, so that nobody goes on with them."""
    for path in _unfinished(directory):  # before done.json: other ranks look for both
        path.unlink(missing_ok=True)


def finish(directory: Path, overrides: Sequence[str], seconds: float) -> None:
    """Mark the run as finished; its checkpoints have done their work."""
    (directory / FAILED).unlink(missing_ok=True)
    record = {"overrides": list(overrides), "finished": time.strftime("%F %T%z"), "seconds": seconds}
    write_atomically(directory / DONE, json.dumps(record, indent=1) + "\n")
    forget(directory)


def settings_of(directory: Path, marker: str = STARTED) -> list[str] | None:
    """The settings on the command line of a run; None where no run began (or, for `DONE`, finished).

    Raises:
        UserError: the marker is damaged.
    """
    path = directory / marker
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())["overrides"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another folder with hydra.run.dir.") from error


def interrupted(directory: Path) -> bool:
    """Whether there is something to go on with."""
    return any(path.is_file() for path in _unfinished(directory)) and not (directory / DONE).is_file()


def _unfinished(directory: Path) -> list[Path]:
    return [directory / LAST, directory / PARTS, *directory.glob(ANSWERS)]


def copy(run: Path, directory: Path) -> None:
    """A run that is to go on elsewhere: everything it has written so far."""
    own = shutil.ignore_patterns(LOCK, ".hydra", "*.log", "*.part")
    shutil.copytree(run, directory, dirs_exist_ok=True, ignore=own)
