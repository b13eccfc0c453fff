"""Progress of long steps, with rate and ETA: a live bar in a terminal, now and then a line in a
log."""

import os
import sys
import time
from itertools import pairwise
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from tprl.runtime import distributed


def in_terminal() -> bool:
    """Whether a person looks on: stdout is a terminal, and no continuous integration (the variable
    CI) records it."""
    return sys.stdout.isatty() and not os.environ.get("CI")


class Progress:
    """Call it with (done, total). As a context it also clears up after an error.

    In a terminal this is one bar. Elsewhere at most about `lines` lines are printed, and always the
    last. Of several ranks the first one shows it.

    Args:
        label: what is being done.
        lines: how many lines at most.
        before: what was done earlier, and took none of the time.
    """

    def __init__(self, label: str, lines: int = 10, before: int = 0) -> None:
        self.label, self.lines, self.before, self.shown = label, lines, before, 0
        self.start = time.monotonic()
        self.bar: Bar | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if distributed.rank():
            return None
        if in_terminal():
            return self._draw(done, total, note)
        # A line whenever another 1 / `lines` of the whole is done, and at the end.
        if done < total and done * self.lines < (self.shown + 1) * total:
            return None
        self.shown = done * self.lines // max(total, 1)
        print(self._line(done, total, note), flush=True)
        return None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and give the cursor back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _draw(self, done: int, total: int, note: str) -> None:
        # The bar appears with the first step, since the total is not known earlier.
        if self.bar is None:
            self.bar = _bar()
            self.bar.add_task(self.label, total=total, completed=self.before, rest="", note="")
            self.bar.start()
        left = self._rest(time.monotonic() - self.start, done, total) if done > self.before else ""
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, rest=left, note=note)
        # A finished bar is closed at once, so that what is printed next stands below it.
        if done >= total:
            self.close()

    def _line(self, done: int, total: int, note: str) -> str:
        spent, bar = time.monotonic() - self.start, "#" * (20 * done // max(total, 1))
        left = self._rest(spent, done, total)
        return f"{self.label:12} [{bar:20}] {done}/{total}  {clock(spent)}<{left}  {note}".rstrip()

    def _rest(self, spent: float, done: int, total: int) -> str:
        """Time to go at the rate until now, and that rate."""
        # What an earlier run has done took no time of this one.
        rate = max(done - self.before, 1) / max(spent, 1e-3)
        return f"{clock((total - done) / rate)}  {rate:.3g}/s"


def _bar() -> Bar:
    return Bar(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("< {task.fields[rest]}"),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(highlight=False),
    )


class FitProgress(pl.Callback):
    """`Progress` over the batches of a fit, with the metrics that a stage marks for the progress
    bar.

    Args:
        label: name of the stage.
        total: batches; None asks the trainer when training starts.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.progress = Progress(label)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # those of a run that this one goes on with
        self.done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.progress = Progress(self.label, before=self.done)
        # Only now does the trainer know its number of batches.
        if self.total is None:
            self.total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self.total is not None
        self.done += 1
        # v_num is the number of the run in Lightning, not a metric.
        metrics = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        note = "  ".join(f"{name} {float(value):.3f}" for name, value in metrics.items())
        self.progress(self.done, self.total, note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.progress.close()


class Stopwatch:
    """Seconds of the phases of something that repeats; starts when made. On a GPU its own clock is
    read: nobody waits before the seconds are asked for.

    Args:
        device: whose queued work belongs to the phase that queued it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: list[str] = []
        self.marks = [self._mark()]

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was `phase`."""
        self.phases.append(phase)
        self.marks.append(self._mark())

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; waits until all that was queued before the last lap is done."""
        # The last mark is reached after all earlier marks, so a single wait is enough.
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
        pairs = zip(self.phases, pairwise(self.marks), strict=True)
        return {phase: _between(before, after) for phase, (before, after) in pairs}

    def _mark(self) -> Any:
        """A point in the work that is queued, or in time where the device has no such points."""
        if self.device.type != "cuda":
            return seconds(self.device)
        # An event joins the queue of the device and does not stop the host.
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _between(before: Any, after: Any) -> float:
    # Events measure milliseconds, clocks seconds.
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1000


def seconds(device: torch.device) -> float:
    """What a clock shows when everything queued on the device is done."""
    # Without this wait the clock would show when work was queued, not when it was done.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def clock(spent: float) -> str:
    """Minutes and seconds."""
    return f"{int(spent) // 60}:{int(spent) % 60:02d}"
