"""Progress of long steps: one line now and then, with rate and ETA, readable in a terminal and in a log."""

import time
from typing import Any

import lightning.pytorch as pl

from tprl import ranks


class Progress:
    """Call it with (done, total); rank 0 prints at most about `lines` lines, and always the last.

    Args:
        label: what is done.
        done: what an earlier, interrupted run did; rate and ETA are of this one.
    """

    def __init__(self, label: str, lines: int = 10, done: int = 0) -> None:
        self.label, self.lines, self.start, self.shown, self.before = label, lines, time.monotonic(), 0, done

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if ranks.rank() or (done < total and done * self.lines < (self.shown + 1) * total):
            return
        self.shown = done * self.lines // total
        spent = time.monotonic() - self.start
        rate = max(done - self.before, 1) / max(spent, 1e-3)
        bar, times = "#" * (20 * done // total), f"{clock(spent)}<{clock((total - done) / rate)}"
        print(f"{self.label:12} [{bar:20}] {done}/{total}  {times}  {rate:.3g}/s  {note}".rstrip(), flush=True)


class FitProgress(pl.Callback):
    """`Progress` over the batches of a fit, with the metrics that a stage marks for the progress bar.

    Args:
        label: name of the stage.
        total: batches; None asks the trainer when training starts.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.progress = Progress(label)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.done = trainer.fit_loop.epoch_loop.batch_progress.total.ready  # those of a run that this one goes on with
        self.progress = Progress(self.label, done=self.done)
        if self.total is None:
            self.total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.total is not None
        self.done += 1
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        self.progress(self.done, self.total, "  ".join(f"{k} {float(v):.3f}" for k, v in shown.items()))


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
