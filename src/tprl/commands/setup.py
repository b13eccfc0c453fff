"""What every command does before its work: entries, model and data of a run, directory, seed,
logger."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from tprl.build import build, plain
from tprl.commands.entry import chosen, run_names
from tprl.commands.threads import use_threads
from tprl.data.base import BaseDataset
from tprl.data.values import name_list
from tprl.errors import UserError
from tprl.evaluation.entries import (
    check_names,
    check_regions,
    compared_entries,
    named_entries,
    seeded_entries,
    trained_entries,
)
from tprl.evaluation.evaluator import Entry, check_entries
from tprl.evaluation.results import FULL
from tprl.evaluation.sweep import Sweep, read_sweep
from tprl.lvlm.adapters import FOLDER as ADAPTER
from tprl.lvlm.base import BaseLVLM
from tprl.pruners.base import make_pruner
from tprl.runtime import distributed, run_directory
from tprl.runtime.deterministic import use_deterministic
from tprl.runtime.provenance import provenance
from tprl.runtime.tracking import Tracker
from tprl.scoring.lengths import fit_length
from tprl.types import LVLM

log = logging.getLogger(__name__)

COPY_AGAIN = "copy it again, or give model=<name> and dataset=<name>"
NOISE = (  # Lightning's, about itself or about a choice that was meant
    r".*isinstance\(treespec, LeafSpec\)",
    r"Your `IterableDataset` has `__len__` defined",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def asked_entries(
    cfg: DictConfig, settings: Mapping[str, Any]
) -> tuple[DictConfig, list[Entry], Sweep | None]:
    """What `run`, `sweep`, `runs`, `pruner` and `pruners` ask for, and the config with the run's
    model and dataset."""
    # One group per option: `check_names` allows equal names within a group, as seeds.
    groups: list[list[Entry]] = []
    if cfg.run:
        cfg = with_run_config(cfg, Path(cfg.run))
        groups.append(entries_of_run(Path(cfg.run), settings))
    swept = None
    if cfg.sweep:
        same = [group for group in ("model", "dataset") if not chosen(group)]
        swept = read_sweep(Path(cfg.sweep), settings["keep_ratios"], same)
        cfg = with_run_config(cfg, swept.config.parent)
        groups.append(list(swept.entries))
    # Arms decide over model and dataset only if neither run nor sweep did.
    arms = settings["runs"] or {}
    groups.append(compared_entries(arms, settings))
    if arms and not cfg.run and not cfg.sweep:
        cfg = with_arms_config(cfg, arms)
    if cfg.get("pruner") is not None:
        groups.append(seeded_entries(lambda **live: make_pruner(cfg.pruner, **live), settings))
    groups.append(named_entries(settings["pruners"], settings))
    check_names(*groups)
    entries = list(chain.from_iterable(groups))
    # `named_entries` always adds the reference, so one entry means that nothing was named.
    if len(entries) == 1 and not cfg.get("pruner"):
        raise UserError(
            "nothing to evaluate: give run=<directory of a "
            "training run>, sweep, runs, pruner=<name> or pruners."
        )
    return cfg, entries, swept


def entries_of_run(run: Path, settings: Mapping[str, Any]) -> list[Entry]:
    """The pruner of a run and its modes; of one that tuned a model under a rule, which leaves
    nothing of its own, that rule."""
    if (run / "pruner").is_dir() or not (run / ADAPTER).is_dir():
        return trained_entries(run, settings)
    # The run tuned the model; the rule that pruned during tuning is what it is served with.
    config = run_directory.read_yaml(run / "config.yaml", COPY_AGAIN).pruner
    entries = seeded_entries(lambda **live: build(config, **live), settings)
    return [entry for entry in entries if entry.name != FULL]


def one_process(mode: str) -> None:
    """Refuse to go on as one of several processes, each of which would write the same files.

    Raises:
        UserError: this is one of several.
    """
    if distributed.count() > 1:
        raise UserError(
            f"mode={mode} works in one process, and {distributed.count()} were started: start it "
            "without torchrun or srun."
        )


def model_and_data(
    cfg: DictConfig, directory: Path, entries: Sequence[Entry], split: str
) -> tuple[Any, BaseDataset]:
    """The LVLM and the questions of a mode that answers with `entries`, once all names are known.

    Raises:
        UserError: an entry that this LVLM or these questions cannot serve, or bad settings.
    """
    start(cfg, directory)
    # The model comes first: datasets write their boxes and bound their answers as it does.
    lvlm = make_lvlm(cfg.model)
    use_threads(cfg, directory, lvlm)
    check_entries(entries, lvlm)
    dataset = make_dataset(cfg.dataset, lvlm, split)
    check_regions(entries, dataset)
    return lvlm, dataset


def make_lvlm(config: DictConfig, **live: Any) -> BaseLVLM:
    """The LVLM of a config.

    Raises:
        UserError: its class lacks what `BaseLVLM` holds, or it cannot be built.
    """
    lvlm = build(config, **live)
    if not isinstance(lvlm, BaseLVLM):
        raise UserError(
            f"model._target_={config['_target_']} does not derive from tprl.lvlm.base.BaseLVLM: "
            "derive it, as docs/howto-lvlm.md shows."
        )
    return lvlm


def make_dataset(config: DictConfig, lvlm: LVLM, split: str) -> BaseDataset:
    """A split of the questions, which reads boxes as this LVLM writes them, and counts what it
    cannot read; the LVLM writes answers as long as its questions usually need, unless its settings
    say otherwise.

    Raises:
        UserError: its class lacks what `BaseDataset` holds, or it cannot be built.
    """
    # Before the first question is taken: both change how questions are worded.
    dataset = build(config, split=split)
    if not isinstance(dataset, BaseDataset):
        raise UserError(
            f"dataset._target_={config['_target_']} does not derive from "
            "tprl.data.base.BaseDataset: derive it, as docs/howto-dataset.md shows."
        )
    dataset.read_by(lvlm)
    dataset.reads_boxes_as(lvlm)
    fit_length(lvlm, dataset)
    return dataset


def with_run_config(cfg: DictConfig, run: Path) -> DictConfig:
    """Model and dataset of the run, unless the command line names others."""
    # Missing folders first, then damage: each has its own remedy.
    path = run / "config.yaml"
    if not path.is_file():
        why = "does not exist" if not run.exists() else "holds no config.yaml"
        raise UserError(f"run={run} {why}: give the directory that src.train printed as `run:`.")
    run_directory.settings_of(
        run, run_directory.DONE
    )  # the report quotes it: damage is said now, not after the evaluation
    tuned = (run / ADAPTER).is_dir()
    if tuned and chosen("model") and not cfg.model.get("adapter"):
        raise UserError(
            f"run={run} tuned its model, and another one is named: leave model out, or add "
            f"model.adapter={run / ADAPTER}."
        )
    if chosen("model") and chosen("dataset"):
        return cfg
    # Groups from the command line win; other groups come from the run as a whole.
    before = run_directory.read_yaml(path, COPY_AGAIN)
    for group in ("model", "dataset"):
        if not chosen(group):
            OmegaConf.update(cfg, group, before[group], merge=False, force_add=True)
    if tuned and not chosen("model"):
        OmegaConf.update(cfg, "model.adapter", str(run / ADAPTER), force_add=True)
    return cfg


def _which(group: str, table: dict[str, Any]) -> dict[str, Any]:
    """What two runs on one model or dataset agree in. How a model is loaded, its dtype and memory,
    may differ."""
    if group == "dataset":
        return table
    return {key: table.get(key) for key in ("name", "pretrained", "adapter")}


def with_arms_config(cfg: DictConfig, arms: Mapping[str, Any]) -> DictConfig:
    """Model and dataset that the runs of all arms have in common, unless the command line names
    others. A stage's folder belongs to the run around it; a bare pruner has none.

    Raises:
        UserError: runs on different models or datasets.
    """
    # A run's config lies in its folder, or above the folder of one of its stages.
    paths = [Path(run) for name, spec in arms.items() for run in name_list(f"runs.{name}", spec)]
    places = list(chain.from_iterable((path, path.parent) for path in paths))
    runs = [place for place in places if (place / "config.yaml").is_file()]
    if not runs:
        return cfg
    configs = [run_directory.read_yaml(run / "config.yaml", COPY_AGAIN) for run in runs]
    # Arms of different models would share one table, and their difference would not be the pruner.
    for group in ("model", "dataset"):
        settings = [_which(group, plain(config[group])) for config in configs]
        different = [table for table in settings if table != settings[0]]
        if different and not chosen(group):
            raise UserError(
                f"the runs of runs={{...}} have different settings of {group}, {settings[0]} and "
                f"{different[0]}: choose one for all by {group}=<name>."
            )
    return with_run_config(cfg, runs[0])


def start(cfg: DictConfig, directory: Path) -> None:
    """What every run begins with: its ranks, its directory, its resolved config, its seed."""
    # Ranks come first: only rank 0 writes the directory.
    if "trainer" in cfg:
        distributed.launch_ranks(plain(cfg.trainer))
    if distributed.rank():
        logging.getLogger().setLevel(logging.WARNING)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        run_directory.write_settings(directory, cfg)
    # Before anything runs on a GPU, since cuBLAS reads its workspace setting once.
    use_deterministic(bool(cfg.get("deterministic")))
    pl.seed_everything(cfg.get("seed", 0), verbose=False)
    # no summary at the end; where the run is, it says at the start
    os.environ.setdefault("WANDB_QUIET", "true")
    disable_progress_bar()
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for beside_the_point in NOISE:
        warnings.filterwarnings("ignore", message=beside_the_point)


def make_logger(cfg: DictConfig, directory: Path) -> Any:
    """The logger of a run, or False. W&B learns config, code and machine; the jobs of a sweep are
    one group there."""
    if not cfg.get("logger"):
        return False
    logger = build(cfg.logger, save_dir=directory)
    if isinstance(logger, Tracker):
        name, group = run_names(directory)
        job_type = cfg.stage.name if "stage" in cfg else "eval"
        facts = {**plain(cfg), **provenance(), "directory": str(directory.resolve())}
        logger.describe(facts, name=name, group=group, job_type=job_type)
    return logger
