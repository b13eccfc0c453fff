"""One kind of lock between processes, for a run's directory as for the files of a cache."""

import logging
import os
from typing import IO
from weakref import WeakSet

from filelock import lock_descriptor

log = logging.getLogger(__name__)
POLL = 0.01  # seconds between two attempts while another process holds the lock
_locked_files: WeakSet[IO[bytes]] = WeakSet()


def lock(file: IO[bytes], wait: bool, without: str) -> bool:
    """Lock an open file until it is closed. The system ends the lock with its process, however that
    ends; forked children do not inherit it.

    Args:
        file: open for writing.
        wait: for another process that holds the lock; otherwise give up at once.
        without: what follows where the file system knows no locks; the work then goes on.

    Returns:
        False where another process holds the lock and we do not wait.
    """
    _locked_files.add(file)
    try:
        return lock_descriptor(file.fileno(), blocking=wait, poll_interval=POLL)
    except OSError as error:
        log.warning("%s: file locks do not work here (%s), %s", file.name, error, without)
        return True


def _release_in_child() -> None:
    """A lock belongs to the open file, which a fork shares: a worker that outlives a killed run
    would go on holding it. In the child, the descriptor leads nowhere instead."""
    files = [file for file in _locked_files if not file.closed]
    if not files:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in files:
        # Not closed: what is in the child's copy of the buffer must not reach the file twice.
        os.dup2(nowhere, file.fileno(), inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_release_in_child)
