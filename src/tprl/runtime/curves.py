"""Learning curves of the report, followed while a stage trains and kept beside its config."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tprl.errors import UserError
from tprl.runtime.files import read_sealed, write_sealed

Points = list[tuple[float, float]]
CURVES = "curves.json"  # of a training run: name -> [[samples seen, value], ...]


def write_curves(run: Path, curves: Mapping[str, Points]) -> None:
    """Keep the curves of a training for the reports of later evaluations."""
    write_sealed(run / CURVES, json.dumps(curves) + "\n")


def read_curves(run: Path) -> dict[str, Points]:
    """What `write_curves` wrote; nothing where the run was trained before there was such a file.

    Raises:
        UserError: the file is damaged.
    """
    path = run / CURVES
    if not path.is_file():
        return {}
    try:
        curves = json.loads(read_sealed(path))
        return {name: _points(points) for name, points in curves.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and the report leaves the curves out."
        ) from error


def _points(pairs: Sequence[Sequence[float]]) -> Points:
    return [(float(x), float(y)) for x, y in pairs]


class Curves(pl.Callback):
    """Collects (samples seen, value) of the metrics that a stage names; checkpoints hold it, for
    resumed runs. A stage that names any has `samples_seen`.

    Args:
        training, held_out: metric logged after a batch, or a validation -> how the report calls its
            curve.
    """

    def __init__(self, training: Mapping[str, str], held_out: Mapping[str, str]) -> None:
        self.training, self.held_out = training, held_out
        self.points: dict[str, Points] = {}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._note(trainer, pl_module, self.training)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, pl_module, self.held_out)

    def _note(self, trainer: pl.Trainer, module: Any, names: Mapping[str, str]) -> None:
        for name, title in names.items():
            if name in trainer.callback_metrics:
                point = float(module.samples_seen), float(trainer.callback_metrics[name])
                self.points.setdefault(title, []).append(point)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]
