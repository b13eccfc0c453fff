"""A run's directory: who works in it, with which settings, how far it got."""

import json
import os
import shutil
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from tprl.errors import UserError
from tprl.runtime.files import Damaged, check, read_sealed, remove, sweep, write_sealed
from tprl.runtime.locks import lock
from tprl.runtime.quoting import escaped

STARTED, DONE, FAILED, LOCK = "started.json", "done.json", "FAILED", ".lock"
SETTINGS = "config.yaml"  # the resolved config
# the stage that is being trained, and the parts of the run before it
LAST, PARTS = "last.ckpt", "parts.ckpt"
EDITED = "; if you edited it yourself, delete its checksum"
STAGES = ("pruner", "lfd", "autoencoder")  # folders of the pruner after a stage, newest first
ANSWERS = "answers-*.jsonl"  # what an evaluation has answered so far


@contextmanager
def locked(directory: Path) -> Generator[None, None, None]:
    """Work alone in a directory. The system ends the lock with its process, so a killed run leaves
    none.

    Raises:
        UserError: another process works there.
        OSError: the directory cannot be written.
    """
    with (directory / LOCK).open("a+b") as file:
        if not lock(file, wait=False, without="a second run in it would go unnoticed"):
            file.seek(0)
            other = file.read(1000).decode().strip() or "another process"
            raise UserError(
                f"{directory} is in use by {other}: wait for it, stop it, "
                "or choose another folder with hydra.run.dir=<folder>."
            )
        # Whoever is refused reads who works here.
        since = time.strftime("%F %T")
        owner = f"process {os.getpid()} on {socket.gethostname()} (since {since})"
        file.truncate(0)
        file.write(owner.encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def begin(directory: Path, overrides: Sequence[str]) -> None:
    """Mark a directory as that of a run with these settings that has not finished."""
    # Markers of an earlier run go before its successor says that it has begun.
    sweep(directory)
    for name in (DONE, FAILED):
        remove(directory / name)
    record = {"overrides": list(overrides), "started": time.strftime("%F %T%z")}
    write_sealed(directory / STARTED, json.dumps(record, indent=1) + "\n")


def forget(directory: Path) -> None:
    """Remove the checkpoints and answers of an earlier run, so that nobody goes on with them."""
    for path in _unfinished(directory):  # before done.json: other ranks look for both
        remove(path)


def finish(
    directory: Path, overrides: Sequence[str], seconds: float, result: float | None = None
) -> None:
    """Mark the run as finished; its checkpoints have done their work."""
    (directory / FAILED).unlink(missing_ok=True)
    record = {
        "overrides": list(overrides),
        "finished": time.strftime("%F %T%z"),
        "seconds": seconds,
        "result": result,
    }
    write_sealed(directory / DONE, json.dumps(record, indent=1) + "\n")
    forget(directory)


def settings_of(directory: Path, marker: str = STARTED) -> list[str] | None:
    """The settings on the command line of a run; None where no run began (or, for `DONE`,
    finished).

    Raises:
        UserError: the marker is damaged.
    """
    path = directory / marker
    if not path.is_file():
        return None
    try:
        return [str(word) for word in json.loads(read_sealed(path))["overrides"]]
    except (ValueError, KeyError, TypeError) as error:
        remedy = (
            "move it away to run the job again"
            if marker == DONE
            else "copy it again, or start anew in another folder (hydra.run.dir=<folder>)"
        )
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from error


def result_of(directory: Path) -> float | None:
    """The result of a finished run, where it has one."""
    return json.loads(read_sealed(directory / DONE)).get("result")


def write_settings(directory: Path, config: DictConfig) -> None:
    """Leave the resolved config of a run in its directory."""
    resolved = OmegaConf.to_container(config, resolve=True)
    write_sealed(directory / SETTINGS, OmegaConf.to_yaml(OmegaConf.create(escaped(resolved))))


def read_yaml(
    path: Path, remedy: str, kind: type[DictConfig] | type[ListConfig] = DictConfig
) -> Any:
    """Settings that a run or Hydra has left: a mapping, or a list where `kind` says so.

    Raises:
        UserError: the file is damaged; `remedy` says what to do.
    """
    try:
        content = OmegaConf.create(read_sealed(path).decode())
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}): {remedy}{EDITED}.") from error
    # Of a bare word OmegaConf makes a key without a value.
    values = content.values() if isinstance(content, DictConfig) else []
    empty = kind is DictConfig and all(value is None for value in values)
    if not isinstance(content, kind) or empty:
        raise UserError(f"{path} is damaged (it holds no settings): {remedy}.")
    return content


def ways_on(directory: Path, damaged: Path) -> str:
    """How to go on when a checkpoint of a run is damaged: from its newest state that is whole."""
    aside = f"move {damaged.name} away and give resume={directory} again"
    # From the newest state to the oldest: a part, a pruner, nothing.
    parts = directory / PARTS
    if damaged != parts and _is_whole(parts):
        return f"{aside}; {PARTS} is whole, and the run goes on after the last part in it"
    # No part is whole: the newest pruner may still start another run.
    folders = (directory / name for name in STAGES)
    folder = next(filter(_holds_pruner, folders), None)
    if folder is None:
        return f"{aside}; nothing earlier is saved, and the run starts anew"
    return (
        f"{aside}, and the run starts anew; {folder} is whole, and another run can start from it "
        f"with stage.init_from={folder}"
    )


def other_pruner(folder: Path) -> str:
    """What to do about a damaged pruner in `folder`: another stage of the same run may be whole."""
    others = (
        folder.parent / name for name in STAGES if folder.name in STAGES and name != folder.name
    )
    other = next(filter(_holds_pruner, others), None)
    return "copy it again or train anew" + (
        f", or use {other} of the same run, which is whole" if other else ""
    )


def _is_whole(path: Path) -> bool:
    try:
        check(path)
    except (Damaged, OSError):
        return False
    return path.is_file()


def _holds_pruner(folder: Path) -> bool:
    return all(_is_whole(folder / name) for name in ("model.safetensors", "config.json"))


def interrupted(directory: Path) -> bool:
    """Whether there is something to go on with."""
    return (
        any(path.is_file() for path in _unfinished(directory)) and not (directory / DONE).is_file()
    )


def _unfinished(directory: Path) -> list[Path]:
    return [directory / LAST, directory / PARTS, *directory.glob(ANSWERS)]


def copy(run: Path, directory: Path) -> None:
    """A run that is to go on elsewhere: everything it has written so far."""
    ignored = shutil.ignore_patterns(LOCK, ".hydra", "*.log", "*.part")
    shutil.copytree(run, directory, dirs_exist_ok=True, ignore=ignored)
