"""What is expensive to compute and used often, on disk: complete or not there, shared by all
processes that need it."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tprl.errors import UserError
from tprl.runtime.files import Damaged, check, open_row, put_in_place, sealed_row, sealing
from tprl.runtime.locks import lock

log = logging.getLogger(__name__)
FORMAT = 1  # raise it when the same key comes to mean other contents
NO_LOCKS = "what two processes make at once is the same, only made twice"
REMEDY = (
    "free space or choose another disk with cache=<folder>; "
    "what is complete stays, and the next run goes on there"
)


@dataclass(frozen=True)
class Cache:
    """Folders named by a digest of all that their contents depend on, so that different contents
    never meet.

    Args:
        root: where the folders lie; `meta.json` in each says in words what it is of.
        about: what every content depends on (the LVLM, the data); plain values.
    """

    root: Path
    about: Mapping[str, Any]

    def folder(self, kind: str, **more: Any) -> Path:
        """The folder of one kind of content, which depends on `about` and `more`; made if it is not
        there.

        Raises:
            UserError: it cannot be written.
        """
        # Sorted keys: the same facts give the same digest.
        meta = json.dumps({"format": FORMAT, **self.about, **more}, indent=1, sort_keys=True)
        folder = self.root / f"{kind}-{hashlib.blake2b(meta.encode(), digest_size=8).hexdigest()}"
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        about = folder / "meta.json"
        if not about.exists():
            with claim(about) as part:
                commit(part, about, meta.encode())
        return folder


class Shards:
    """Rows 0 .. `rows` in safetensors files of `size` rows, `<first>-<stop>.safetensors`.

    Whoever needs the shards makes those that are missing, and all processes that do so at the same
    time share them out: each shard belongs to the process that holds the lock of its `.part` file
    (see `claim`). A shard is renamed into place when it is complete, so one that is there can be
    read without a lock.
    """

    def __init__(self, folder: Path, rows: int, size: int) -> None:
        self.folder, self.rows = folder, rows
        self.ranges = [(first, min(first + size, rows)) for first in range(0, rows, size)]
        self.paths = [folder / f"{first:08d}-{stop:08d}.safetensors" for first, stop in self.ranges]

    def fill(
        self,
        make: Callable[[int, int], dict[str, Tensor]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make the shards that are missing or damaged.

        A damaged one (its checksum differs, or its size from what its header says) is made again
        and logged: all of it can be recomputed, and a sweep need not stop for it.

        Args:
            make: the contents of rows first .. stop.
            progress: told (rows there, rows in all) after each shard.

        Raises:
            UserError: the disk has no room for what is missing, or cannot be written.
        """
        # Two rounds: what nobody works on, then what others had not finished.
        left = [place for place, path in enumerate(self.paths) if not _intact(path)]
        wait = False
        while left:
            others: list[int] = []
            for place in left:
                with claim(self.paths[place], wait) as part:
                    if part is None:
                        others.append(place)
                    elif not _intact(self.paths[place]):
                        self._make(place, part, make)
                if progress is not None and place not in others:
                    progress(self.done, self.rows)
            # those that others were at: done by now, or their process is gone
            left, wait = others, True

    @property
    def done(self) -> int:
        """Rows in files that are there."""
        return sum(
            stop - first
            for (first, stop), path in zip(self.ranges, self.paths, strict=True)
            if path.exists()
        )

    def _make(
        self, place: int, part: BinaryIO, make: Callable[[int, int], dict[str, Tensor]]
    ) -> None:
        # A claimed shard that exists is damaged: intact ones are not made again.
        first, stop = self.ranges[place]
        if self.paths[place].exists():
            log.warning("%s is damaged: its rows are computed again", self.paths[place])
        # Room for all that is missing is asked for at the first shard, not when the disk is full.
        contents = save(make(first, stop))
        missing = self.rows - self.done
        needed = len(contents) * missing // (stop - first)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder} needs about {needed / 1e9:.2g} GB for the {missing} questions "
                f"that are missing, and its disk has {free / 1e9:.2g} GB free: {REMEDY}."
            )
        with _writing(self.paths[place]), sealing(self.paths[place], contents):
            commit(part, self.paths[place], contents)


class Record:
    """What was measured of samples, by uid: in memory, and in a file of JSON lines where a path is
    given.

    A line holds what was measured together and its checksum, so what a killed process wrote is
    there as a whole or not at all: a batch that is measured again is the same batch, with the same
    rounding. A line that does not fit its checksum is logged and measured again. Few bytes per
    sample: the file is read as a whole.

    Args:
        path: several processes may append to it at the same time; each reads what was there when it
            began.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.known = path, dict[str, Any]()
        lines = path.read_bytes().splitlines() if path is not None and path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                # the first value stands: it has been used
                self.known = {**open_row(line), **self.known}
            except Damaged:  # its writer was killed, the power failed, or the disk lost bits
                log.warning("%s, line %d is damaged: it is measured again", path, number)

    def add(self, measured: Mapping[str, Any]) -> None:
        """Remember values that JSON can hold; floats come back bit for bit."""
        self.known.update(measured)
        if self.path is None:
            return
        with _writing(self.path), self.path.open("a+b") as file:
            lock(file, wait=True, without=NO_LOCKS)  # released when the file is closed
            # A killed writer may have left half a line: the next one starts on its own.
            torn = file.seek(0, os.SEEK_END) > 0 and _last_byte(file) != b"\n"
            file.write(b"\n" * torn + sealed_row(dict(measured)) + b"\n")


@contextmanager
def claim(path: Path, wait: bool = True) -> Iterator[Any]:
    """The right to write `path`: its `.part` file, open and locked. None where another process has
    it and we do not wait. The system takes the lock from a process that ends, however it ends."""
    part = path.with_name(f"{path.name}.part")
    while True:
        with _writing(part):
            file = part.open("ab")  # does not truncate what another process may be writing
        with file:
            if not lock(file, wait, NO_LOCKS):
                yield None
                return
            if not _is_file(file, part):
                continue  # it was renamed into place while we waited for it
            try:
                yield file
            finally:
                if _is_file(file, part):  # not committed
                    part.unlink()
            return


def commit(part: BinaryIO, path: Path, contents: bytes) -> None:
    """Write a claimed file and put it in its place: after a crash or a power cut it is there as a
    whole or not at all.

    Raises:
        UserError: it cannot be written; the disk may be full.
    """
    with _writing(path):
        part.truncate(0)
        part.write(contents)
        part.flush()
        put_in_place(Path(part.name), path)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A shard, memory-mapped: `get_tensor(name)` costs no memory but for the parts that are read.

    Raises:
        UserError: it is gone or damaged.
    """
    try:
        file = safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"{path} was deleted or damaged while it was in use: start again, and it is remade."
        ) from error
    with file as tensors:
        yield tensors


def _intact(path: Path) -> bool:
    """Whether a shard is there, as long as its header says, and what was written."""
    try:
        check(path)
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, Damaged, SafetensorError):
        return False


def _is_file(file: BinaryIO, path: Path) -> bool:
    """Whether that open file is what now has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The system's refusals as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): {REMEDY}.") from error
