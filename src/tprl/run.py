"""From a composed config to a finished run directory: the only code that sees a DictConfig."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from tprl.budget import check_keep_ratio
from tprl.build import build, conf_dir, load_component
from tprl.checkpoint import SaveEvery, last_checkpoint
from tprl.entry import chosen
from tprl.errors import UserError
from tprl.evaluation import analysis, selectors
from tprl.evaluation.entries import check_names, compared_entries, named_entries, seeded_entries, trained_entries
from tprl.evaluation.evaluator import Entry, check_cost, summarise
from tprl.evaluation.evaluator import evaluate as answer_all
from tprl.evaluation.parity import parity, table, varied
from tprl.evaluation.report import write_report
from tprl.evaluation.results import Row, card_results, print_table, write_results, write_samples
from tprl.evaluation.served import ServedScore
from tprl.evaluation.spread import spreads
from tprl.lvlm import tiny_llava
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import find_model
from tprl.progress import FitProgress, Progress
from tprl.pruners.learned import LearnedPruner, check_family, find_pruner, load_pruner, load_weights, read_config
from tprl.pruners.tprl import TPRL
from tprl.scoring import Scorer
from tprl.stages.calibrate import calibrate_fade
from tprl.tracking import log_results
from tprl.types import LVLM, Dataset, Pruner

log = logging.getLogger(__name__)
CHAIN = ("autoencoder", "lfd", "ppo", "adapt")
OURS = ("stage", "name", "init_from", "served", "threshold_ratio", "trainer", "save_every", "calibrate", "blueprint")


def train(cfg: DictConfig, directory: Path) -> Path:
    """Run `cfg.stage`, leave its weights (and for stage=all the evaluation) in `directory`, and return it.

    Raises:
        UserError: bad input; nothing has been computed yet, or what has been is in `directory`.
    """
    _start(cfg, directory)
    if cfg.stage.name == "pretrain":
        _pretrain(cfg, directory)
        return directory
    _check_ratios(cfg)
    run = Training(cfg, directory)
    if cfg.stage.name == "all":
        check_cost(run.lvlm)  # for the evaluation at its end
    else:
        run.prepare()
        run.stage(cfg.stage, directory / "pruner")
        return directory
    for name in CHAIN:
        if name == "adapt" and not isinstance(run.pruner, TPRL):
            continue  # only the transformer has a budget head
        run.stage(cfg.stage[name], directory / ("pruner" if name in ("ppo", "adapt") else name))
        if name == "lfd":
            for baseline in cfg.stage.baselines:
                run.baseline(baseline, directory / baseline)
    settings = _plain(cfg.stage.evaluation)
    entries = trained_entries(directory, settings) + named_entries(settings["pruners"], settings)
    check_names(entries)
    test_set = build(cfg.dataset, split="test")
    rows = _evaluate(run.lvlm, test_set, entries, settings, cfg, directory, run.logger, run.curves)
    run.pruner.trained_on["results"] = card_results(rows, entries[0].name, settings["limit"] or len(test_set))
    run.pruner.save_pretrained(directory / "pruner")
    return directory


def evaluate(cfg: DictConfig, directory: Path) -> Path:
    """Evaluate a run (`run=<directory>`) or named pruners (`pruner=<name>`, `pruners=[...]`) and return `directory`.

    Raises:
        UserError: bad input.
    """
    settings = _plain(cfg)
    for ratio in cfg.keep_ratios:
        check_keep_ratio(ratio)
    if cfg.mode not in ("accuracy", "parity", "selectors"):
        raise UserError(f"mode={cfg.mode} is unknown: use accuracy, parity or selectors.")
    if cfg.mode != "accuracy":
        return (_parity if cfg.mode == "parity" else _selectors)(cfg, directory)
    entries: list[Entry] = []
    if cfg.run:
        cfg = _with_run_config(cfg, Path(cfg.run))
        entries += trained_entries(Path(cfg.run), settings)
    entries += compared_entries(settings["runs"] or {}, settings)
    if cfg.get("pruner") is not None:
        entries += seeded_entries(lambda **live: build(cfg.pruner, **live), settings)
    entries += named_entries(settings["pruners"], settings)
    check_names(entries)
    if len(entries) == 1 and not cfg.get("pruner"):
        raise UserError("nothing to evaluate: give run=<directory of a training run>, runs, pruner=<name> or pruners.")
    _start(cfg, directory)
    lvlm = build(cfg.model)
    check_cost(lvlm)
    logger = _logger(cfg, directory)
    _evaluate(lvlm, build(cfg.dataset, split=cfg.split), entries, settings, cfg, directory, logger)
    return directory


def _parity(cfg: DictConfig, directory: Path) -> Path:
    """Compare the model, or small random builds of `models`, with its stock class; prints and writes a table."""
    _start(cfg, directory)
    questions = build(cfg.dataset, split=cfg.split)
    samples = varied([questions[i] for i in range(cfg.limit or 6)])
    lvlms = [load_component("model", name, pretrained=None, dtype="float32") for name in cfg.models or []]
    found = {}
    for lvlm in lvlms or [build(cfg.model)]:
        if not isinstance(lvlm, FrozenLVLM):
            raise UserError(f"model={lvlm.name} has no stock class to compare with.")
        found[lvlm.name] = parity(lvlm, samples)
        log.info("%s: %s", lvlm.name, found[lvlm.name])
    (directory / "parity.md").write_text(table(found) + "\n")
    print(table(found))
    return directory


def _selectors(cfg: DictConfig, directory: Path) -> Path:
    """The table of docs/baselines.md."""
    _start(cfg, directory)
    text = selectors.table(selectors.measure())
    (directory / "selectors.md").write_text(text + "\n")
    print(text)
    return directory


def _start(cfg: DictConfig, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    pl.seed_everything(cfg.get("seed", 0), verbose=False)
    disable_progress_bar()
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _logger(cfg: DictConfig, directory: Path) -> Any:
    return build(cfg.logger, save_dir=directory) if cfg.get("logger") else False


def _check_ratios(cfg: DictConfig) -> None:
    """Refuse bad keep ratios before anything is loaded."""
    stages = [cfg.stage] if cfg.stage.name != "all" else [cfg.stage[name] for name in CHAIN]
    for stage in stages:
        lists = [stage.get(name) for name in ("keep_ratio", "keep_ratios", "budgets", "calibrate")]
        for given in [*lists, stage.get("served", {}).get("keep_ratios")]:
            for value in [] if given is None else given if OmegaConf.is_list(given) else [given]:
                check_keep_ratio(value)


# --- training ---------------------------------------------------------------------------------------------------


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
        self.train_set: Dataset = build(cfg.dataset, split="train")
        self.val_set: Dataset = build(cfg.dataset, split="val")
        self.pruner: LearnedPruner = build(cfg.policy, token_width=self.lvlm.width)
        self.logger = _logger(cfg, directory)
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.demonstrations: Any = None

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
            print("no stage.init_from: the autoencoder is trained first", flush=True)
            self.stage(OmegaConf.load(conf_dir() / "stage" / "autoencoder.yaml"), self.directory / "autoencoder")

    def stage(self, config: Any, folder: Path) -> None:
        """Train one stage and save the pruner to `folder`."""
        name = config.name
        if name == "autoencoder" and self.pruner.autoencoder is None:
            return
        live: dict[str, Any] = {
            "pruner": self.pruner,
            "lvlm": self.lvlm,
            "dataset": self.train_set,
            "seed": self.cfg.seed,
        }
        if name != "autoencoder":
            live["served"] = ServedScore(self.lvlm, self.val_set, config.served.keep_ratios, config.served.limit)
        if name == "lfd":
            live["demonstrator"] = self._demonstrator()
        if name == "ppo":
            live["reward"] = build(self.cfg.reward)
        module = build(_without(config, OURS), **live)
        if name != "adapt":  # what was calibrated belongs to the weights before this stage
            self.pruner.serving = replace(self.pruner.serving, trained_to=1.0, fade=0.0, prices=())
        if name == "lfd":
            module.demonstrations = self.demonstrations
        self._fit(module, name, config)
        if name == "lfd":
            self.demonstrations = module.demonstrations
        if config.get("calibrate") and module.trained_to is not None:
            calibrate_fade(self.pruner, live["served"], module.trained_to, config.calibrate)
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
        self.pruner.save_pretrained(folder)

    def baseline(self, policy: str, folder: Path) -> None:
        """Teach another learned pruner (a yaml of conf/policy) on the same codes and demonstrations."""
        mine = self.pruner
        same = {key: mine.config[key] for key in ("token_width", "code_width", "hidden")}
        self.pruner = load_component("policy", policy, **same)
        if self.pruner.autoencoder is not None and mine.autoencoder is not None:
            self.pruner.autoencoder.load_state_dict(mine.autoencoder.state_dict())
        curves = self.curves.copy()
        self.stage(self.cfg.stage.lfd, folder)
        self.pruner, self.curves = mine, curves

    def _demonstrator(self) -> Pruner:
        if self.cfg.get("pruner") is None:
            raise UserError("stage=lfd needs a demonstrator: set pruner=<name>, e.g. pruner=divprune.")
        return build(self.cfg.pruner)

    def _fit(self, module: Any, name: str, config: Any) -> None:
        resume = self.cfg.get("resume") if self.cfg.stage.name == name else None
        callbacks: list[pl.Callback] = [FitProgress(name)]
        if name in ("ppo", "distill"):
            callbacks.append(SaveEvery(self.directory, config.save_every))
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
            log_every_n_steps=config.get("log_every", 1 if name in ("ppo", "distill") else 20),
            gradient_clip_val=getattr(module, "clip", None),
            default_root_dir=str(self.directory),
        )
        trainer.fit(module, ckpt_path=last_checkpoint(resume) if resume else None)

    def _collect_curves(self, module: Any, name: str) -> None:
        if name == "lfd":
            self.curves["lfd: served"] = module.curve
        if name == "ppo":
            self.curves |= {f"ppo: {kind}": points for kind, points in module.curves.items()}


def _without(config: Any, names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in _plain(config).items() if key not in names}


def _plain(config: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _pretrain(cfg: DictConfig, directory: Path) -> None:
    """Train the embedded LVLM and write its folder to `<directory>/model`."""
    if cfg.model.get("name") != "tiny_llava":
        raise UserError(f"stage=pretrain trains the embedded LVLM, not {cfg.model.get('name')}: use model=tiny_llava.")
    source = cfg.stage.init_from
    if source and not (find_model(source) / "clip").is_dir():
        raise UserError(f"stage.init_from={source} holds no model written by stage=pretrain (no clip/ in it).")
    parts = tiny_llava.load(find_model(source)) if source else build(cfg.stage.blueprint, seed=cfg.seed)
    module = build(_without(cfg.stage, OURS), parts=parts, seed=cfg.seed)
    steps = module.hparams["vision_steps"] + module.hparams["language_steps"]
    resume = last_checkpoint(cfg.resume) if cfg.resume else None
    done = torch.load(resume, weights_only=True)["consumed"] if resume else 0
    trainer = build(
        cfg.trainer,
        max_epochs=-1,
        max_steps=steps,
        logger=_logger(cfg, directory),
        callbacks=[FitProgress("pretrain", steps, done), SaveEvery(directory, cfg.stage.save_every)],
        enable_progress_bar=False,
        log_every_n_steps=10,
        default_root_dir=str(directory),
        **_plain(cfg.stage.trainer),
    )
    trainer.fit(module, ckpt_path=resume)
    tiny_llava.save(directory / "model", parts)


# --- evaluation -------------------------------------------------------------------------------------------------


def _with_run_config(cfg: DictConfig, run: Path) -> DictConfig:
    """Model and dataset of the run, unless the command line names others."""
    path = run / "config.yaml"
    if not path.is_file():
        why = "does not exist" if not run.exists() else "holds no config.yaml"
        raise UserError(f"run={run} {why}: give the directory that src.train printed as `run:`.")
    before = OmegaConf.load(path)
    assert isinstance(before, DictConfig)
    for group in ("model", "dataset"):
        if not chosen(group):
            OmegaConf.update(cfg, group, before[group], merge=False, force_add=True)
    return cfg


def _evaluate(
    lvlm: LVLM,
    dataset: Dataset,
    entries: Sequence[Entry],
    settings: Mapping[str, Any],
    cfg: DictConfig,
    directory: Path,
    logger: Any,
    curves: Mapping[str, list[tuple[float, float]]] | None = None,
) -> list[Row]:
    """Answer everything, then table, files and report; returns the rows of `results.csv`."""
    scorer = Scorer(lvlm, dataset)
    answered = answer_all(scorer, dataset, entries, settings["batch_size"], settings["limit"], Progress("evaluate"))
    rows = summarise(answered, lvlm.name, dataset.name)
    write_results(directory / "results.csv", rows)
    log_results(logger, rows)
    write_samples(directory / "samples.jsonl", [one.row for one in answered])
    main = entries[0]
    differences = analysis.paired(answered, main.name)
    all_differences = differences + analysis.paired(answered, f"{main.name}_adaptive")
    (directory / "paired.json").write_text(json.dumps([vars(d) for d in all_differences], indent=1) + "\n")
    ratio = min((r for r in main.keep_ratios if r is not None), default=1 / 9)
    shown = [main, *(e for e in entries if e.name in ("divprune", "random") and e.seed == 0)][:3]
    pruners = {e.name: e.pruner for e in shown if isinstance(e.pruner, Pruner)}  # layer pruners have no map to show
    guided = None
    if isinstance(main.pruner, LearnedPruner):
        guided = analysis.guided(scorer, dataset, main.pruner, ratio, settings["limit"])
    found_spreads = spreads([one.row for one in answered])
    (directory / "spreads.json").write_text(json.dumps([vars(s) for s in found_spreads], indent=1) + "\n")
    sentence = analysis.headline(answered, differences, main.name)
    write_report(
        directory / "report.html",
        title=f"{main.name} on {dataset.name} with {lvlm.name}",
        headline=sentence,
        rows=rows,
        paired=all_differences,
        gallery=analysis.gallery(scorer, dataset, pruners, ratio) if pruners else [],
        guided=guided,
        spreads=found_spreads,
        learning_curves=curves,
        commands=[f"python -m src.eval run={directory}"],
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
    )
    print_table(rows)
    for d in differences:
        print(
            f"{d.pruner} - {d.other} at {d.keep_ratio:.3f}: {d.difference * 100:+.1f} points "
            f"(95 % interval {d.low * 100:+.1f} to {d.high * 100:+.1f})"
        )
    if guided is not None:
        print(analysis.guided_line(guided))
    print(sentence)
    print(f"report: {directory / 'report.html'}")
    return rows
