"""Stage `lfd`: learning from demonstrations. The policy imitates a heuristic, decision by decision."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tprl.data.demonstrations import Demonstrations, demonstrate
from tprl.evaluation.served import ServedScore
from tprl.pruners.learned import LearnedPruner
from tprl.types import LVLM, Dataset, Pruner


class LfD(pl.LightningModule):
    """Binary cross-entropy on the demonstrator's keep / prune decisions, a mean over the tokens alive (TPRL, stage 2).

    The checkpoint kept is that of the epoch with the best served score on validation.

    Args:
        pruner: the learner.
        lvlm, dataset: the frozen model and the training split.
        demonstrator: the heuristic; never one that knows the answer.
        served: the validation score.
        demonstrations: questions to demonstrate.
        keep_ratio: final kept fraction, or several (each question gets one).
        steps: T pruning steps per demonstration.
        progressive: kept shares of what is alive, instead of keep_ratio and steps (reference: 0.8, 0.6, 0.4).
        epochs, batch_size, lr, clip: AdamW; reference: 5, 128, 5e-5, 1.0.
        seed: order and draws.
        log_as: what the names of its metrics begin with.
    """

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: Dataset,
        demonstrator: Pruner,
        served: ServedScore,
        demonstrations: int = 5000,
        keep_ratio: float | Sequence[float] = (0.3333, 0.2222, 0.1111),
        steps: int = 1,
        progressive: Sequence[float] | None = None,
        epochs: int = 5,
        batch_size: int = 128,
        lr: float = 5e-5,
        clip: float = 1.0,
        seed: int = 0,
        log_as: str = "lfd",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset", "demonstrator", "served"])
        self.pruner, self.lvlm, self.dataset = pruner, lvlm, dataset
        self.demonstrator, self.served, self.epochs, self.clip = demonstrator, served, epochs, clip
        self.demonstrations: Demonstrations | None = None
        self.best, self.best_state, self.samples_seen = -1.0, copy.deepcopy(pruner.state_dict()), 0
        self.curve: list[tuple[float, float]] = []

    @property
    def ratios(self) -> list[float]:
        """Final kept fractions of the demonstrations."""
        h = self.hparams
        if h["progressive"]:
            return [math.prod(h["progressive"])]
        return [h["keep_ratio"]] if isinstance(h["keep_ratio"], float | int) else list(h["keep_ratio"])

    @property
    def trained_to(self) -> float:
        """Largest keep ratio of the training."""
        return max(self.ratios)

    def setup(self, stage: str) -> None:
        h = self.hparams
        self.pruner.train_only("net.", without="net.value_head")
        if self.demonstrations is None:  # several learners may share one set
            self.demonstrations = demonstrate(
                self.demonstrator,
                self.pruner,
                self.lvlm,
                self.dataset,
                h["demonstrations"],
                self.ratios,
                h["steps"],
                h["progressive"],
                h["seed"],
            )

    def train_dataloader(self) -> DataLoader[Demonstrations]:
        assert self.demonstrations is not None
        h = self.hparams
        return DataLoader(_Epochs(self.demonstrations, h["batch_size"], h["seed"], self._epoch), batch_size=None)

    def _epoch(self) -> int:
        """Epochs done. Lightning's own counter still shows the last one when a resumed run asks for its batches."""
        assert self.demonstrations is not None
        return self.samples_seen // len(self.demonstrations.keep_ratio)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.pruner.net.parameters(), lr=self.hparams["lr"])

    def training_step(self, batch: Demonstrations, index: int) -> Tensor:
        loss, agreement = imitation_loss(self.pruner, batch)
        self.samples_seen += len(batch.keep_ratio)
        name = self.hparams["log_as"]
        self.log_dict({f"{name}/loss": loss, f"{name}/agreement": agreement}, batch_size=len(batch.keep_ratio))
        self.log("samples_seen", float(self.samples_seen))
        return loss

    def on_train_epoch_end(self) -> None:
        score = self.served(self.pruner)
        served = f"{self.hparams['log_as']}/served"
        self.log_dict({f"{served}/{name}": value for name, value in score.items()})
        self.log(served, score["accuracy"], prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))
        self.curve.append((float(self.samples_seen), score["accuracy"]))
        if score["accuracy"] > self.best:
            self.best, self.best_state = score["accuracy"], copy.deepcopy(self.pruner.state_dict())

    def on_fit_end(self) -> None:
        self.pruner.load_state_dict(self.best_state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lfd"] = {"samples_seen": self.samples_seen, "best": self.best, "best_state": self.best_state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["lfd"]
        self.samples_seen, self.best, self.best_state = saved["samples_seen"], saved["best"], saved["best_state"]


def imitation_loss(pruner: LearnedPruner, batch: Demonstrations) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(cross-entropy, share of equal decisions), means over alive tokens, then samples, then steps."""
    x = batch.x._replace(codes=batch.x.codes.float(), query=batch.x.query.float())
    alive, losses, equal = x.mask, [], []
    for t, keep in enumerate(batch.keep):
        logits = pruner.net(x, alive, t, batch.keep_ratio)[0]
        count = alive.sum(1).clamp(min=1)
        error = F.binary_cross_entropy_with_logits(logits, keep.float(), reduction="none")
        losses.append(((error * alive).sum(1) / count).mean())
        equal.append(((((logits > 0) == keep) & alive).sum(1) / count).mean())
        alive = keep
    return torch.stack(losses).mean(), torch.stack(equal).mean().detach()


class _Epochs(IterableDataset[Demonstrations]):
    """Batches of one epoch; every epoch has its own order, also after a resume."""

    def __init__(self, demonstrations: Demonstrations, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.demonstrations, self.batch_size, self.seed, self.epoch = demonstrations, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.demonstrations.keep_ratio) // self.batch_size)

    def __iter__(self) -> Iterator[Demonstrations]:
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        return self.demonstrations.batches(self.batch_size, order)
