"""Progress of long steps: one line now and then, with rate and ETA, readable in a terminal and in a log."""

import time
from typing import Any

import lightning.pytorch as pl
import torch


class Progress:
    """Call it with (done, total); prints at most about `lines` lines, and always the last."""

    def __init__(self, label: str, lines: int = 10) -> None:
        self.label, self.lines, self.start, self.shown = label, lines, time.monotonic(), 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done < total and done * self.lines < (self.shown + 1) * total:
            return
        self.shown = done * self.lines // total
        spent = time.monotonic() - self.start
        left = spent / max(done, 1) * (total - done)
        bar = "#" * (20 * done // total)
        print(f"{self.label:12} [{bar:20}] {done}/{total}  {clock(spent)}<{clock(left)}  {note}".rstrip(), flush=True)


class FitProgress(pl.Callback):
    """`Progress` over the batches of a fit, with the metrics that a stage marks for the progress bar.

    Args:
        label: name of the stage.
        total: batches; None asks the trainer when training starts.
        done: batches of an earlier, interrupted run.
    """

    def __init__(self, label: str, total: int | None = None, done: int = 0) -> None:
        self.label, self.total, self.done = label, total, done
        self.progress = Progress(label)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress = Progress(self.label)
        if self.total is None:
            self.total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.total is not None
        self.done += 1
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        if trainer.is_global_zero:
            self.progress(self.done, self.total, "  ".join(f"{k} {float(v):.3f}" for k, v in shown.items()))


class Stopwatch:
    """Seconds of the phases of something that repeats; starts when made.

    Args:
        device: whose queued work belongs to the phase that queued it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.start = self._now()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was `phase`."""
        now = self._now()
        self.seconds[phase], self.start = now - self.start, now

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
