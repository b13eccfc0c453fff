"""What a run holds: it builds what the constructor of a stage names, the trainer, and what the
stage leaves behind, as its class declares (`stages/base.py`). It knows no stage by name, and
`train.py` says what happens in which order."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from tprl.build import build
from tprl.commands.arguments import Arguments
from tprl.commands.setup import make_dataset, make_logger, make_lvlm, plain
from tprl.commands.stages import class_of, in_one_table, needs
from tprl.commands.threads import use_threads
from tprl.data.base import BaseDataset
from tprl.data.taking import passed_over
from tprl.errors import UserError
from tprl.lvlm.base import BaseLVLM
from tprl.pruners.base import make_pruner
from tprl.report.overlays import Overlays
from tprl.runtime import distributed
from tprl.runtime.checkpoint import Finished, SaveEvery, checkpoint_of, keep_rows
from tprl.runtime.curves import Curves, write_curves
from tprl.runtime.progress import FitProgress
from tprl.runtime.tracking import Tracker
from tprl.stages.base import Stage

log = logging.getLogger(__name__)
ROUND = 1000  # added to the seed from round to round: studies count training seeds from 0


class Run:
    """One or more stages in a directory: what is finished, what goes on, and the trainer of each.

    Args:
        cfg: the checked config.
        directory: of the run.
    """

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        self.cfg, self.directory = cfg, directory
        self.logger: Any = None
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.writes = True  # the only rank, or the first of several
        self.round, self.rounds = 1, 1  # of a chain that repeats

    @cached_property
    def finished(self) -> Finished:
        """What an interrupted run had finished."""
        return Finished(self.directory, bool(self.cfg.get("resume")))

    def built(self, config: Any) -> Stage:
        """The stage, with all that its constructor names."""
        use_threads(self.cfg, self.directory)
        self.logger = make_logger(self.cfg, self.directory)
        return self.module_of(config)

    def module_of(self, config: Any) -> Stage:
        """The stage, with what its constructor names of `makers`, and what the stage builds
        itself."""
        # Only what the constructor names is made, since a model or a cache is costly.
        kind = class_of(config)
        live = {name: make(config) for name, make in self.makers.items() if name in needs(kind)}
        arguments = kind.own_arguments(in_one_table("stage", plain(config)), self.seed)
        return build(config.module, **live, **arguments)

    @property
    def makers(self) -> Mapping[str, Callable[[Any], Any]]:
        """What makes arguments of constructors from the settings of their stage, by the arguments'
        names."""
        return {"seed": lambda config: self.seed}

    @property
    def seed(self) -> int:
        """Of a stage: every round of a chain reads other questions."""
        return self.cfg.seed + ROUND * (self.round - 1)

    def after(self, module: Stage, config: Any, folder: Path | None) -> None:
        """What the stage leaves behind."""
        module.save(self.directory)

    def note(self, part: str) -> None:
        """The part is done: a resumed run starts after it."""

    def _log_round(self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any) -> None:
        module.log("round", float(self.round))

    def trainer_of(self, module: Stage, config: Any, part: str) -> tuple[pl.Trainer, str | None]:
        """The trainer of a stage, and the checkpoint from which an interrupted one goes on."""
        # Only a checkpoint of this very part counts; an earlier part is finished and in its folder.
        checkpoint = checkpoint_of(self.directory, part) if self.cfg.get("resume") else None
        if checkpoint is None and self.logger:  # the part begins; rows of an attempt at it go
            keep_rows(
                [self.logger], 0 if self.finished.state is None else self.finished.state["rows"]
            )
        self.following = Curves(module.curve_titles, module.held_out_titles)
        callbacks: list[pl.Callback] = [
            FitProgress(config.name, max(0, module.max_steps) or None),
            self.following,
        ]
        if self.rounds > 1:  # stages log equal names in every round
            callbacks.append(LambdaCallback(on_train_batch_end=self._log_round))
        callbacks += [
            SaveEvery(self.directory, config.get("save_every"), part),
            *self._pictures(module, config.name),
        ]
        trainer = build(
            self.cfg.trainer,
            **self.device(),
            max_epochs=module.epochs,
            max_steps=module.max_steps,
            logger=self.logger,
            callbacks=callbacks,
            enable_progress_bar=False,
            log_every_n_steps=config.get("log_every", 1),
            default_root_dir=str(self.directory),
            **{
                # The stage's own numbers come before its yaml's `trainer` block, which may replace
                # them.
                "gradient_clip_val": module.max_grad_norm,
                **plain(config.get("trainer") or OmegaConf.create({})),
            },
        )
        self.writes = trainer.is_global_zero
        return trainer, checkpoint

    def device(self) -> dict[str, Any]:
        """Where the stage learns, if not where the trainer would choose."""
        return {}

    def _pictures(self, module: Stage, name: str) -> list[pl.Callback]:
        """What W&B gets beside the metrics: the stage's arguments, and pictures of what is kept."""
        if not isinstance(self.logger, Tracker):
            return []
        # Pictures cost time and storage: they are made only if both settings ask for some.
        arguments = dict(module.hparams)
        self.logger.describe({f"arguments/{arguments.get('log_as', name)}": arguments})
        wanted = min(self.logger.overlays, self.logger.overlay_every) > 0
        return [Overlays(name, self.logger)] if module.overlays and wanted else []


class ModelRun(Run, Arguments):
    """A run whose stages work with an LVLM and questions, and train no pruner.

    Raises:
        UserError: devices as a list.
    """

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        super().__init__(cfg, directory)
        # Refused before the model is loaded.
        if OmegaConf.is_list(cfg.trainer.get("devices")):
            raise UserError(
                f"trainer.devices={cfg.trainer.devices} would put the policy and its LVLM on "
                "different GPUs: give a number, and choose the GPUs by CUDA_VISIBLE_DEVICES."
            )
        # A trainer on the CPU implies a model on the CPU, unless the model's yaml says otherwise.
        on_cpu = (
            {"device": "cpu"}
            if cfg.trainer.accelerator == "cpu" and "device" not in cfg.model
            else {}
        )
        self.lvlm: BaseLVLM = make_lvlm(cfg.model, **on_cpu)
        use_threads(cfg, directory, self.lvlm)
        # The model comes first: datasets write their boxes and bound their answers as it does.
        self.train_set: BaseDataset = make_dataset(cfg.dataset, self.lvlm, "train")
        self.val_set: BaseDataset = make_dataset(cfg.dataset, self.lvlm, "val")
        self.logger = make_logger(cfg, directory)
        self._lengths_checked = False

    def built(self, config: Any) -> Stage:
        """The stage; threads and logger are those that the run began with."""
        return self.module_of(config)

    @property
    def makers(self) -> Mapping[str, Callable[[Any], Any]]:
        return {
            **super().makers,
            "lvlm": lambda config: self.lvlm,
            "dataset": lambda config: self.train_set,
            "reward": lambda config: build(self.cfg.reward),
            "scorer": lambda config: self.reader_of(config),
            "cache": lambda config: self._cache_of(config),
            "served": lambda config: self._served(config),
            "demonstrator": lambda config: make_pruner(self.cfg.pruner),
            "selector": lambda config: self.selector,
            "adapter": lambda config: self.adapter_of(config),
        }

    def after(self, module: Stage, config: Any, folder: Path | None) -> None:
        """Keep the curves, and say what was passed over."""
        super().after(module, config, folder)
        points = self.following.points | dict(module.curves_of_report)
        self.curves |= {self.titled(title): list(each) for title, each in points.items()}
        # Damage is counted while questions are read, so it is known only after training.
        for data in (self.train_set, self.val_set):
            if damage := passed_over(data):
                log.warning("stage=%s: %s", config.name, damage)

    def titled(self, title: str) -> str:
        """How a curve of this round is called: rounds are lines of one plot."""
        if self.rounds == 1:
            return title
        return f"{title}{', ' if ': ' in title else ': '}round {self.round}"

    def keep_curves(self) -> None:
        """All curves of this run, those of an earlier process included, for the reports of later
        evaluations."""
        if distributed.rank() == 0:
            write_curves(self.directory, self.curves)

    def device(self) -> dict[str, Any]:
        """The stage learns where the LVLM is; Lightning alone would choose any accelerator it
        finds."""
        on_cpu = self.lvlm.device.type == "cpu" and self.cfg.trainer.accelerator == "auto"
        return {"accelerator": "cpu"} if on_cpu else {}
