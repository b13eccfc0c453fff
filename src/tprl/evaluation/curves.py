"""Learning curves of the report, followed while a stage trains."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

Points = list[tuple[float, float]]
# What is logged after a batch, or a validation: how the report calls it; lines of one plot share the words before the
# colon.
TRAINING = {
    "autoencoder/mse": "autoencoder, share of variance lost: training",
    "lfd/loss": "lfd, nats per decision",
    "reward/return": "ppo, return of an episode",
    "adapt/loss": "adapt, divergence in nats: training",
}
HELD_OUT = {
    "autoencoder/val_mse": "autoencoder, share of variance lost: held out",
    "adapt/val_loss": "adapt, divergence in nats: held out",
}


class Curves(pl.Callback):
    """Collects (samples seen, value) of the metrics above; checkpoints hold it, for resumed runs."""

    def __init__(self) -> None:
        self.points: dict[str, Points] = {}
        self.batches = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        self._note(trainer, pl_module, TRAINING)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, pl_module, HELD_OUT)

    def _note(self, trainer: pl.Trainer, module: Any, names: Mapping[str, str]) -> None:
        seen = module.samples_seen if hasattr(module, "samples_seen") else self.batches * module.hparams["batch_size"]
        for name, title in names.items():
            if name in trainer.callback_metrics:
                self.points.setdefault(title, []).append((float(seen), float(trainer.callback_metrics[name])))

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points, self.batches = state_dict["points"], state_dict["batches"]
