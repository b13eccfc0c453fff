"""From a composed config to a trained pruner."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from tprl.build import build, conf_dir, load_component
from tprl.commands.entry import chosen
from tprl.commands.evaluate import evaluate_entries, make_dataset, make_logger, plain, start
from tprl.commands.options import CHAIN, OURS, checked
from tprl.commands.plan import check_plan
from tprl.commands.threads import use_threads
from tprl.data.benchmark import passed_over
from tprl.errors import UserError
from tprl.evaluation.entries import check_names, named_entries, trained_entries
from tprl.evaluation.evaluator import check_answers, check_cost, check_entries
from tprl.evaluation.results import card_results
from tprl.lvlm.loading import find_model
from tprl.pretraining import tiny_llava
from tprl.pruners.learned import (
    LearnedPruner,
    check_family,
    find_pruner,
    load_pruner,
    load_weights,
    pruner_from,
    read_config,
)
from tprl.pruners.tprl import TPRL
from tprl.report.overlays import Overlays
from tprl.runtime import distributed
from tprl.runtime.checkpoint import Finished, SaveEvery, checkpoint_of, draw_from, draws, keep_rows, rows
from tprl.runtime.curves import Curves, write_curves
from tprl.runtime.progress import FitProgress
from tprl.runtime.store import Cache
from tprl.runtime.tracking import Tracker, log_weights
from tprl.scoring.identity import of_dataset, of_lvlm, of_pruner
from tprl.scoring.lengths import check_lengths
from tprl.scoring.scorer import LABELS
from tprl.scoring.validation import ServedScore
from tprl.stages.calibrate import calibrate_fade
from tprl.types import LVLM, Dataset, Pruner

log = logging.getLogger(__name__)


def train(cfg: DictConfig, directory: Path) -> Path:
    """Run `cfg.stage`, leave its weights (and for stage=all the evaluation) in `directory`, and return it.

    Raises:
        UserError: bad input; nothing has been computed yet, or what has been is in `directory`.
    """
    cfg = checked(cfg, "train")
    check_plan(plain(cfg))
    start(cfg, directory)
    if cfg.stage.name == "pretrain":
        _pretrain(cfg, directory)
        return directory
    run = Training(cfg, directory)
    if cfg.stage.name == "all":  # for the evaluation at its end
        settings = plain(cfg.stage.evaluation)
        check_cost(run.lvlm)
        test_set = make_dataset(cfg.dataset, run.lvlm, "test")
        check_answers(run.lvlm, test_set, settings["limit"])
        check_entries(named_entries(settings["pruners"], settings), run.lvlm)
        run.check_labels()
    else:
        run.check_labels()
        if run.finished.state is None:  # otherwise it holds the weights
            run.prepare()
        run.part(cfg.stage, directory / "pruner")
        run.keep_curves()
        log_weights(run.logger, directory)
        return directory
    for name in CHAIN:
        if name == "adapt" and not isinstance(run.pruner, TPRL):
            continue  # only the transformer has a budget head
        run.part(cfg.stage[name], directory / ("pruner" if name in ("ppo", "adapt") else name))
        if name == "lfd":
            for baseline in cfg.stage.baselines:
                run.baseline(baseline, directory / baseline)
    run.keep_curves()
    ours, others = trained_entries(directory, settings), named_entries(settings["pruners"], settings)
    check_names(ours, others)
    entries = ours + others
    rows = evaluate_entries(run.lvlm, test_set, entries, settings, cfg, directory, run.logger, run.curves)
    questions = min(settings["limit"] or len(test_set), len(test_set))
    run.pruner.trained_on["results"] = card_results(rows, entries[0].name, questions)
    run.save(directory / "pruner")
    log_weights(run.logger, directory)
    return directory


class Training:
    """The frozen LVLM, the data and the pruner that a chain of stages works on."""

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        self.cfg, self.directory = cfg, directory
        if OmegaConf.is_list(cfg.trainer.get("devices")):
            raise UserError(
                f"trainer.devices={cfg.trainer.devices} would part the policy from its LVLM: give a number, "
                "and choose the cards with CUDA_VISIBLE_DEVICES."
            )
        on_cpu = {"device": "cpu"} if cfg.trainer.accelerator == "cpu" and "device" not in cfg.model else {}
        self.lvlm: LVLM = build(cfg.model, **on_cpu)
        use_threads(cfg, directory, self.lvlm)
        self.train_set: Dataset = make_dataset(cfg.dataset, self.lvlm, "train")
        self.val_set: Dataset = make_dataset(cfg.dataset, self.lvlm, "val")
        self.pruner: LearnedPruner = build(cfg.policy, token_width=self.lvlm.width)
        self.logger = make_logger(cfg, directory)
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.demonstrations: Any = None
        self._lengths_checked = False
        self.writes = True  # the only rank, or the first of several
        self.finished = Finished(directory, bool(cfg.get("resume")))
        if self.finished.state is not None:
            self._take_up(self.finished.state)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Where an earlier process got to: what `part` noted."""
        self.pruner = pruner_from(state["pruner"])
        self.pruner.load_state_dict(state["weights"])
        self.curves = {name: [(x, y) for x, y in points] for name, points in state["curves"].items()}
        draw_from(state["draws"])

    def _note(self, part: str) -> None:
        """The part is done: a resumed run starts after it."""
        weights = {name: value.cpu() for name, value in self.pruner.state_dict().items()}
        where = {"curves": self.curves, "draws": draws(), "rows": rows([self.logger])}
        self.finished.add(part, {"pruner": self.pruner.about, "weights": weights, **where}, self.writes)

    def prepare(self) -> None:
        """Weights of an earlier stage, or the autoencoder that every later stage needs."""
        source = self.cfg.stage.get("init_from")
        if self.cfg.stage.name == "adapt":
            if not source:
                raise UserError("stage=adapt needs a trained policy: give stage.init_from=<run directory>.")
            if chosen("policy"):
                raise UserError("stage=adapt keeps the policy of stage.init_from as it is: leave policy away.")
            self.pruner = load_pruner(source)
            check_family(self.pruner, self.lvlm)
        elif source:
            folder = find_pruner(source)
            load_weights(self.pruner, folder)
            self.pruner.trained_on = read_config(folder)["trained_on"]
            check_family(self.pruner, self.lvlm)
        elif self.cfg.stage.name != "autoencoder" and self.pruner.autoencoder is not None:
            log.info("no stage.init_from: the autoencoder is trained first")
            self.part(OmegaConf.load(conf_dir() / "stage" / "autoencoder.yaml"), self.directory / "autoencoder")

    def part(self, config: Any, folder: Path) -> None:
        """One stage, unless a run that this one goes on with has finished it."""
        if config.name not in self.finished.parts:
            self.stage(config, folder, config.name)
            self._note(config.name)

    def stage(self, config: Any, folder: Path, part: str) -> None:
        """Train one stage and save the pruner to `folder`; `part` names its checkpoint."""
        name = config.name
        if name == "autoencoder" and self.pruner.autoencoder is None:
            return
        live: dict[str, Any] = {
            "pruner": self.pruner,
            "lvlm": self.lvlm,
            "dataset": self.train_set,
            "seed": self.cfg.seed,
        }
        if name == "ppo":
            live |= {"reward": build(self.cfg.reward), "cache": self.cache}
        if name != "autoencoder":
            labels = self._labels(name, live.get("reward"))
            served = plain(config.served)
            live["served"] = ServedScore(self.lvlm, self.val_set, labels=labels, **served)
        if name == "lfd":
            live |= self._demonstrator()
        module = build(_without(config, OURS), **live)
        if name != "adapt":  # what was calibrated belongs to the weights before this stage
            self.pruner.serving = replace(self.pruner.serving, trained_to=1.0, fade=0.0, prices=())
        if name == "lfd":
            module.demonstrations = self.demonstrations
        self._fit(module, config, part)
        for data in (self.train_set, self.val_set):
            if damage := passed_over(data):
                log.warning("stage=%s: %s", name, damage)
        if name == "lfd":
            self.demonstrations = module.demonstrations
        if config.get("calibrate") and module.trained_to is not None:
            questions = {**plain(config.served), "first": config.served.first + config.served.limit}
            held_out = ServedScore(self.lvlm, self.val_set, labels=labels, **questions)
            calibrate_fade(self.pruner, held_out, module.trained_to, config.calibrate)
        if name == "ppo" and config.budget != "exact_k":  # elsewhere a common offset of the logits means nothing
            self.pruner.calibrate((e for _, e in live["served"].batches), config.threshold_ratio)
        self._collect_curves(module, name)
        self.pruner.trained_on.pop("results", None)  # they were another state's
        self.pruner.trained_on |= {
            "model": self.cfg.model.get("name"),
            "family": getattr(self.lvlm, "model_type", None),
            "pretrained": self.cfg.model.get("pretrained"),
            "dataset": self.train_set.name,
            "stages": [*self.pruner.trained_on.get("stages", []), name],
            "seed": self.cfg.seed,
        }
        self.save(folder)

    def save(self, folder: Path) -> None:
        """The pruner, by rank 0; when it returns the folder is there for all."""
        if distributed.rank() == 0:
            self.pruner.save_pretrained(folder)
        distributed.wait()

    def keep_curves(self) -> None:
        """All curves of this run, those of an earlier process included, for the reports of later evaluations."""
        if distributed.rank() == 0:
            write_curves(self.directory, self.curves)

    def check_labels(self) -> None:
        """Refuse, before anything is computed, answers that a stage of this run reads and that are not there or cannot
        be written."""
        names = CHAIN if self.cfg.stage.name == "all" else (self.cfg.stage.name,)
        for name in names:
            if name != "autoencoder":
                self._labels(name, build(self.cfg.reward) if name == "ppo" else None)

    def _labels(self, stage: str, reward: Any) -> bool:
        """Whether a stage reads reference answers.

        Raises:
            UserError: it would, and the dataset has none.
        """
        there = getattr(self.train_set, "labelled", True)
        reads = stage != "lfd" if reward is None else bool(reward.needs & LABELS)
        if reads and not there:
            raise UserError(
                f"stage={stage} reads answers, and dataset {self.train_set.name} was said to have none: use stage=lfd, "
                "and stage=ppo with reward=fidelity."
            )
        if there and (reward is None or reads):
            self._check_lengths()
            return True
        return False

    def _check_lengths(self) -> None:
        """Once for all stages of a run: training and validation questions."""
        if not self._lengths_checked:
            self._lengths_checked = True
            check_lengths(self.lvlm, self.train_set, training=True)
            check_lengths(self.lvlm, self.val_set, training=True)

    def baseline(self, policy: str, folder: Path) -> None:
        """Teach another learned pruner (a yaml of conf/policy) on the same codes and demonstrations."""
        if policy in self.finished.parts:
            return
        mine = self.pruner
        same = {key: mine.config[key] for key in ("token_width", "code_width", "hidden")}
        self.pruner = load_component("policy", policy, **same)
        if self.pruner.autoencoder is not None and mine.autoencoder is not None:
            self.pruner.autoencoder.load_state_dict(mine.autoencoder.state_dict())
        curves = self.curves.copy()
        self.stage(OmegaConf.create({**self.cfg.stage.lfd, "log_as": f"lfd/{policy}"}), folder, policy)
        self.pruner, self.curves = mine, curves
        self._note(policy)

    @cached_property
    def cache(self) -> Cache | None:
        """Where other runs find what this one computes, if they have the same model and data."""
        if not self.cfg.get("cache"):
            return None
        model, data = of_lvlm(self.lvlm, plain(self.cfg.model)), plain(self.cfg.dataset)
        return Cache(Path(self.cfg.cache), {"model": model, "data": of_dataset(self.train_set, data, "train")})

    def _demonstrator(self) -> dict[str, Any]:
        """The demonstrator, and the cache of its demonstrations."""
        made: Pruner = build(self.cfg.pruner)
        about = of_pruner(made, plain(self.cfg.pruner))
        cache = self.cache and replace(self.cache, about={**self.cache.about, "demonstrator": about})
        return {"demonstrator": made, "cache": cache}

    def _fit(self, module: Any, config: Any, part: str) -> None:
        name, curves = config.name, Curves()
        resume = checkpoint_of(self.directory, part) if self.cfg.get("resume") else None
        if resume is None:  # the part begins; rows of an attempt at it go
            keep_rows([self.logger], 0 if self.finished.state is None else self.finished.state["rows"])
        saving = SaveEvery(self.directory, config.get("save_every"), part)
        callbacks: list[pl.Callback] = [FitProgress(name), curves, saving]
        if isinstance(self.logger, Tracker):  # what a yaml leaves out: the class's defaults
            arguments = dict(module.hparams)
            self.logger.describe({f"arguments/{arguments.get('log_as', name)}": arguments})
            if name in ("ppo", "distill") and min(self.logger.overlays, self.logger.overlay_every) > 0:
                callbacks.append(Overlays(name, self.logger))
        # The policy learns where the LVLM is; Lightning alone would choose any accelerator it finds.
        here = (
            {"accelerator": "cpu"} if self.lvlm.device.type == "cpu" and self.cfg.trainer.accelerator == "auto" else {}
        )
        trainer = build(
            self.cfg.trainer,
            **here,
            max_epochs=module.epochs,
            logger=self.logger,
            callbacks=callbacks,
            enable_progress_bar=False,
            log_every_n_steps=config.get("log_every", 1),
            gradient_clip_val=getattr(module, "clip", None),
            default_root_dir=str(self.directory),
        )
        self.writes = trainer.is_global_zero
        trainer.fit(module, ckpt_path=resume, weights_only=True)
        self.curves |= curves.points

    def _collect_curves(self, module: Any, name: str) -> None:
        if name == "lfd":
            self.curves["lfd, accuracy: served"] = module.curve
        if name == "ppo":
            self.curves |= {f"ppo, accuracy: {kind}": points for kind, points in module.curves.items()}


def _without(config: Any, names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in plain(config).items() if key not in names}


def _pretrain(cfg: DictConfig, directory: Path) -> None:
    """Train the embedded LVLM and write its folder to `<directory>/model`."""
    if cfg.model.get("name") != "tiny_llava":
        raise UserError(f"stage=pretrain trains the embedded LVLM, not {cfg.model.get('name')}: use model=tiny_llava.")
    source = cfg.stage.init_from
    if distributed.count() > 1:
        raise UserError(f"stage=pretrain runs in one process, not in {distributed.count()}: leave trainer=ddp away.")
    if source and not (find_model(source) / "clip").is_dir():
        raise UserError(f"stage.init_from={source} holds no model written by stage=pretrain (no clip/ in it).")
    use_threads(cfg, directory)
    parts = tiny_llava.load(find_model(source)) if source else build(cfg.stage.blueprint, seed=cfg.seed)
    module = build(_without(cfg.stage, OURS), parts=parts, seed=cfg.seed)
    steps = module.hparams["vision_steps"] + module.hparams["language_steps"]
    resume = checkpoint_of(directory, "pretrain") if cfg.resume else None
    trainer = build(
        cfg.trainer,
        max_epochs=-1,
        max_steps=steps,
        logger=make_logger(cfg, directory),
        callbacks=[FitProgress("pretrain", steps), SaveEvery(directory, cfg.stage.save_every, "pretrain")],
        enable_progress_bar=False,
        log_every_n_steps=10,
        default_root_dir=str(directory),
        **plain(cfg.stage.trainer),
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    tiny_llava.save(directory / "model", parts)
