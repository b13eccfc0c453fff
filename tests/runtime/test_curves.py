"""What the report's learning curves are made of."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tprl.errors import UserError
from tprl.runtime.curves import CURVES, Curves, read_curves, write_curves

TRAINING, HELD_OUT = (
    f"autoencoder, share of variance lost: {name}" for name in ("training", "held out")
)
TITLES = ({"autoencoder/mse": TRAINING}, {"autoencoder/val_mse": HELD_OUT})


class Falling(pl.LightningModule):
    """Logs 1, 2, 3, ... after its batches, and ten times as much on validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.count = torch.nn.Parameter(torch.zeros(())), 0

    @property
    def samples_seen(self) -> int:
        return 4 * self.trainer.global_step

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.count += 1
        self.log("autoencoder/mse", float(self.count))
        self.log("something/else", 7.0)
        return self.weight * 1.0

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("autoencoder/val_mse", 10.0 * self.count)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(curves: Curves, directory: Path, epochs: int, **options: Any) -> pl.Trainer:
    data = DataLoader(TensorDataset(torch.zeros(8, 1)), 4)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[curves],
        default_root_dir=directory,
        accelerator="cpu",
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(Falling(), data, data, **options)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_training_is_followed_batch_by_batch_and_validation_epoch_by_epoch(tmp_path: Path) -> None:
    curves = Curves(*TITLES)
    fitted(curves, tmp_path, epochs=2)
    assert curves.points == {
        TRAINING: [(4.0, 1.0), (8.0, 2.0), (12.0, 3.0), (16.0, 4.0)],
        HELD_OUT: [(8.0, 20.0), (16.0, 40.0)],  # nothing of the check before training
    }


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_has_the_whole_curve(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    fitted(Curves(*TITLES), tmp_path, epochs=1).save_checkpoint(path)
    curves = Curves(*TITLES)
    fitted(curves, tmp_path, epochs=2, ckpt_path=path)
    assert [seen for seen, _ in curves.points[TRAINING]] == [4, 8, 12, 16]


def test_curves_are_kept_beside_the_run(tmp_path: Path) -> None:
    curves = {"ppo, accuracy: served": [(4.0, 0.25), (8.0, 1 / 3)]}
    assert read_curves(tmp_path) == {}
    write_curves(tmp_path, curves)
    assert read_curves(tmp_path) == curves
    for damaged in ('{"a": [1]}', "[]", '{"a'):
        (tmp_path / CURVES).write_text(damaged)
        with pytest.raises(UserError, match=r"curves\.json is damaged"):
            read_curves(tmp_path)
