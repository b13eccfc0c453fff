"""Files that are complete or not there: written beside their place, forced to disk, renamed.

Those that a later process loads again are sealed: a checksum of each is kept in the folder
`.sums` beside it, in a file that `sha256sum -c` reads. Rows that are appended carry their own.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PART = ".part"  # what a killed process may leave behind: `sweep` removes it
SUMS, SUFFIX = ".sums", ".sha256"
ROW = re.compile(rb'\["([0-9a-f]{64})", (.*)\]', re.DOTALL)


class Damaged(ValueError):
    """A file does not hold what was written to it; the message says how that shows."""


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A path in the same folder; the file written there takes the place of `path` at the end, or
    never if that fails.

    Whatever happens, at `path` is the old file or the new one, whole. Other ranks of a run may
    write it too.

    Raises:
        OSError: the folder cannot be written or is full; the error names `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Force a file to disk and give it its name: after a crash or a power cut it is there as a
    whole or not at all."""
    _sync(part)
    part.replace(path)
    # not every file system can; the rename then lasts once it gets round to it
    with suppress(OSError):
        _sync(path.parent)


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace a file by `content` (text in UTF-8).

    Raises:
        OSError: it cannot be written; the old file is untouched.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


# --- checksums ------------------------------------------------------------------------------------


def write_sealed(path: Path, content: str | bytes | memoryview) -> None:
    """`write_atomically`, with a checksum by which `check` and `read_sealed` recognize the content.

    Raises:
        OSError: it cannot be written; the old file is untouched and still counts as whole.
    """
    with sealing(path, content):
        write_atomically(path, content)


@contextmanager
def sealing(path: Path, content: str | bytes | memoryview) -> Generator[None, None, None]:
    """Note the checksum of `content`, which the body puts in the place of `path`.

    A process may be killed between any two writes. Until the body has ended, the checksums of the
    old and of the new content stand side by side, so whichever file is there counts as whole.
    Only one process at a time may write a path.

    Raises:
        OSError: the checksum cannot be written; the error names `path`.
    """
    sums = _sums(path)
    try:
        # Old checksums first, old and new together while the file changes, new ones last.
        before = _noted(path) or []
    except Damaged:
        before = []
    if not before and path.is_file():  # written before there were checksums
        before = [_checksum_of_file(path)]
    after = checksum(content)
    _write_sums(sums, path, [*dict.fromkeys([*before, after])])
    yield
    _write_sums(sums, path, [after])


def check(path: Path) -> None:
    """Compare a file with its checksum. A file of an older version has none, and passes.

    Raises:
        Damaged: they differ.
        OSError: the file cannot be read.
    """
    _verified(path, lambda: path, _checksum_of_file)


def read_sealed(path: Path) -> bytes:
    """The content of a file, compared with its checksum as `check` does.

    Raises:
        Damaged: they differ.
        OSError: the file cannot be read.
    """
    return _verified(path, path.read_bytes, checksum)


def remove(path: Path) -> None:
    """Delete a file, if it is there, and its checksum."""
    path.unlink(missing_ok=True)
    _sums(path).unlink(missing_ok=True)


def checksum(content: str | bytes | memoryview) -> str:
    """SHA-256 in hexadecimal digits, of text in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def sealed_row(value: Any) -> bytes:
    """A line of JSON, `["<checksum>", <value>]`, for files that are appended to."""
    text = json.dumps(value)
    return f'["{checksum(text)}", {text}]'.encode()


def open_row(line: bytes) -> Any:
    """The value of a line that `sealed_row` made, or of a plain object of an older version.

    Raises:
        Damaged: the line was cut or changed.
    """
    # The checksum is of the bytes of the value, which are parsed only when they are whole.
    if line.startswith(b"{"):  # no checksum
        return _parsed(line)
    match = ROW.fullmatch(line)
    if match is None or checksum(match[2]) != match[1].decode():
        raise Damaged("it was cut or changed")
    return _parsed(match[2])


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Damaged(str(error)) from error


def _sums(path: Path) -> Path:
    return path.parent / SUMS / f"{path.name}{SUFFIX}"


def _noted(path: Path) -> list[str] | None:
    """The checksums that a file may have, or None if none was ever noted.

    Raises:
        Damaged: the file of checksums holds none.
    """
    sums = _sums(path)
    try:
        lines = sums.read_text(encoding="ascii", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    noted = [line.partition(" ")[0] for line in lines]
    if not noted or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in noted):
        raise Damaged(f"its checksum in {sums} is unreadable; without that file it loads unchecked")
    return noted


def _verified(path: Path, read: Callable[[], T], digest: Callable[[T], str]) -> T:
    """What `read` gives, once its digest is among the noted ones."""
    while True:
        noted, content = _noted(path), read()
        if noted is None or digest(content) in noted:
            return content
        if _noted(path) == noted:  # otherwise another process is just replacing the file
            if not path.stat().st_size:
                raise Damaged("it is empty")
            where = f"{SUMS}/{_sums(path).name}"
            raise Damaged(f"its content differs from its checksum in {where}")


def _checksum_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_sums(sums: Path, path: Path, digests: list[str]) -> None:
    try:
        sums.parent.mkdir(exist_ok=True)
        write_atomically(sums, "".join(f"{digest}  {path.name}\n" for digest in digests))
    except OSError as error:
        error.filename = str(path)
        raise


def sweep(folder: Path) -> None:
    """Remove what killed writers left; nobody else may be writing there."""
    for leftover in folder.rglob(f"*{PART}"):
        leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
