"""Checkpoints of a stage: saved at the end of an iteration, complete or not at all."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tprl.errors import UserError

LAST = "last.ckpt"


class SaveEvery(pl.Callback):
    """Writes `last.ckpt` every `every` training batches (Lightning's own callback counts optimiser steps, whose number
    per iteration varies in PPO)."""

    def __init__(self, directory: Path, every: int) -> None:
        self.path, self.every = directory / LAST, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # This batch is counted as completed only after the callbacks.
        if (trainer.fit_loop.epoch_loop.batch_progress.total.completed + 1) % self.every == 0:
            temporary = self.path.with_suffix(".part")
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:  # every rank takes part in saving, one of them has written the file
                temporary.replace(self.path)


def last_checkpoint(run: str) -> str:
    """The checkpoint of a run that stopped half-way.

    Raises:
        UserError: there is none.
    """
    path = Path(run) / LAST
    if not path.is_file():
        raise UserError(f"resume={run} holds no {LAST}: give the directory of a run that was interrupted.")
    return str(path)
