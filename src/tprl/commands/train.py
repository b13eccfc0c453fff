"""From a composed config to a trained pruner, or to whatever else a stage trains."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tprl.build import build, conf_dir, load_component
from tprl.commands.check import check_first
from tprl.commands.entry import chosen
from tprl.commands.evaluate import Evaluation, evaluate_elsewhere, evaluate_entries, open_datasets
from tprl.commands.options import checked
from tprl.commands.plan import check_plan
from tprl.commands.runs import ModelRun, Run
from tprl.commands.setup import make_dataset, plain, start
from tprl.commands.stages import adapts, class_of, needs
from tprl.commands.worn import Worn
from tprl.errors import UserError
from tprl.evaluation.entries import check_names, named_entries, trained_entries, with_regions
from tprl.evaluation.evaluator import check_answers, check_cost, check_entries, fitting
from tprl.evaluation.results import card_results, mean_accuracy
from tprl.lvlm.adapters import FOLDER as ADAPTER
from tprl.lvlm.adapters import Adapter
from tprl.pruners.core_focus import CORE
from tprl.pruners.folder import find_pruner, load_weights, read_config
from tprl.pruners.learned import LearnedPruner, check_family, load_pruner, pruner_from
from tprl.runtime import distributed
from tprl.runtime.checkpoint import (
    csv_position,
    draw_from,
    draws,
)
from tprl.runtime.tracking import log_weights
from tprl.scoring.validation import after_these
from tprl.stages.base import Stage
from tprl.stages.calibrate import calibrate_fade

log = logging.getLogger(__name__)


def train(cfg: DictConfig, directory: Path) -> float | None:
    """Run `cfg.stage` and leave what it makes (for stage=all also the evaluation) in `directory`.

    Returns:
        The number that a sweeper maximizes: what the stage calls its `result`; for a chain the mean
        accuracy of the trained pruner over the keep ratios of the evaluation.

    Raises:
        UserError: bad input; nothing has been computed yet, or what has been is in `directory`.
    """
    # Every refusal by name comes before the directory is made.
    cfg = checked(cfg, "train")
    check_plan(plain(cfg))
    start(cfg, directory)
    # From here on the run grows: chain, then stages without a model, without a pruner, with both.
    if "chain" in cfg.stage:
        check_first(cfg)
        run = Training(cfg, directory)
        if cfg.stage.get("init_from") and run.finished.state is None:
            run.prepare()
        return _train_chain(run)
    needed = needs(class_of(cfg.stage))
    if "lvlm" not in needed:
        return run_stage(Run(cfg, directory), cfg.stage, None)
    if "pruner" not in needed:
        other = ModelRun(cfg, directory)
        other.check_labels(cfg.stage)
        result = run_stage(other, cfg.stage, None)
        other.keep_curves()
        return result
    # Labels and lengths are checked before weights are loaded from `init_from`.
    run = Training(cfg, directory)
    run.check_labels(cfg.stage)
    run.check_demonstrator(cfg.stage)
    if run.finished.state is None:  # otherwise it holds the weights
        run.prepare()
    result = run_stage(run, cfg.stage, directory / "pruner")
    run.keep_curves()
    log_weights(run.logger, directory)
    return result


def run_stage(run: Run, config: Any, folder: Path | None, part: str | None = None) -> float | None:
    """Train one stage, unless a run that this one goes on with has finished it.

    Args:
        run: what builds the stage, and keeps what it leaves.
        config: both blocks of the stage's yaml.
        folder: where the pruner goes; None: the stage trains none.
        part: the name of its checkpoint; None: that of the stage.
    """
    name: str = part or config.name
    if name in run.finished.parts:
        return None
    # Noted after it was kept: a run that dies in between repeats the part.
    module = fit_stage(run, config, folder, name)
    run.note(name)
    return module.result


def fit_stage(run: Run, config: Any, folder: Path | None, part: str) -> Stage:
    """Build a stage, train it and keep what it made; `part` is the name of its checkpoint."""
    module = run.built(config)
    trainer, checkpoint = run.trainer_of(module, config, part)
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    run.after(module, config, folder)
    return module


def _train_chain(run: "Training") -> float | None:
    """Every stage of the chain on the pruner of the one before, then the evaluation."""
    stage, directory = run.cfg.stage, run.directory
    settings = plain(stage.evaluation)
    # The evaluation at the end is checked and opened now, before hours of training.
    check_cost(run.lvlm)
    test_set = make_dataset(run.cfg.dataset, run.lvlm, "test")
    check_answers(run.lvlm, test_set, settings["limit"])
    others = named_entries(settings["pruners"], settings)
    # Asked for by name, all must fit; the list of a yaml is for any model.
    if chosen("stage.evaluation.pruners"):
        check_entries(others, run.lvlm)
    else:
        others = fitting(others, run.lvlm)
    further = open_datasets(settings["datasets"], run.lvlm, settings["limit"])
    for name in stage.chain:
        run.check_labels(stage[name])
        run.check_demonstrator(stage[name])
    for number in range(1, run.rounds + 1):
        run.round = number
        for name in stage.chain:
            _train_link(run, name)
    run.keep_curves()
    # Loaded from their folders, as a later evaluation would load them.
    ours = trained_entries(directory, settings)
    check_names(ours, others)
    entries = with_regions(ours + others, test_set)
    table = Evaluation(run.lvlm, test_set, entries, settings, run.cfg, directory)
    # Further datasets first: the table of the run itself, printed last, is what the reader sees.
    evaluate_elsewhere(further, table._replace(entries=ours + others))
    rows, questions = evaluate_entries(table, run.logger, run.curves)
    # The card of the pruner is written again, now with its accuracies.
    run.pruner.trained_on["results"] = card_results(rows, entries[0].name, questions)
    run.save(directory / "pruner")
    log_weights(run.logger, directory)
    return mean_accuracy(rows, entries[0].name)


def _train_link(run: "Training", name: str) -> None:
    """A stage of the chain in the present round."""
    stage, directory = run.cfg.stage, run.directory
    # A stage may have no use for this policy, e.g. an autoencoder where codes are off.
    kind = class_of(stage[name])
    if not kind.applies_to(run.pruner):
        log.info("stage=%s is left out: it has no use for this %s", name, run.pruner.name)
        return
    if run.rounds > 1:
        log.info("round %d of %d: %s", run.round, run.rounds, name)
    part = name if run.rounds == 1 else f"{name}_{run.round}"
    run_stage(run, stage[name], directory / kind.folder, part)
    # Baselines learn from the same stage and codes, so that only the policy differs.
    if kind.teaches_baselines:
        for baseline in stage.baselines:
            run.baseline(baseline, stage[name], directory / baseline)


class Training(ModelRun):
    """A run whose stages train a pruner for an LVLM, which is frozen or tuned in between."""

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        super().__init__(cfg, directory)
        self.pruner: LearnedPruner = build(cfg.policy, token_width=self.lvlm.width)
        # by stages that may run again in this run
        self._shared: dict[type[Stage], dict[str, Any]] = {}
        self.rounds = cfg.stage.get("rounds", 1)
        self.worn = Worn(self.lvlm)
        if self.finished.state is not None:
            self._take_up(self.finished.state)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Where an earlier process got to: what `note` wrote."""
        # The policy is rebuilt from the checkpoint, since prepare() may have replaced the config's
        # policy.
        self.pruner = pruner_from(state["pruner"])
        self.pruner.load_state_dict(state["weights"])
        self.curves = {name: list(map(tuple, points)) for name, points in state["curves"].items()}
        if (worn := state.get("adapter")) is not None:
            self.wear(Path(worn) if Path(worn).is_absolute() else self.directory / worn)
        draw_from(state["draws"])

    def note(self, part: str) -> None:
        # What the next part starts from: weights, curves, random states and rows of metrics.csv.
        weights = {name: value.cpu() for name, value in self.pruner.state_dict().items()}
        where = {"curves": self.curves, "draws": draws(), "rows": csv_position([self.logger])}
        if self.worn.folder is not None:
            where["adapter"] = self.worn.place(self.directory)
        self.finished.add(
            part, {"pruner": self.pruner.about, "weights": weights, **where}, self.writes
        )

    def prepare(self) -> None:
        """What the stage starts from: the pruner of `stage.init_from`, or its weights in this
        policy, or a policy whose autoencoder is trained first."""
        # Three starts: a pruner with its config, weights for this policy, or an autoencoder to
        # train first.
        stage, source = self.cfg.stage, self.cfg.stage.get("init_from")
        kind = class_of(stage[stage.chain[0]] if "chain" in stage else stage)
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
            self._adapter_of_source(source)
        elif source:
            folder = find_pruner(source)
            load_weights(self.pruner, folder)
            self.pruner.trained_on = read_config(folder)["trained_on"]
            check_family(self.pruner, self.lvlm)
            self._adapter_of_source(source)
        elif kind.needs_codes and self.pruner.autoencoder is not None:
            log.info("no stage.init_from: the autoencoder is trained first")
            config: Any = OmegaConf.load(conf_dir() / "stage" / "autoencoder.yaml")
            run_stage(self, config, self.directory / class_of(config).folder)

    def _adapter_of_source(self, source: str) -> None:
        """What the run that this one starts from has made of the language model."""
        if not (Path(source) / ADAPTER).is_dir():
            return
        chain = self.cfg.stage.get("chain", ())
        if any(adapts(class_of(self.cfg.stage[name])) for name in chain):
            self.wear(Path(source).absolute())
        elif self.cfg.model.get("adapter") is None:
            log.warning(
                "stage.init_from=%s tuned its language model, and this run reads with the model "
                "before: add model.adapter=%s to read with the tuned one.",
                source,
                source,
            )

    def wear(self, folder: Path) -> None:
        """The language model reads with this adapter from now on."""
        self.worn.put_on(folder)
        # What was computed by the model before is not shared with stages that follow.
        self._shared.clear()
        vars(self).pop("cache", None)

    def adapter_of(self, config: Any) -> Adapter | None:
        """In a chain: of the round before."""
        return self.worn.adapter

    def built(self, config: Any) -> Stage:
        """The stage; the pruner loses what stages before this one calibrated, unless it keeps
        that."""
        kind = class_of(config)
        if adapts(kind):  # it goes on from what is worn, and puts that on by itself
            self.worn.take_off()
        # A stage that trains the policy again voids what was calibrated on its earlier logits.
        module = self.module_of(config)
        if not kind.keeps_serving:
            self.pruner.serving = replace(self.pruner.serving, trained_to=1.0, fade=0.0, prices=())
            self.pruner.trained_on.pop(CORE, None)  # the core was shared by other logits
        # A stage that runs twice takes over its costly attributes instead of computing them again.
        for name, value in self._shared.get(kind, {}).items():
            setattr(module, name, value)
        return module

    @property
    def makers(self) -> Mapping[str, Callable[[Any], Any]]:
        pruner = {"pruner": lambda config: self.pruner, "selector": lambda config: self.pruner}
        return {**super().makers, **pruner}

    def extras_of(self, config: Any) -> frozenset[str]:
        """Of the policy in training."""
        return self.pruner.extras

    def after(self, module: Stage, config: Any, folder: Path | None) -> None:
        """Calibrate the pruner on validation questions, note where it comes from, and save it."""
        super().after(module, config, folder)
        assert folder is not None
        # Kept for a baseline that the same stage teaches next.
        self._shared[type(module)] = {name: getattr(module, name) for name in module.shares}
        if config.get("calibrate") and module.trained_to is not None:
            # Questions behind those of the served score, so that validation stays held out.
            beyond = after_these(self.val_set, **plain(config.served))
            calibrate_fade(
                self.pruner, self._served(config, first=beyond), module.trained_to, config.calibrate
            )
        self.pruner.trained_on.pop("results", None)  # they were another state's
        self.pruner.trained_on |= {
            "model": self.cfg.model.get("name"),
            "family": self.lvlm.model_type or None,
            "pretrained": self.cfg.model.get("pretrained"),
            "dataset": self.train_set.name,
            "stages": [*self.pruner.trained_on.get("stages", []), config.name],
            "seed": self.cfg.seed,
        }
        self.save(folder)
        # The results of a round stay, since the next one replaces those of the run.
        place = self.directory
        if self.rounds > 1:
            place = self.directory / "rounds" / str(self.round)
            module.save(place)
            self.save(place / "pruner")
        if adapts(type(module)):
            module.take_off()
            self.wear(place)

    def save(self, folder: Path) -> None:
        """The pruner, by rank 0; when it returns the folder is there for all."""
        # All ranks wait: the next stage may read the folder.
        if distributed.rank() == 0:
            self.pruner.save_pretrained(folder)
        distributed.barrier()

    def baseline(self, policy: str, config: Any, folder: Path) -> None:
        """Teach another learned pruner (a yaml of conf/policy) by the same stage, on the same
        codes."""
        if policy in self.finished.parts:
            return
        # The baseline takes the place of the main pruner, and the curves of the run go on without
        # it.
        main, curves = self.pruner, self.curves.copy()
        same = {key: main.config[key] for key in ("token_width", "code_width", "hidden")}
        self.pruner = load_component("policy", policy, **same)
        # Equal codes for both: the comparison is about the policy, not its input.
        if self.pruner.autoencoder is not None and main.autoencoder is not None:
            self.pruner.autoencoder.load_state_dict(main.autoencoder.state_dict())
        # The metrics of the baseline get separate names, or both policies would share a curve.
        renamed = OmegaConf.create(plain(config))
        renamed.module.log_as = f"{config.name}/{policy}"
        fit_stage(self, renamed, folder, policy)
        self.pruner, self.curves = main, curves
        self.note(policy)
