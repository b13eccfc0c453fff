"""Checkpoints: of a stage at the end of an iteration, and of a run between its parts; complete or
not at all."""

import io
import pickle
import random
import signal
import warnings
from collections.abc import Mapping, Sequence
from errno import EINVAL
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tprl.errors import UserError
from tprl.runtime import signals
from tprl.runtime.files import check, write_sealed
from tprl.runtime.metrics_csv import MetricsCSV
from tprl.runtime.run_directory import LAST, PARTS, ways_on

UNREADABLE = (  # what torch raises on a damaged file, besides ValueError of a checksum
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
    AttributeError, OSError
)  # fmt: skip
KEY = "tprl"  # under which a checkpoint holds what Lightning leaves out


class SaveEvery(pl.Callback):
    """Writes `last.ckpt` every `every` training batches and at the end of an epoch, and stops a run
    that is asked to.

    Lightning's own callback counts optimizer steps, whose number per iteration varies in PPO, and
    its checkpoints hold no states of random number generators.

    Args:
        directory: of the run.
        every: training batches between checkpoints; None: such a short stage starts over, and a
            signal stops it at once.
        part: which part of the run this is.
    """

    def __init__(self, directory: Path, every: int | None, part: str = "") -> None:
        self.path, self.every, self.part = directory / LAST, every, part
        self.draws: dict[str, Any] | None = None
        self.between_epochs = False
        self.row: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = WholeFiles()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where an epoch had ended, the run would go on by drawing what the batches of the next one
        need."""
        if self.draws is not None and self.between_epochs:
            draw_from(self.draws)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.take_over()
        signals.wait(self.every is not None)
        if self.row is not None:
            for logger in trainer.loggers:
                logger.log_metrics(self.row["metrics"], self.row["step"])
            self.row = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.wait(self.every is not None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.between_epochs:
            self.draws, self.between_epochs = None, False
        self._draw_on()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.every is None:
            return
        # This batch is counted as completed only after the callbacks.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # All ranks decide alike: a rank that went on alone would wait for ever in the next step.
        done = progress.total.completed + 1
        stops = trainer.strategy.reduce_boolean_decision(signals.asked() is not None, all=False)
        if stops or progress.is_last_batch or done % self.every == 0:
            trainer.save_checkpoint(self.path)
        if stops:
            raise signals.Stopped(
                signals.asked() or signal.SIGTERM, f"iteration {done} is finished and saved"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows, such as a served score, is repeated by a resumed run. Ranks must not part
        there."""
        if trainer.world_size == 1:
            self._wait_no_longer(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw_on()
        self._wait_no_longer(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        signals.wait(False)

    def _wait_no_longer(self, trainer: pl.Trainer) -> None:
        signals.wait(False)
        if trainer.strategy.reduce_boolean_decision(signals.asked() is not None, all=False):
            raise signals.Stopped(
                signals.asked() or signal.SIGTERM, "all iterations are saved" if self.every else ""
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Between epochs the next batches are still to be drawn: see `on_fit_start`.
        ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        where = {
            "draws": draws(),
            "between_epochs": ended,
            "rows": csv_position(trainer.loggers),
            "row": _row(trainer),
        }
        checkpoint[KEY] = {"part": self.part, **where}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        where = checkpoint[KEY]
        self.draws, self.row = where["draws"], where["row"]
        self.between_epochs = where["between_epochs"]
        keep_rows(trainer.loggers, where["rows"])
        # Ours are: stages keep their own position.
        warnings.filterwarnings(
            "ignore", "You're resuming from a checkpoint that ended before the epoch ended"
        )

    def _draw_on(self) -> None:
        """Random numbers go on where the checkpoint was: now, because making the batches has drawn
        some again."""
        if self.draws is not None:
            draw_from(self.draws)
            self.draws = None


def _row(trainer: pl.Trainer) -> dict[str, Any] | None:
    """What Lightning is about to log of this batch, which it does only after the callbacks."""
    step = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    if (step + 1) % vars(trainer)["log_every_n_steps"]:
        return None
    metrics = {
        name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()
    }
    return {"step": step, "metrics": {**metrics, "epoch": trainer.current_epoch}}


def csv_position(loggers: Sequence[Any]) -> dict[str, Any]:
    """How far `metrics.csv` has got: the number of its rows and their checksum."""
    marks = [logger.mark() for logger in loggers if isinstance(logger, MetricsCSV)]
    return marks[0] if marks else {"count": 0}


def keep_rows(loggers: Sequence[Any], mark: Mapping[str, Any] | int) -> None:
    """Go on with `metrics.csv` after the rows of a mark (older checkpoints know only their number).

    Raises:
        UserError: they are damaged.
    """
    for logger in loggers:
        if isinstance(logger, MetricsCSV):
            logger.keep(**({"count": mark} if isinstance(mark, int) else mark))


class WholeFiles(TorchCheckpointIO):
    """Checkpoints beside their place, forced to disk, renamed. (Lightning's own pass through the
    system's temporary folder and are not forced to disk.)"""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *options: Any, **more: Any) -> dict[str, Any]:
        """Raises: UserError: it is damaged."""
        return load(Path(path))


class Finished:
    """The parts of a run that are done, and all that the next part starts from, in `parts.ckpt`.

    Args:
        directory: of the run.
        resume: whether to read what an interrupted run has left.

    Raises:
        UserError: one of its checkpoints is damaged. Both are looked at before anything is
            computed.
    """

    def __init__(self, directory: Path, resume: bool) -> None:
        self.path, self.parts = directory / PARTS, list[str]()
        self.state: dict[str, Any] | None = None
        # A damaged checkpoint stops the run now, not after hours in the part that needs it.
        if resume and self.path.is_file():
            saved = load(self.path, "parts", "state")
            self.parts, self.state = saved["parts"], saved["state"]
        if resume and (directory / LAST).is_file():
            load(directory / LAST, KEY, mmap=True)

    def add(self, part: str, state: dict[str, Any], writes: bool = True) -> None:
        """Note that a part is done; of several ranks one writes."""
        self.parts.append(part)
        self.state = state
        if writes:
            save({"parts": self.parts, "state": state}, self.path)


def checkpoint_of(directory: Path, part: str) -> str | None:
    """The checkpoint of a part of a run that stopped in its middle, if it did."""
    path = directory / LAST
    if not path.is_file() or load(path, KEY, mmap=True)[KEY]["part"] != part:
        return None
    return str(path)


def save(content: dict[str, Any], path: Path) -> None:
    """Tensors and plain values, as one file that is whole or not there, and its checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getbuffer())


def load(path: Path, *keys: str, mmap: bool = False) -> dict[str, Any]:
    """What `save` wrote; it has these keys.

    Raises:
        UserError: the file is damaged. It stays, and the sentence says from where the run can go
            on.
    """
    try:
        check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        missing = [key for key in keys if key not in content]
    except UNREADABLE as error:
        # which torch says of a file that was cut
        if isinstance(error, OSError) and error.errno != EINVAL:
            raise
        # Of what torch raises on a file without checksum, only the first line is about the file.
        reason = (str(error).strip().splitlines() or ["it is empty or cut short"])[0].rstrip(".")
        raise UserError(f"{path} is damaged ({reason}): {ways_on(path.parent, path)}.") from error
    if missing:
        raise UserError(
            f"{path} is damaged (it has no {missing[0]}): {ways_on(path.parent, path)}."
        )
    return content


def draws() -> dict[str, Any]:
    """The states of all random number generators, as tensors and plain values."""
    # Plain values, since `weights_only` loads no arrays of NumPy.
    name, keys, *numbers = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *numbers],
        "cuda": torch.cuda.get_rng_state_all(),
    }


def draw_from(states: dict[str, Any]) -> None:
    """Put random number generators back where they were; this machine may have fewer GPUs than that
    one."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
