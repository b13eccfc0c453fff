"""From a composed config to a trained pruner.

The runner builds what the constructor of a stage names, trains it, and does around it what its
class declares (`stages/base.py`). It knows no stage by name.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from tprl.build import build, conf_dir, load_component
from tprl.commands.arguments import Arguments
from tprl.commands.check import check_first
from tprl.commands.entry import chosen
from tprl.commands.evaluate import Evaluation, evaluate_elsewhere, evaluate_entries, open_datasets
from tprl.commands.options import checked
from tprl.commands.plan import check_plan
from tprl.commands.setup import make_dataset, make_logger, plain, start
from tprl.commands.stages import class_of, in_one_table, needs
from tprl.commands.threads import use_threads
from tprl.data.taking import passed_over
from tprl.errors import UserError
from tprl.evaluation.entries import check_names, named_entries, trained_entries, with_regions
from tprl.evaluation.evaluator import check_answers, check_cost, check_entries
from tprl.evaluation.results import card_results, mean_accuracy
from tprl.pruners.folder import find_pruner, load_weights, read_config
from tprl.pruners.learned import LearnedPruner, check_family, load_pruner, pruner_from
from tprl.report.overlays import Overlays
from tprl.runtime import distributed
from tprl.runtime.checkpoint import (
    Finished,
    SaveEvery,
    checkpoint_of,
    csv_position,
    draw_from,
    draws,
    keep_rows,
)
from tprl.runtime.curves import Curves, write_curves
from tprl.runtime.progress import FitProgress
from tprl.runtime.tracking import Tracker, log_weights
from tprl.scoring.validation import after_these
from tprl.stages.base import Stage
from tprl.stages.calibrate import calibrate_fade
from tprl.types import LVLM, Dataset

log = logging.getLogger(__name__)


def train(cfg: DictConfig, directory: Path) -> float | None:
    """Run `cfg.stage` and leave what it makes (for stage=all also the evaluation) in `directory`.

    Returns:
        The number that a sweeper maximizes: what the stage calls its `result`; for a chain the mean
        accuracy of the trained pruner over the keep ratios of the evaluation.

    Raises:
        UserError: bad input; nothing has been computed yet, or what has been is in `directory`.
    """
    cfg = checked(cfg, "train")
    check_plan(plain(cfg))
    start(cfg, directory)
    if "chain" in cfg.stage:
        check_first(cfg)
        return _train_chain(Training(cfg, directory))
    if "pruner" not in needs(class_of(cfg.stage)):
        return Run(cfg, directory).part(cfg.stage, None)
    run = Training(cfg, directory)
    run.check_labels(cfg.stage)
    if run.finished.state is None:  # otherwise it holds the weights
        run.prepare()
    result = run.part(cfg.stage, directory / "pruner")
    run.keep_curves()
    log_weights(run.logger, directory)
    return result


def _train_chain(run: "Training") -> float | None:
    """Every stage of the chain on the pruner of the one before, then the evaluation."""
    stage, directory = run.cfg.stage, run.directory
    settings = plain(stage.evaluation)
    check_cost(run.lvlm)
    test_set = make_dataset(run.cfg.dataset, run.lvlm, "test")
    check_answers(run.lvlm, test_set, settings["limit"])
    check_entries(named_entries(settings["pruners"], settings), run.lvlm)
    further = open_datasets(settings["datasets"], run.lvlm, settings["limit"])
    for name in stage.chain:
        run.check_labels(stage[name])
    for name in stage.chain:
        kind = class_of(stage[name])
        if not kind.applies_to(run.pruner):
            log.info("stage=%s is left out: it has no use for this %s", name, run.pruner.name)
            continue
        run.part(stage[name], directory / kind.folder)
        if kind.teaches_baselines:
            for baseline in stage.baselines:
                run.baseline(baseline, stage[name], directory / baseline)
    run.keep_curves()
    ours, others = (
        trained_entries(directory, settings),
        named_entries(settings["pruners"], settings),
    )
    check_names(ours, others)
    entries = with_regions(ours + others, test_set)
    table = Evaluation(run.lvlm, test_set, entries, settings, run.cfg, directory)
    evaluate_elsewhere(further, table._replace(entries=ours + others))
    rows = evaluate_entries(table, run.logger, run.curves)
    questions = min(settings["limit"] or len(test_set), len(test_set))
    run.pruner.trained_on["results"] = card_results(rows, entries[0].name, questions)
    run.save(directory / "pruner")
    log_weights(run.logger, directory)
    return mean_accuracy(rows, entries[0].name)


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

    @cached_property
    def finished(self) -> Finished:
        """What an interrupted run had finished."""
        return Finished(self.directory, bool(self.cfg.get("resume")))

    def part(self, config: Any, folder: Path | None) -> float | None:
        """Train one stage, unless a run that this one goes on with has finished it.

        Args:
            config: both blocks of the stage's yaml.
            folder: where the pruner goes; None: the stage trains none.
        """
        if config.name in self.finished.parts:
            return None
        module = self.fit(config, folder, config.name)
        self.note(config.name)
        return module.result

    def fit(self, config: Any, folder: Path | None, part: str) -> Stage:
        """Build a stage, train it and keep what it made; `part` is the name of its checkpoint."""
        module = self.built(config)
        trainer, checkpoint = self.trainer_of(module, config, part)
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        self.after(module, config, folder)
        return module

    def built(self, config: Any) -> Stage:
        """The stage, with all that its constructor names."""
        use_threads(self.cfg, self.directory)
        self.logger = make_logger(self.cfg, self.directory)
        return self.module_of(config)

    def module_of(self, config: Any) -> Stage:
        """The stage, with what its constructor names of `makers`, and what the stage builds
        itself."""
        kind = class_of(config)
        live = {name: make(config) for name, make in self.makers.items() if name in needs(kind)}
        arguments = kind.own_arguments(in_one_table("stage", plain(config)), self.cfg.seed)
        return build(config.module, **live, **arguments)

    @property
    def makers(self) -> Mapping[str, Callable[[Any], Any]]:
        """What makes arguments of constructors from the settings of their stage, by the arguments'
        names."""
        return {"seed": lambda config: self.cfg.seed}

    def after(self, module: Stage, config: Any, folder: Path | None) -> None:
        """What the stage leaves behind."""
        module.save(self.directory)

    def note(self, part: str) -> None:
        """The part is done: a resumed run starts after it."""

    def trainer_of(self, module: Stage, config: Any, part: str) -> tuple[pl.Trainer, str | None]:
        """The trainer of a stage, and the checkpoint from which an interrupted one goes on."""
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
        arguments = dict(module.hparams)
        self.logger.describe({f"arguments/{arguments.get('log_as', name)}": arguments})
        wanted = min(self.logger.overlays, self.logger.overlay_every) > 0
        return [Overlays(name, self.logger)] if module.overlays and wanted else []


class Training(Run, Arguments):
    """A run whose stages train a pruner for a frozen LVLM: the model, the data and the pruner they
    work on."""

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        super().__init__(cfg, directory)
        if OmegaConf.is_list(cfg.trainer.get("devices")):
            raise UserError(
                f"trainer.devices={cfg.trainer.devices} would part the policy from its "
                "LVLM: give a number, and choose the cards with CUDA_VISIBLE_DEVICES."
            )
        on_cpu = (
            {"device": "cpu"}
            if cfg.trainer.accelerator == "cpu" and "device" not in cfg.model
            else {}
        )
        self.lvlm: LVLM = build(cfg.model, **on_cpu)
        use_threads(cfg, directory, self.lvlm)
        self.train_set: Dataset = make_dataset(cfg.dataset, self.lvlm, "train")
        self.val_set: Dataset = make_dataset(cfg.dataset, self.lvlm, "val")
        self.pruner: LearnedPruner = build(cfg.policy, token_width=self.lvlm.width)
        self.logger = make_logger(cfg, directory)
        self._lengths_checked = False
        # by stages that may run again in this run
        self._shared: dict[type[Stage], dict[str, Any]] = {}
        if self.finished.state is not None:
            self._take_up(self.finished.state)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Where an earlier process got to: what `note` wrote."""
        self.pruner = pruner_from(state["pruner"])
        self.pruner.load_state_dict(state["weights"])
        self.curves = {name: list(map(tuple, points)) for name, points in state["curves"].items()}
        draw_from(state["draws"])

    def note(self, part: str) -> None:
        weights = {name: value.cpu() for name, value in self.pruner.state_dict().items()}
        where = {"curves": self.curves, "draws": draws(), "rows": csv_position([self.logger])}
        self.finished.add(
            part, {"pruner": self.pruner.about, "weights": weights, **where}, self.writes
        )

    def prepare(self) -> None:
        """What the stage starts from: the pruner of `stage.init_from`, or its weights in this
        policy, or a policy whose autoencoder is trained first."""
        kind, source = class_of(self.cfg.stage), self.cfg.stage.get("init_from")
        if kind.continues:
            name = self.cfg.stage.name
            if not source:
                raise UserError(
                    f"stage={name} needs a trained policy: give stage.init_from=<run directory>."
                )
            if chosen("policy"):
                raise UserError(
                    f"stage={name} keeps the policy of stage.init_from as it is: leave policy out."
                )
            self.pruner = load_pruner(source)
            check_family(self.pruner, self.lvlm)
        elif source:
            folder = find_pruner(source)
            load_weights(self.pruner, folder)
            self.pruner.trained_on = read_config(folder)["trained_on"]
            check_family(self.pruner, self.lvlm)
        elif kind.needs_codes and self.pruner.autoencoder is not None:
            log.info("no stage.init_from: the autoencoder is trained first")
            config = OmegaConf.load(conf_dir() / "stage" / "autoencoder.yaml")
            self.part(config, self.directory / class_of(config).folder)  # type: ignore[arg-type]

    def built(self, config: Any) -> Stage:
        """The stage; the pruner loses what stages before this one calibrated, unless it keeps
        that."""
        kind, module = class_of(config), self.module_of(config)
        if not kind.keeps_serving:
            self.pruner.serving = replace(self.pruner.serving, trained_to=1.0, fade=0.0, prices=())
        for name, value in self._shared.get(kind, {}).items():
            setattr(module, name, value)
        return module

    @property
    def makers(self) -> Mapping[str, Callable[[Any], Any]]:
        return {
            **super().makers,
            "pruner": lambda config: self.pruner,
            "lvlm": lambda config: self.lvlm,
            "dataset": lambda config: self.train_set,
            "reward": lambda config: build(self.cfg.reward),
            "cache": lambda config: self._cache_of(config),
            "served": lambda config: self._served(config),
            "demonstrator": lambda config: build(self.cfg.pruner),
        }

    def after(self, module: Stage, config: Any, folder: Path | None) -> None:
        """Calibrate the pruner on validation questions, note where it comes from, and save it."""
        super().after(module, config, folder)
        assert folder is not None
        self._shared[type(module)] = {name: getattr(module, name) for name in module.shares}
        self.curves |= self.following.points
        for data in (self.train_set, self.val_set):
            if damage := passed_over(data):
                log.warning("stage=%s: %s", config.name, damage)
        if config.get("calibrate") and module.trained_to is not None:
            beyond = after_these(self.val_set, **plain(config.served))
            calibrate_fade(
                self.pruner, self._served(config, first=beyond), module.trained_to, config.calibrate
            )
        self.curves |= {title: list(points) for title, points in module.curves_of_report.items()}
        self.pruner.trained_on.pop("results", None)  # they were another state's
        self.pruner.trained_on |= {
            "model": self.cfg.model.get("name"),
            "family": getattr(self.lvlm, "model_type", None),
            "pretrained": self.cfg.model.get("pretrained"),
            "dataset": self.train_set.name,
            "stages": [*self.pruner.trained_on.get("stages", []), config.name],
            "seed": self.cfg.seed,
        }
        self.save(folder)

    def save(self, folder: Path) -> None:
        """The pruner, by rank 0; when it returns the folder is there for all."""
        if distributed.rank() == 0:
            self.pruner.save_pretrained(folder)
        distributed.barrier()

    def keep_curves(self) -> None:
        """All curves of this run, those of an earlier process included, for the reports of later
        evaluations."""
        if distributed.rank() == 0:
            write_curves(self.directory, self.curves)

    def baseline(self, policy: str, config: Any, folder: Path) -> None:
        """Teach another learned pruner (a yaml of conf/policy) by the same stage, on the same
        codes."""
        if policy in self.finished.parts:
            return
        main, curves = self.pruner, self.curves.copy()
        same = {key: main.config[key] for key in ("token_width", "code_width", "hidden")}
        self.pruner = load_component("policy", policy, **same)
        if self.pruner.autoencoder is not None and main.autoencoder is not None:
            self.pruner.autoencoder.load_state_dict(main.autoencoder.state_dict())
        renamed = OmegaConf.create(plain(config))
        renamed.module.log_as = f"{config.name}/{policy}"
        self.fit(renamed, folder, policy)
        self.pruner, self.curves = main, curves
        self.note(policy)

    def device(self) -> dict[str, Any]:
        """The policy learns where the LVLM is; Lightning alone would choose any accelerator it
        finds."""
        on_cpu = self.lvlm.device.type == "cpu" and self.cfg.trainer.accelerator == "auto"
        return {"accelerator": "cpu"} if on_cpu else {}
