"""Files that are complete or not there: written beside their place, forced to disk, renamed."""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # what a killed process may leave behind: `sweep` removes it


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A path in the same folder; the file written there takes the place of `path` at the end, or never if that fails.

    Whatever happens, at `path` is the old file or the new one, whole. Other ranks of a run may write it too.

    Raises:
        OSError: the folder cannot be written or is full; the error names `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        with suppress(OSError):  # not every file system can; the rename then lasts once it gets round to it
            _sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace a file by `content` (text in UTF-8).

    Raises:
        OSError: it cannot be written; the old file is untouched.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


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
