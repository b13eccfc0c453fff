"""Checkpoints come at the end of every n-th batch, not one later."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tests.stages.toy_runs import ppo

from tprl.checkpoint import LAST, SaveEvery


class Diary(pl.Callback):
    """The iteration of the newest checkpoint, seen after every batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        there = self.path.is_file()
        self.seen.append(torch.load(self.path, weights_only=True)["ppo"]["iteration"] if there else 0)


def test_every_second_iteration(tmp_path: Path) -> None:
    diary = Diary(tmp_path / LAST)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SaveEvery(tmp_path, 2), diary],
    )  # fmt: skip
    trainer.fit(ppo(iterations=5))
    assert diary.seen == [0, 2, 2, 4, 4]
