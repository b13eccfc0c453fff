"""The stages on the toy model, as the tests run them."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tests.stages.plain import build_stage
from torch import Tensor

from tprl.data.toy import ToyDataset
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.tprl import TPRL
from tprl.rewards import WeightedReward
from tprl.rewards.score_change import ScoreChange
from tprl.rewards.tokens_saved import TokensSaved
from tprl.scoring.validation import ServedScore
from tprl.stages.ppo import PPO

WIDTH = 24
SMALL = 1 / 12  # 2 of 24 tokens


@lru_cache
def lvlm() -> ToyLVLM:
    return ToyLVLM(width=WIDTH)


def policy(seed: int = 0, select: str = "topk", **options: Any) -> TPRL:
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "code_width": 0,
        "positions": False,
    }
    return TPRL(WIDTH, select=select, **(size | options))


def served(limit: int = 24, keep_ratios: Sequence[float] = (SMALL,)) -> ServedScore:
    return ServedScore(lvlm(), ToyDataset("val"), keep_ratios, limit)


def ppo(pruner: TPRL | None = None, kind: type[PPO] = PPO, **options: Any) -> PPO:
    """Two iterations of eight questions, one step, exactly two tokens kept, unless told
    otherwise."""
    live: dict[str, Any] = {
        "pruner": pruner or policy(),
        "lvlm": lvlm(),
        "dataset": ToyDataset(),
        # A free budget keeps everything unless tokens cost something.
        "reward": WeightedReward(
            [ScoreChange(), *([TokensSaved(1e-3)] if options.get("budget") == "free" else [])]
        ),
    }
    small: dict[str, Any] = {
        "iterations": 2,
        "prompts": 8,
        "steps": 1,
        "keep_ratio": SMALL,
        "lr_actor": 1e-2,
        "lr_critic": 1e-2,
        "minibatch": 4,
        "update_epochs": 2,
        "kl_stop": 1e9,
    }
    if "served" not in options:
        options["served"] = served()
    return build_stage(kind, **(live | small | options))


def fit(
    stage: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any
) -> pl.Trainer:
    """Train a stage without any output."""
    settings: dict[str, Any] = {"enable_checkpointing": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=stage.epochs,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(stage, ckpt_path=ckpt_path)
    return trainer


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Metrics(pl.Callback):
    """What was logged at every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


class SaveAt(pl.Callback):
    """Saves a checkpoint inside the run, after `batch` training batches."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


class LastWeights(pl.Callback):
    """The pruner's weights when training ended, before the best ones are put back."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = weights(pl_module.pruner)
