"""Stage `lfd`: learning from demonstrations. The policy imitates a heuristic, decision by decision."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tprl import ranks
from tprl.data.demonstrations import Demonstrations, StoredDemonstrations, demonstrate
from tprl.data.store import Cache
from tprl.evaluation.served import ServedScore
from tprl.finite import check_finite
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
        cache: keeps the demonstrations for other runs; None: in a temporary folder.
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
        cache: Cache | None = None,
        log_as: str = "lfd",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset", "demonstrator", "served", "cache"])
        self.pruner, self.lvlm, self.dataset, self.cache = pruner, lvlm, dataset, cache
        self.demonstrator, self.served, self.epochs, self.clip = demonstrator, served, epochs, clip
        self.demonstrations: StoredDemonstrations | None = None
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
                cache=self.cache,
                quiet=self.global_rank > 0,
            )

    def train_dataloader(self) -> DataLoader[Demonstrations]:
        assert self.demonstrations is not None
        h = self.hparams
        return DataLoader(_Epochs(self.demonstrations, h["batch_size"], h["seed"], self._done), batch_size=None)

    def _done(self) -> tuple[int, int]:
        """Epochs, and batches of the next one. Lightning's own counter still shows the last epoch when a resumed run
        asks for its batches."""
        assert self.demonstrations is not None
        epochs, samples = divmod(self.samples_seen, len(self.demonstrations))
        return epochs, samples // self.hparams["batch_size"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.pruner.net.parameters(), lr=self.hparams["lr"])

    def training_step(self, batch: Demonstrations, index: int) -> Tensor:
        assert self.demonstrations is not None
        total, name = len(self.demonstrations), self.hparams["log_as"]
        size = min(self.hparams["batch_size"], total - self.samples_seen % total)  # of all ranks
        loss, agreement = (mean * ranks.weight(size) for mean in imitation_loss(self.pruner, batch))
        seen = f"{self.samples_seen} to {self.samples_seen + size - 1} in this run's order"
        check_finite({f"{name}/loss": loss}, [seen], f"epoch {self._done()[0]}")
        self.samples_seen += size
        self.log_dict({f"{name}/loss": loss, f"{name}/agreement": agreement}, batch_size=size, sync_dist=True)
        self.log("samples_seen", float(self.samples_seen))
        return loss

    def on_train_start(self) -> None:
        """A run that was stopped between the last step of an epoch and its score makes up for the score."""
        if len(self.curve) < self._done()[0]:
            self._validate()

    def on_train_epoch_end(self) -> None:
        self._validate()

    def _validate(self) -> None:
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
        checkpoint["lfd"] = {name: getattr(self, name) for name in ("samples_seen", "best", "best_state", "curve")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["lfd"].items():
            setattr(self, name, value)


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
    """Batches of one epoch, from where a resumed run stopped on; every epoch has its own order."""

    def __init__(
        self, demonstrations: StoredDemonstrations, batch_size: int, seed: int, done: Callable[[], tuple[int, int]]
    ) -> None:
        self.demonstrations, self.batch_size, self.seed, self.done = demonstrations, batch_size, seed, done

    def __len__(self) -> int:
        """Batches of a whole epoch: a resumed Trainer counts those done before as well."""
        return -(-len(self.demonstrations) // self.batch_size)

    def __iter__(self) -> Iterator[Demonstrations]:
        epoch, batches = self.done()
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return islice(self.demonstrations.batches(self.batch_size, order), batches, None)
