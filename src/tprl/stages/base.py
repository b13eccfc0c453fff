"""What a stage tells its runner (`commands/train.py`), which follows these declarations and knows
no stage by name."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
from jaxtyping import Float
from torch import Tensor

from tprl.pruners.learned import LearnedPruner
from tprl.runtime import distributed
from tprl.runtime.finite import check_finite

Settings = Mapping[str, Any]  # both blocks of a stage's yaml in one table
Points = list[tuple[float, float]]  # (samples seen, value)


class Unread(NamedTuple):
    """An option that changes nothing while `when` holds of the stage's settings, among which those
    of the policy stand under `policy`; an option "" is the whole stage in a chain. `why` ends the
    sentence."""

    option: str
    when: Callable[[Settings], bool]
    why: str


def serves_otherwise(settings: Settings) -> bool:
    """Whether the policy serves by anything but a DPP, with which alone calibration and the law of
    the draws have to do."""
    return settings["policy"].get("select", "dpp") != "dpp"


UNCALIBRATED = Unread(
    "calibrate", serves_otherwise, "only what policy.select=dpp serves is calibrated"
)


class Next(NamedTuple):
    """What to type after a stage: `python -m src.<entry> <option>=<run>[/<folder>] <words>`, with
    the groups of the command line again if `carries`."""

    entry: str
    option: str
    folder: str = ""
    words: tuple[str, ...] = ()
    carries: bool = False


class Stage(pl.LightningModule):
    """A training stage is one file, a subclass of this, and one yaml with two blocks.

    `module:` holds every argument of the constructor that is a plain value. The others are named
    after what the runner builds: `pruner`, `lvlm`, `dataset`, `seed`, `served` (the validation
    score), `reward`, `demonstrator`, `selector` (the group `pruner`, as it is; in a chain the
    pruner of the chain), `adapter` (of the language model, to go on from), `cache`. What the
    constructor does not name is not built, and its group of the command line is refused. The rest
    of the yaml is the runner's: `name`, `init_from`, `served`, `calibrate`, `save_every`,
    `log_every`, `trainer`, and `blueprint`, of what `own_arguments` builds. A stage with
    `curve_titles` counts its questions in `samples_seen`.
    """

    # The folder of the run in which stage=all keeps the pruner after this stage; a stage alone
    # writes `pruner`.
    folder: ClassVar[str] = "pruner"
    # the autoencoder is trained first where no stage.init_from brings one
    needs_codes: ClassVar[bool] = True
    # on the pruner of stage.init_from as it is; otherwise the policy is the config's
    continues: ClassVar[bool] = False
    keeps_serving: ClassVar[bool] = False  # what earlier stages calibrated stays (`Serving`)
    teaches_baselines: ClassVar[bool] = False  # stage=all teaches `baselines` by the same stage
    # W&B gets pictures of what is kept; needs `served`, `iteration`, `samples_seen`
    overlays: ClassVar[bool] = False
    # Metric -> how the report calls its curve; lines of one plot share the words before the colon.
    curve_titles: ClassVar[Mapping[str, str]] = {}  # logged after a batch
    held_out_titles: ClassVar[Mapping[str, str]] = {}  # logged after a validation
    unread: ClassVar[Sequence[Unread]] = ()
    next: ClassVar[Next | None] = None
    remembers: ClassVar[Sequence[str]] = ()  # attributes that checkpoints hold
    # attributes that the next module of this class in the same run takes over
    shares: ClassVar[Sequence[str]] = ()

    epochs: int = 1
    max_steps: int = -1
    max_grad_norm: float | None = None  # where Lightning optimizes

    # --- before anything is built -----------------------------------------------------------------

    @classmethod
    def applies_to(cls, pruner: LearnedPruner | type[LearnedPruner]) -> bool:
        """Whether stage=all runs this stage for such a pruner."""
        return True

    @classmethod
    def reads_answers(cls, reward: Any, settings: Settings) -> bool:
        """Whether training with these settings reads reference answers; `reward` is built where the
        constructor names one, else None."""
        return False

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        """Refuse settings that do not go together, under the names that were typed.

        Args:
            key: what options of this stage begin with, "stage" or "stage.ppo".
            settings: of this stage.
            plain: the whole config.

        Raises:
            UserError: they do not.
        """

    @classmethod
    def own_arguments(cls, settings: Settings, seed: int) -> dict[str, Any]:
        """Arguments of the constructor that the stage builds itself, from its settings in one
        table."""
        return {}

    # --- around the fit ---------------------------------------------------------------------------

    @property
    def trained_to(self) -> float | None:
        """Largest keep ratio of the training; None where nothing holds the pruner to one."""
        return None

    @property
    def curves_of_report(self) -> Mapping[str, Points]:
        """Curves by title beside those of `curve_titles`."""
        return {}

    @property
    def result(self) -> float | None:
        """The number that tells how good the stage has become, for sweepers."""
        return None

    def save(self, directory: Path) -> None:
        """What the stage leaves in the run beside the pruner."""

    def take_off(self) -> None:
        """Give the LVLM back as it was before this stage."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.remembers:
            checkpoint[self.checkpoint_key] = {name: getattr(self, name) for name in self.remembers}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint.get(self.checkpoint_key, {}).items():
            setattr(self, name, value)

    @property
    def checkpoint_key(self) -> str:
        """Where `remembers` stands in a checkpoint."""
        return type(self).__module__.rpartition(".")[2]


class RowStage(Stage):
    """A stage that trains on rows which it has made before, an epoch after the other."""

    rows: ClassVar[str]  # what a row is, for sentences
    samples_seen: int

    def counted(self, name: str, loss: Float[Tensor, ""], index: int, total: int) -> Tensor:
        """The loss of this rank's part of batch `index` of an epoch of `total` rows, weighted by
        its share, checked and logged by name."""
        # Rows of the batch on all ranks: the last batch of an epoch is smaller.
        batch_size = self.hparams["batch_size"]
        size = min(batch_size, total - index * batch_size)
        loss = loss * distributed.weight(size)
        check_finite({name: loss}, [f"{self.rows} of batch {index}"], f"epoch {self.current_epoch}")
        self.samples_seen += size
        self.log_dict({name: loss, "samples_seen": float(self.samples_seen)}, sync_dist=True)
        return loss


class KeepBest(Stage):
    """A stage whose pruner ends with the weights of its best validation score."""

    best: float
    best_state: dict[str, Any]
    pruner: LearnedPruner

    def begin_best(self) -> None:
        """Start from the present weights, below any score."""
        self.best, self.best_state = -math.inf, copy.deepcopy(self.pruner.state_dict())

    def keep_if_best(self, score: float) -> None:
        """Keep the present weights if this is their best score so far."""
        if score > self.best:
            self.best, self.best_state = score, copy.deepcopy(self.pruner.state_dict())

    @property
    def result(self) -> float | None:
        """The best score on validation."""
        return self.best

    def on_fit_end(self) -> None:
        self.pruner.load_state_dict(self.best_state)
