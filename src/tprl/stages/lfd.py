"""Stage `lfd`: learning from demonstrations. The policy imitates a heuristic, decision by
decision."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.policy import sequential
from tprl.policy.dpp import unit_features
from tprl.pruners.learned import LearnedPruner
from tprl.runtime import distributed
from tprl.runtime.finite import check_finite
from tprl.runtime.store import Cache
from tprl.scoring.validation import ServedScore
from tprl.stages.base import UNCALIBRATED, KeepBest, Next, Points, Unread
from tprl.stages.demonstrations import Demonstrations, StoredDemonstrations, demonstrate
from tprl.types import LVLM, Pruner

log = logging.getLogger(__name__)
STEP_BY_STEP = "progressive gives the number of steps and the kept share of each"
LEARNED = 0.02  # share of the constant's loss that must be gone


class LfD(KeepBest):
    """Imitation of a demonstrator's kept sets (TPRL, stage 2).

    Two losses. "set": minus the log-likelihood of the demonstrator's set under the sequential
    policy, per kept token (`policy.sequential.log_stay`). It can teach what only makes sense for a
    set, such as diversity. "token": binary cross-entropy on each token's keep / prune decision, a
    mean over the tokens alive, as in the paper. It teaches only demonstrators that judge token by
    token.

    Both are logged beside the loss of the same policy with constant logits: a stage that does not
    get below it has learned nothing, and says so. The checkpoint kept is that of the epoch with the
    best served score on validation.

    Args:
        pruner: the learner.
        lvlm, dataset: the frozen model and the training split.
        demonstrator: the heuristic; never one that knows the answer.
        served: the validation score.
        demonstrations: questions to demonstrate.
        keep_ratio: final kept fraction, or several (each question gets one).
        steps: T pruning steps per demonstration.
        progressive: kept shares of what is alive, instead of keep_ratio and steps (reference: 0.8,
            0.6, 0.4).
        loss: "set", "token", or None: "set" where the pruner serves by dpp, which is what the set
            loss trains.
        epochs, batch_size, lr, clip: AdamW; reference: 5, 128, 5e-5, 1.0.
        seed: order and draws.
        cache: keeps the demonstrations for other runs; None: in a temporary folder.
        log_as: what the names of its metrics begin with.

    Raises:
        UserError: an unknown loss, the set loss for a pruner that does not serve by dpp from its
            codes, or a pruner that reads more than tokens and words.
    """

    folder = "lfd"
    teaches_baselines = True
    curve_titles: ClassVar = {"lfd/loss": "lfd, nats per decision"}
    unread = (
        UNCALIBRATED,
        Unread("steps", lambda s: bool(s.get("progressive")), STEP_BY_STEP),
        Unread("keep_ratio", lambda s: bool(s.get("progressive")), STEP_BY_STEP),
    )
    next = Next("train", "stage.init_from", words=("stage=ppo",), carries=True)
    remembers = ("samples_seen", "best", "best_state", "curve")
    shares = ("demonstrations",)

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: BaseDataset,
        demonstrator: Pruner,
        served: ServedScore,
        demonstrations: int,
        keep_ratio: float | Sequence[float],
        steps: int,
        progressive: Sequence[float] | None,
        loss: str | None,
        epochs: int,
        batch_size: int,
        lr: float,
        clip: float,
        seed: int = 0,
        cache: Cache | None = None,
        log_as: str = "lfd",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            ignore=["pruner", "lvlm", "dataset", "demonstrator", "served", "cache"]
        )
        self.pruner, self.lvlm, self.dataset, self.cache = pruner, lvlm, dataset, cache
        self.demonstrator, self.served, self.epochs = demonstrator, served, epochs
        self.max_grad_norm = clip
        self.loss = _loss(loss, pruner)
        if pruner.extras:
            raise UserError(
                f"the policy starts from {', '.join(sorted(pruner.extras))}, which demonstrations "
                "do not hold: set policy.prior=none, or leave stage=lfd out, e.g. "
                "stage.chain=[autoencoder,ppo]."
            )
        # (loss, loss of a constant) of each step of this epoch
        self.progress: list[tuple[float, float]] = []
        self.demonstrations: StoredDemonstrations | None = None
        self.samples_seen = 0
        self.begin_best()
        self.curve: list[tuple[float, float]] = []

    @property
    def ratios(self) -> list[float]:
        """Final kept fractions of the demonstrations."""
        h = self.hparams
        if h["progressive"]:
            return [math.prod(h["progressive"])]
        ratio = h["keep_ratio"]
        return [ratio] if isinstance(ratio, float | int) else list(ratio)

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
        return DataLoader(
            _Epochs(self.demonstrations, h["batch_size"], h["seed"], self._done), batch_size=None
        )

    def _done(self) -> tuple[int, int]:
        """Epochs, and batches of the next one. Lightning's own counter still shows the last epoch
        when a resumed run asks for its batches."""
        assert self.demonstrations is not None
        epochs, samples = divmod(self.samples_seen, len(self.demonstrations))
        return epochs, samples // self.hparams["batch_size"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.pruner.net.parameters(), lr=self.hparams["lr"])

    def training_step(self, batch: Demonstrations, index: int) -> Tensor:
        assert self.demonstrations is not None
        # The last batch of an epoch is smaller; the noise follows from the place in the run alone.
        total, name = len(self.demonstrations), self.hparams["log_as"]
        size = min(self.hparams["batch_size"], total - self.samples_seen % total)  # of all ranks
        noise = torch.Generator().manual_seed(self.hparams["seed"] * 1_000_003 + self.samples_seen)
        # Each rank weighs its means by its share of the batch.
        imitation = self.loss(self.pruner, batch, noise)
        loss, constant, agreement = (mean * distributed.weight(size) for mean in imitation)
        seen = f"{self.samples_seen} to {self.samples_seen + size - 1} in this run's order"
        check_finite({f"{name}/loss": loss}, [seen], f"epoch {self._done()[0]}")
        self.samples_seen += size
        metrics = {
            f"{name}/loss": loss,
            f"{name}/constant": constant,
            f"{name}/agreement": agreement,
        }
        self.log_dict(metrics, batch_size=size, sync_dist=True)
        self.log("samples_seen", float(self.samples_seen))
        self.progress.append((float(loss.detach()), float(constant)))
        return loss

    def on_train_start(self) -> None:
        """A run that was stopped between the last step of an epoch and its score makes up for the
        score."""
        if len(self.curve) < self._done()[0]:
            self._validate()

    def on_train_epoch_end(self) -> None:
        self._validate()
        # A run resumed at the end of an epoch has no progress to judge: nothing is said of it.
        loss, constant = 0.0, 1.0
        if self.progress:
            loss, constant = torch.tensor(self.progress).mean(0).tolist()
        self.progress = []
        # Said after the last epoch only: an early loss says nothing.
        if self._done()[0] >= self.epochs and loss > (1 - LEARNED) * constant:
            by_sets = ""
            if self.loss is not set_loss:
                by_sets = ", the option loss=set (with policy.select=dpp)"
            log.warning(
                "%s: the policy has learned nothing from %s: its loss %.3f "
                "is not below %.3f, that of constant logits. Use another "
                "demonstrator (pruner=...)%s, or more demonstrations.",
                self.hparams["log_as"],
                self.demonstrator.name,
                loss,
                constant,
                by_sets,
            )

    def _validate(self) -> None:
        score = self.served(self.pruner)
        served = f"{self.hparams['log_as']}/served"
        self.log_dict({f"{served}/{name}": value for name, value in score.items()})
        self.log(served, score["accuracy"], prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))
        self.curve.append((float(self.samples_seen), score["accuracy"]))
        self.keep_if_best(score["accuracy"])

    @property
    def curves_of_report(self) -> dict[str, Points]:
        return {"lfd, accuracy: served": self.curve}


class Imitation(NamedTuple):
    """Means over tokens, samples and steps; only `loss` carries a gradient."""

    loss: Float[Tensor, ""]
    constant: Float[Tensor, ""]  # the same loss of logits that are the same for every token
    agreement: Float[Tensor, ""]  # what the policy would keep, against the demonstrator


def token_loss(pruner: LearnedPruner, batch: Demonstrations, noise: torch.Generator) -> Imitation:
    """Cross-entropy per token and the share of equal decisions; the constant knows the keep ratio
    of each step.

    `noise` is not used: the argument makes the two losses interchangeable.
    """
    x = batch.x._replace(codes=batch.x.codes.float(), query=batch.x.query.float())
    alive, parts = x.mask, []
    for t, keep in enumerate(batch.keep):
        logits = pruner.net(x, alive, t, batch.keep_ratio)[0]
        count = alive.sum(1).clamp(min=1)
        # Means over the tokens alive, so that a small image counts as much as a large one.
        error = F.binary_cross_entropy_with_logits(logits, keep.float(), reduction="none")
        equal = ((logits > 0) == keep) & alive
        # The best constant logit predicts the kept share: its loss is the entropy of that share.
        share = keep.sum(1) / count
        constant = torch.special.entr(share) + torch.special.entr(1 - share)
        loss = ((error * alive).sum(1) / count).mean()
        parts.append(Imitation(loss, constant.mean(), (equal.sum(1) / count).mean()))
        alive = keep
    return _mean(parts)


def set_loss(pruner: LearnedPruner, batch: Demonstrations, noise: torch.Generator) -> Imitation:
    """Minus the log-likelihood of the demonstrator's sets, per kept token; its lower bound, see
    `log_stay`.

    The constant is the policy that is diverse and nothing else. Agreement is the share of the
    demonstrator's tokens that greedy MAP keeps, which is how the policy is served.
    """
    x = batch.x._replace(codes=batch.x.codes.float(), query=batch.x.query.float())
    features = unit_features(x.codes, x.mask)
    alive, parts = x.mask, []
    uniform = torch.rand(len(x.mask), 1, x.mask.shape[1], generator=noise).to(x.mask.device)
    for t, keep in enumerate(batch.keep):
        # [B V] 2 log q, as served; the sets are restricted to what is alive.
        scores = pruner.serving.quality * pruner.net(x, alive, t, batch.keep_ratio)[0]
        count = keep.sum(1).clamp(min=1)
        stay = sequential.log_stay(scores, features, alive, keep, 1.0, uniform)
        # The same draws with flat scores: the policy that is diverse and nothing else.
        with torch.no_grad():
            flat = torch.zeros_like(scores)
            blind = sequential.log_stay(flat, features, alive, keep, 1.0, uniform)
            same = sequential.greedy(scores, features, alive, keep.sum(1)) & keep
        loss = -(stay.sum((1, 2)) / count).mean()
        constant = -(blind.sum((1, 2)) / count).mean()
        parts.append(Imitation(loss, constant, (same.sum(1) / count).mean()))
        alive = keep
    return _mean(parts)


def _mean(parts: Sequence[Imitation]) -> Imitation:
    """Over the pruning steps."""
    loss, constant, agreement = (torch.stack(values).mean() for values in zip(*parts, strict=True))
    return Imitation(loss, constant.detach(), agreement.detach())


def _loss(name: str | None, pruner: LearnedPruner) -> Callable[..., Imitation]:
    """The loss that a stage was asked for.

    Raises:
        UserError: unknown, or not of what the pruner serves.
    """
    dpp = pruner.serving.select == "dpp"
    if name not in (None, "set", "token"):
        raise UserError(
            f"stage.loss must be set or token, got {name}; null takes what policy.select serves."
        )
    # The set loss trains the kernel of the codes; another one is not what is served.
    if name == "set" and not (dpp and pruner.serving.kernel == "codes"):
        raise UserError(
            "stage.loss=set trains what policy.select=dpp serves with "
            f"policy.kernel=codes; this policy has select={pruner.serving.select}, "
            f"kernel={pruner.serving.kernel}: use stage.loss=token."
        )
    return set_loss if name == "set" or (name is None and dpp) else token_loss


class _Epochs(IterableDataset[Demonstrations]):
    """Batches of one epoch, from where a resumed run stopped on; every epoch has its own order."""

    def __init__(
        self,
        demonstrations: StoredDemonstrations,
        batch_size: int,
        seed: int,
        done: Callable[[], tuple[int, int]],
    ) -> None:
        self.demonstrations = demonstrations
        self.batch_size, self.seed, self.done = batch_size, seed, done

    def __len__(self) -> int:
        """Batches of a whole epoch: a resumed Trainer counts those done before as well."""
        return -(-len(self.demonstrations) // self.batch_size)

    def __iter__(self) -> Iterator[Demonstrations]:
        # The order of the epoch, less the batches that were done before a stop.
        epoch, batches = self.done()
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return islice(self.demonstrations.batches(self.batch_size, order), batches, None)
