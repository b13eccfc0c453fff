"""From a composed config to a finished evaluation."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

import tprl
from tprl.bench import selectors
from tprl.bench.latency import Setting, measure, untrained
from tprl.bench.parity import parity, table, varied
from tprl.build import build, load_component
from tprl.commands.entry import chosen, command_line, run_names
from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.shell import command
from tprl.commands.threads import use_threads
from tprl.data.benchmark import nothing_left, take
from tprl.data.values import name_list
from tprl.errors import UserError
from tprl.evaluation import analysis
from tprl.evaluation.compare import compare_runs, write_comparison
from tprl.evaluation.entries import (
    check_names,
    compared_entries,
    named_entries,
    seeded_entries,
    trained_entries,
    variants,
)
from tprl.evaluation.evaluator import Entry, about, check_answers, check_cost, check_entries, summarise
from tprl.evaluation.evaluator import evaluate as answer_all
from tprl.evaluation.official import Published
from tprl.evaluation.pictures import looked_at
from tprl.evaluation.results import BOUNDS, Row, SampleRow, mean_accuracy, print_table, write_samples
from tprl.evaluation.scores import score_table, write_scores
from tprl.evaluation.sweep import Sweep, read_sweep
from tprl.evaluation.tracked import log_results
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import LearnedPruner
from tprl.report import latency, study, sweep
from tprl.report.evaluation import write_report
from tprl.report.sweep import Origin
from tprl.runtime import distributed, run_directory
from tprl.runtime.curves import read_curves
from tprl.runtime.files import write_atomically, write_sealed
from tprl.runtime.progress import Progress
from tprl.runtime.provenance import origin, provenance
from tprl.runtime.run_directory import ANSWERS
from tprl.runtime.store import Record
from tprl.runtime.tracking import Tracker
from tprl.scoring.identity import of_dataset, of_lvlm, of_pruner
from tprl.scoring.lengths import fit_length
from tprl.scoring.scorer import Scorer
from tprl.types import LVLM, Dataset, Pruner

log = logging.getLogger(__name__)
NOISE = (  # Lightning's, about itself or about a choice that was meant
    r".*isinstance\(treespec, LeafSpec\)",
    r"Your `IterableDataset` has `__len__` defined",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def evaluate(cfg: DictConfig, directory: Path) -> float | None:
    """Evaluate a run (`run=<directory>`), a sweep, or named pruners (`pruner=<name>`, `pruners=[...]`), into
    `directory`.

    Returns:
        The mean accuracy of the first of them over the keep ratios, for sweepers; other modes return nothing.

    Raises:
        UserError: bad input.
    """
    cfg = checked(cfg, "eval")
    settings = plain(cfg)
    check_logger(settings)
    others = {"parity": _parity, "selectors": _selectors, "latency": _latency}
    if cfg.mode != "accuracy":
        return others[cfg.mode](cfg, directory)
    if cfg.compare:
        return _compare(settings["compare"], cfg, directory)
    if cfg.study:
        start(cfg, directory)
        study.recompute(Path(cfg.study), directory)
        return None
    cfg, entries, swept = _entries(cfg, settings)
    start(cfg, directory)
    lvlm = build(cfg.model)
    use_threads(cfg, directory, lvlm)
    check_cost(lvlm)
    check_entries(entries, lvlm)
    logger = make_logger(cfg, directory)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    curves = read_curves(Path(cfg.run)) if cfg.run else {}
    rows = evaluate_entries(lvlm, dataset, entries, settings, cfg, directory, logger, curves, swept)
    return mean_accuracy(rows, main_entry(entries).name)


def _entries(cfg: DictConfig, settings: Mapping[str, Any]) -> tuple[DictConfig, list[Entry], Sweep | None]:
    """What `run`, `sweep`, `runs`, `pruner` and `pruners` ask for, and the config with the run's model and dataset."""
    groups: list[list[Entry]] = []
    if cfg.run:
        cfg = with_run_config(cfg, Path(cfg.run))
        groups.append(trained_entries(Path(cfg.run), settings))
    swept = None
    if cfg.sweep:
        same = [group for group in ("model", "dataset") if not chosen(group)]
        swept = read_sweep(Path(cfg.sweep), settings["keep_ratios"], same)
        cfg = with_run_config(cfg, swept.config.parent)
        groups.append(list(swept.entries))
    groups.append(compared_entries(settings["runs"] or {}, settings))
    if cfg.get("pruner") is not None:
        groups.append(seeded_entries(lambda **live: build(cfg.pruner, **live), settings))
    groups.append(named_entries(settings["pruners"], settings))
    check_names(*groups)
    entries = [entry for group in groups for entry in group]
    if len(entries) == 1 and not cfg.get("pruner"):
        raise UserError(
            "nothing to evaluate: give run=<directory of a training run>, sweep, runs, pruner=<name> or pruners."
        )
    return cfg, entries, swept


def _latency(cfg: DictConfig, directory: Path) -> None:
    """Milliseconds of every pruner, stage by stage, against what its FLOPs predict."""
    if distributed.count() > 1:
        raise UserError(
            f"mode=latency times one process, and {distributed.count()} were started: without torchrun or srun."
        )
    settings = plain(cfg)
    setting = Setting(**settings["latency"])
    cfg, entries, _ = _entries(cfg, settings)
    start(cfg, directory)
    lvlm = build(cfg.model)
    use_threads(cfg, directory, lvlm)
    if not isinstance(lvlm, FrozenLVLM):
        raise UserError(f"model={lvlm.name} has no vision tower and language model to time: use model=tiny_llava.")
    if cfg.model.get("pretrained", "") is None:  # sizes are timed, not weights
        entries = [
            replace(one, pruner=untrained(one.pruner, lvlm.width)) if isinstance(one.pruner, LearnedPruner) else one
            for one in entries
        ]
    check_entries(entries, lvlm)
    with Progress("latency") as tick:
        found = measure(lvlm, entries, setting, tick=tick)
    latency.write_latency(found, lvlm, setting, directory)


def main_entry(entries: Sequence[Entry]) -> Entry:
    """The one that a report is about: the first that competes."""
    return next((entry for entry in entries if entry.name not in BOUNDS), entries[0])


def _headline_metric(dataset: Dataset) -> str:
    """The number that tables show."""
    return f"{dataset.name}/{dataset.headline}" if isinstance(dataset, Published) else "accuracy"


def _parity(cfg: DictConfig, directory: Path) -> None:
    """Compare the model, or small random builds of `models`, with its stock class; prints and writes a table."""
    start(cfg, directory)
    lvlms = [load_component("model", name, pretrained=None, dtype="float32") for name in cfg.models or []]
    found = {}
    lvlms = lvlms or [build(cfg.model)]
    use_threads(cfg, directory, lvlms[0])  # the others are as small
    for lvlm in lvlms:
        questions = make_dataset(cfg.dataset, lvlm, cfg.split)
        asked = range(min(cfg.limit or 6, len(questions)))
        samples = varied(take(questions, asked))
        if not samples:
            raise nothing_left(questions, len(asked), "to compare")
        if not isinstance(lvlm, FrozenLVLM):
            raise UserError(f"model={lvlm.name} has no stock class to compare with.")
        found[lvlm.name] = parity(lvlm, samples)
        log.info("%s: %s", lvlm.name, found[lvlm.name])
    write_atomically(directory / "parity.md", table(found) + "\n")
    print(table(found))


def _selectors(cfg: DictConfig, directory: Path) -> None:
    """The table of docs/baselines.md."""
    start(cfg, directory)
    use_threads(cfg, directory)
    text = selectors.table(selectors.measure())
    write_atomically(directory / "selectors.md", text + "\n")
    print(text)


def make_dataset(config: DictConfig, lvlm: LVLM, split: str) -> Dataset:
    """A split of the questions, which reads boxes as this LVLM writes them, and counts what it cannot read; the LVLM
    writes answers as long as its questions usually need, unless its settings say otherwise."""
    made = build(config, split=split)
    if hasattr(made, "read_by"):
        made.read_by(lvlm)
    if hasattr(made, "reads_boxes_as"):
        made.reads_boxes_as(lvlm)
    fit_length(lvlm, made)
    return made


def _compare(runs: Any, cfg: DictConfig, directory: Path) -> None:
    """Two evaluations against each other."""
    pair = name_list("compare", runs)
    if len(pair) != 2:
        raise UserError(
            f"compare={runs} is not two runs: write compare=[<run>,<run>] or compare=[<run>:<arm>,<run>:<arm>]."
        )
    found = compare_runs(*pair)
    start(cfg, directory)
    write_comparison(found, directory)


def with_run_config(cfg: DictConfig, run: Path) -> DictConfig:
    """Model and dataset of the run, unless the command line names others."""
    path = run / "config.yaml"
    if not path.is_file():
        why = "does not exist" if not run.exists() else "holds no config.yaml"
        raise UserError(f"run={run} {why}: give the directory that src.train printed as `run:`.")
    run_directory.settings_of(
        run, run_directory.DONE
    )  # the report quotes it: damage is said now, not after the evaluation
    if chosen("model") and chosen("dataset"):
        return cfg
    before = run_directory.read_yaml(path, "copy it again, or give model=<name> and dataset=<name>")
    for group in ("model", "dataset"):
        if not chosen(group):
            OmegaConf.update(cfg, group, before[group], merge=False, force_add=True)
    return cfg


def evaluate_entries(
    lvlm: LVLM,
    dataset: Dataset,
    entries: Sequence[Entry],
    settings: Mapping[str, Any],
    cfg: DictConfig,
    directory: Path,
    logger: Any,
    curves: Mapping[str, list[tuple[float, float]]] | None = None,
    swept: Sweep | None = None,
) -> list[Row]:
    """Answer everything, then (on rank 0) table, files and report, and those of a sweep; returns the rows of
    `results.csv`."""
    check_answers(lvlm, dataset, settings["limit"])
    scorer = Scorer(lvlm, dataset, frozenset({"score"}))
    record = _record(lvlm, dataset, entries, settings, cfg, directory)
    before = len({one["row"]["uid"] for batch in record.known.values() for one in batch}) // distributed.count()
    with Progress("evaluate", before=before) as tick:
        answered = answer_all(scorer, dataset, entries, settings["batch_size"], settings["limit"], tick, record)
    rows = summarise(answered, lvlm.name, dataset)
    measured = about(dataset, answered)
    if distributed.rank():
        return rows
    write_sealed(directory / "evaluation.json", json.dumps(measured, indent=1) + "\n")
    log_results(logger, rows)
    main = main_entry(entries)
    sample_rows = [one.row for one in answered]
    write_samples(directory / "samples.jsonl", sample_rows)
    write_scores(directory / study.SCORES, score_table(answered, rows, main.name))
    numbers = study.write_numbers(directory, rows, sample_rows, main.name)
    ratio = min((r for r in main.keep_ratios if r is not None), default=1 / 9)
    pruners = _pictured(entries, main, ratio, sample_rows)
    guided, pictures = looked_at(scorer, dataset, main, pruners, ratio, settings)
    facts = {"model": lvlm.name, **measured, "split": cfg.get("split", "test"), **origin()}
    made = Origin(facts, _commands(cfg), OmegaConf.to_yaml(cfg, resolve=True))
    metric = _headline_metric(dataset)
    title = sweep.title(swept, rows) if swept else f"{main.name} on {dataset.name} with {lvlm.name}"
    sentence = analysis.evaluation_headline(rows, numbers.differences, main.name)
    write_report(
        directory / "report.html",
        title=title,
        headline=sweep.finding(swept, rows, metric) if swept else sentence,
        rows=numbers.rows,
        paired=numbers.all_differences,
        gallery=pictures,
        guided=guided,
        spreads=numbers.token_spreads,
        learning_curves=curves,
        facts=made.facts,
        commands=made.commands,
        config_yaml=made.config_yaml,
        protocol=measured.get("protocol", ""),
    )
    print_table(numbers.rows, metric=metric)
    analysis.say(measured, numbers.differences, guided)
    if swept is None:
        print(sentence)
    print(f"report: {directory / 'report.html'}")
    if swept is not None:
        sweep.report_sweep(swept, rows, directory, metric, made)
    return rows


def _record(
    lvlm: LVLM,
    dataset: Dataset,
    entries: Sequence[Entry],
    settings: Mapping[str, Any],
    cfg: DictConfig,
    directory: Path,
) -> Record:
    """Where an evaluation keeps its answers until it is finished; named after all that they depend on, so that one that
    was killed goes on only if nothing has changed."""
    config = plain(cfg)
    about = {
        "version": tprl.__version__,
        "lvlm": of_lvlm(lvlm, config.get("model", {})),
        "data": of_dataset(dataset, config.get("dataset", {}), config.get("split", "test")),
        "entries": [[e.name, e.seed, e.keep_ratios, of_pruner(e.pruner, _told(e.pruner))] for e in entries],
        "batches": [settings["batch_size"], settings["limit"], distributed.count()],
    }
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Record(directory / ANSWERS.replace("*", digest))


def _told(pruner: Any) -> dict[str, str]:
    """The plain values that a pruner was made with."""
    return {name: repr(value) for name, value in vars(pruner).items() if isinstance(value, str | float | int | tuple)}


def _pictured(entries: Sequence[Entry], main: Entry, ratio: float, rows: Sequence[SampleRow]) -> dict[str, Pruner]:
    """The main pruner and two baselines for the gallery; layer pruners have no map to show."""
    ran = {(row.pruner, row.keep_ratio, row.seed) for row in rows}
    own = {*BOUNDS, *variants(main.name)}
    others = [e for e in entries if (e.name, ratio, e.seed) in ran and e.name not in own]
    others = list({e.name: e for e in others[::-1] if isinstance(e.pruner, Pruner)}.values())[::-1]  # one seed of each
    others.sort(key=lambda e: e.name not in ("divprune", "random"))  # where they are there
    return {e.name: e.pruner for e in (main, *others[:2]) if isinstance(e.pruner, Pruner)}


def _commands(cfg: DictConfig) -> list[str]:
    """What to type for these numbers: how the evaluated run was trained, if it is known, and this command."""
    record = Path(cfg.run) / "done.json" if cfg.get("run") else None
    trained = []
    if record is not None and record.is_file():
        trained.append(command("train", *(run_directory.settings_of(record.parent, run_directory.DONE) or ())))
    return [text for text in (*trained, command_line()) if text]


def start(cfg: DictConfig, directory: Path) -> None:
    """What every run begins with: its ranks, its directory, its resolved config, its seed."""
    if "trainer" in cfg:
        distributed.launch(plain(cfg.trainer))
    if distributed.rank():
        logging.getLogger().setLevel(logging.WARNING)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        run_directory.write_settings(directory, cfg)
    pl.seed_everything(cfg.get("seed", 0), verbose=False)
    os.environ.setdefault("WANDB_QUIET", "true")  # no summary at the end; where the run is, it says at the start
    disable_progress_bar()
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for beside_the_point in NOISE:
        warnings.filterwarnings("ignore", message=beside_the_point)


def make_logger(cfg: DictConfig, directory: Path) -> Any:
    """The logger of a run, or False. W&B learns config, code and machine; the jobs of a sweep are one group there."""
    if not cfg.get("logger"):
        return False
    logger = build(cfg.logger, save_dir=directory)
    if isinstance(logger, Tracker):
        name, group = run_names(directory)
        job_type = cfg.stage.name if "stage" in cfg else "eval"
        facts = {**plain(cfg), **provenance(), "directory": str(directory.resolve())}
        logger.describe(facts, name=name, group=group, job_type=job_type)
    return logger


def plain(config: Any) -> dict[str, Any]:
    """A config node as containers of plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
