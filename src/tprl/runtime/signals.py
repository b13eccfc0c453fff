"""Ctrl-C and SIGTERM: what is under way is finished and saved, where that makes sense; a second
signal stops at once.

SLURM preempts and cancels with SIGTERM, torchrun passes both on to its ranks.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """This process was asked to stop. Like KeyboardInterrupt no Exception, so that nothing takes it
    for a failure.

    Args:
        number: the signal.
        saved: what has been saved just before, in words; empty if nothing has.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved


class _Requests:
    """Whether a stop was asked for, and whether it has to wait for the end of an iteration."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.waits = False

    def handle(self, number: int, frame: Any) -> None:
        # The second signal gets what the system does by default.
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if not self.waits:
            raise Stopped(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing this iteration and saving; the same again stops at once\n")


_requests = _Requests()


@contextmanager
def listening() -> Generator[None, None, None]:
    """While it lasts, signals raise `Stopped`, or wait for `wait(False)` and `asked`. In a thread
    they do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Handlers of whoever called come back, also after an error.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    take_over()
    try:
        yield
    finally:
        _requests.number, _requests.waits = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def take_over() -> None:
    """Be the only one who handles the signals (again: Lightning puts a handler of its own before
    ours, which under DDP starts a broadcast wherever the signal finds it)."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _requests.handle)


def wait(until_asked: bool) -> None:
    """Whether a signal has to wait until somebody looks at `asked`."""
    _requests.waits = until_asked


def asked() -> int | None:
    """The signal that has come, if one has."""
    return _requests.number


def ignore(_: int = 0) -> None:
    """In a worker process: a signal to the whole group is its parent's business, which ends it in
    time."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
