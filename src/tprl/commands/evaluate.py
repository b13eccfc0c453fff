"""From a composed config to a finished evaluation."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

import tprl
from tprl.build import conf_dir
from tprl.commands.bench import bench
from tprl.commands.calibrate import (
    calibrate_pruners,
    promised,
    read_calibrations,
    say_promise,
)
from tprl.commands.entry import command_line
from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.setup import asked_entries, make_dataset, make_logger, make_lvlm, plain, start
from tprl.commands.shell import command
from tprl.commands.threads import use_threads
from tprl.commands.turns import evaluate_turns_of
from tprl.data.base import BaseDataset
from tprl.data.values import name_list
from tprl.errors import UserError
from tprl.evaluation import analysis
from tprl.evaluation.compare import compare_runs, write_comparison
from tprl.evaluation.entries import (
    check_regions,
    variants,
    with_regions,
)
from tprl.evaluation.evaluator import (
    Answered,
    Entry,
    about,
    check_answers,
    check_cost,
    check_entries,
    summarize,
)
from tprl.evaluation.evaluator import evaluate as answer_all
from tprl.evaluation.official import Published
from tprl.evaluation.pictures import looked_at
from tprl.evaluation.results import (
    BOUNDS,
    Row,
    SampleRow,
    mean_accuracy,
    print_table,
    write_samples,
)
from tprl.evaluation.scores import score_table, write_scores
from tprl.evaluation.sweep import Sweep
from tprl.evaluation.tracked import log_results
from tprl.lvlm.base import BaseLVLM
from tprl.report import study, sweep
from tprl.report.evaluation import write_report
from tprl.report.sweep import Origin
from tprl.runtime import distributed, run_directory
from tprl.runtime.curves import read_curves
from tprl.runtime.files import write_sealed
from tprl.runtime.progress import Progress
from tprl.runtime.provenance import origin
from tprl.runtime.run_directory import ANSWERS
from tprl.runtime.store import Record
from tprl.scoring.identity import of_dataset, of_lvlm, of_pruner
from tprl.scoring.scorer import Scorer
from tprl.types import Pruner

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """What one table is made of."""

    lvlm: BaseLVLM
    dataset: BaseDataset
    entries: Sequence[Entry]
    settings: Mapping[str, Any]  # the block of the config that says what to evaluate, and how
    cfg: DictConfig
    directory: Path


class Evaluated(NamedTuple):
    """What an evaluation found."""

    rows: list[Row]  # of `results.csv`
    questions: int  # that were answered: damaged ones are none of them


def evaluate(cfg: DictConfig, directory: Path) -> float | None:
    """Evaluate a run (`run=<directory>`), a sweep, or named pruners (`pruner=<name>`,
    `pruners=[...]`), into `directory`.

    Returns:
        The mean accuracy of the first of them over the keep ratios, for sweepers; other modes
        return nothing.

    Raises:
        UserError: bad input.
    """
    cfg = checked(cfg, "eval")
    settings = plain(cfg)
    check_logger(settings)
    # Modes with a command of their own branch off before entries are made.
    if cfg.mode == "calibrate":
        return calibrate_pruners(cfg, directory)
    if cfg.mode == "turns":
        return evaluate_turns_of(cfg, directory)
    if cfg.mode != "accuracy":  # src.bench has a command line of its own for these
        return bench(cfg, directory)
    if cfg.compare:
        return _compare(settings["compare"], cfg, directory)
    if cfg.study:
        start(cfg, directory)
        study.recompute(Path(cfg.study), directory)
        return None
    # Names, pruners and calibrations come first: a mistyped path must not cost a model load.
    cfg, entries, swept = asked_entries(cfg, settings)
    promise = cfg.retention is not None
    calibrations = read_calibrations(entries, settings) if promise else {}
    start(cfg, directory)
    lvlm = make_lvlm(cfg.model)
    use_threads(cfg, directory, lvlm)
    # Everything that could be refused is refused before the first answer.
    check_cost(lvlm)
    check_entries(entries, lvlm)
    logger = make_logger(cfg, directory)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    check_regions(entries, dataset)
    if promise:
        entries = promised(entries, calibrations, lvlm, dataset, settings)
    # The report of a run shows how it was trained; named pruners have no curves.
    curves = read_curves(Path(cfg.run)) if cfg.run else {}
    table = Evaluation(lvlm, dataset, entries, settings, cfg, directory)
    rows, questions = evaluate_entries(table, logger, curves, swept)
    # Only rank 0 speaks: rows are the same on all ranks.
    if promise and not distributed.rank():
        say_promise(rows, settings, questions)
    return mean_accuracy(rows, main_entry(entries).name)


def main_entry(entries: Sequence[Entry]) -> Entry:
    """The one that a report is about: the first that competes."""
    return next((entry for entry in entries if entry.name not in BOUNDS), entries[0])


def _headline_metric(dataset: BaseDataset) -> str:
    """The number that tables show."""
    return f"{dataset.name}/{dataset.headline}" if isinstance(dataset, Published) else "accuracy"


def open_datasets(
    names: Sequence[str], lvlm: BaseLVLM, limit: int | None
) -> dict[str, tuple[DictConfig, BaseDataset]]:
    """Test splits of datasets by name with their configs, opened before a training that ends with
    them.

    Raises:
        UserError: one cannot be opened, or its answers cannot be scored.
    """
    opened = {}
    for name in names:
        # Opened now: a training of hours must not end at a missing dataset.
        config = OmegaConf.load(conf_dir() / "dataset" / f"{name}.yaml")
        assert isinstance(config, DictConfig)
        dataset = make_dataset(config, lvlm, "test")
        check_answers(lvlm, dataset, limit)
        opened[name] = (config, dataset)
    return opened


def evaluate_elsewhere(
    opened: Mapping[str, tuple[DictConfig, BaseDataset]], table: Evaluation
) -> None:
    """The same table on every further dataset, in a folder of its name inside the table's; curves
    belong to the run's own dataset."""
    for name, (config, dataset) in opened.items():
        folder = table.directory / name
        folder.mkdir(exist_ok=True)
        # A merge copies the config, whose dataset is then replaced as a whole.
        cfg = OmegaConf.merge(table.cfg)
        assert isinstance(cfg, DictConfig)
        OmegaConf.update(cfg, "dataset", config, merge=False)
        entries = with_regions(table.entries, dataset)
        evaluate_entries(
            table._replace(dataset=dataset, entries=entries, cfg=cfg, directory=folder), None
        )


def _compare(runs: Any, cfg: DictConfig, directory: Path) -> None:
    """Two evaluations against each other."""
    pair = name_list("compare", runs)
    if len(pair) != 2:
        raise UserError(
            f"compare={runs} is not two runs: write "
            "compare=[<run>,<run>] or compare=[<run>:<arm>,<run>:<arm>]."
        )
    compared = compare_runs(*pair)
    start(cfg, directory)
    write_comparison(compared, directory)


def evaluate_entries(
    table: Evaluation,
    logger: Any,
    curves: Mapping[str, list[tuple[float, float]]] | None = None,
    swept: Sweep | None = None,
) -> Evaluated:
    """Answer everything, then (on rank 0) table, files and report, and those of a sweep."""
    lvlm, dataset, entries, settings, _, directory = table
    check_answers(lvlm, dataset, settings["limit"])
    scorer = Scorer(lvlm, dataset, frozenset({"score"}))
    answered = _answers(table, scorer)
    rows = summarize(answered, lvlm.name, dataset)
    measured = about(dataset, answered)
    evaluated = Evaluated(rows, measured["questions"])
    # Answers are gathered, so every rank has all rows; files are written by rank 0.
    if distributed.rank():
        return evaluated
    write_sealed(directory / "evaluation.json", json.dumps(measured, indent=1) + "\n")
    log_results(logger, rows)
    # Raw answers are written before anything is derived from them.
    main = main_entry(entries)
    sample_rows = [item.row for item in answered]
    write_samples(directory / "samples.jsonl", sample_rows)
    write_scores(directory / study.SCORES, score_table(answered, rows, main.name))
    numbers = study.write_numbers(directory, rows, sample_rows, main.name)
    _show(table, scorer, rows, sample_rows, numbers, measured, curves, swept)
    return evaluated


def _answers(table: Evaluation, scorer: Scorer) -> list[Answered]:
    """Of every pruner to every question; those that a killed evaluation has kept are not asked
    again."""
    _, dataset, entries, settings, _, _ = table
    record = _record(table)
    known = {item["row"]["uid"] for batch in record.known.values() for item in batch}
    with Progress("evaluate", before=len(known) // distributed.count()) as tick:
        return answer_all(
            scorer, dataset, entries, settings["batch_size"], settings["limit"], tick, record
        )


def _show(
    table: Evaluation,
    scorer: Scorer,
    rows: list[Row],
    sample_rows: list[SampleRow],
    numbers: study.Numbers,
    measured: dict[str, Any],
    curves: Mapping[str, list[tuple[float, float]]] | None,
    swept: Sweep | None,
) -> None:
    """What people look at: the report with its pictures, and the table on the terminal."""
    lvlm, dataset, entries, settings, cfg, directory = table
    main = main_entry(entries)
    # Pictures are made at the smallest ratio, where pruners differ most; 1/9 is for pruners without
    # a ratio.
    ratio = min((r for r in main.keep_ratios if r is not None), default=1 / 9)
    pruners = _pictured(entries, main, ratio, sample_rows)
    guided, pictures = looked_at(scorer, dataset, main, pruners, ratio, settings)
    # Origin and commands let a reader repeat the page.
    facts = {"model": lvlm.name, **measured, "split": cfg.get("split", "test"), **origin()}
    source = Origin(facts, _commands(cfg), OmegaConf.to_yaml(cfg, resolve=True))
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
        facts=source.facts,
        commands=source.commands,
        config_yaml=source.config_yaml,
        protocol=measured.get("protocol", ""),
    )
    print_table(numbers.rows, metric=metric)
    analysis.say(measured, numbers.differences, guided)
    if swept is None:
        print(sentence)
    print(f"report: {directory / 'report.html'}")
    if swept is not None:
        sweep.report_sweep(swept, rows, directory, metric, source)


def _record(table: Evaluation) -> Record:
    """Where an evaluation keeps its answers until it is finished; named after all that they depend
    on, so that one that was killed goes on only if nothing has changed."""
    config = plain(table.cfg)
    about = {
        "version": tprl.__version__,
        "lvlm": of_lvlm(table.lvlm, config.get("model", {})),
        "data": of_dataset(table.dataset, config.get("dataset", {}), config.get("split", "test")),
        "entries": [
            [e.name, e.seed, e.keep_ratios, of_pruner(e.pruner, _constants(e.pruner))]
            for e in table.entries
        ],
        "batches": [table.settings["batch_size"], table.settings["limit"], distributed.count()],
    }
    # Any change in the digest starts a new record, so old answers never mix with new ones.
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Record(table.directory / ANSWERS.replace("*", digest))


def _constants(pruner: Any) -> dict[str, str]:
    """The plain values that a pruner was made with."""
    return {
        name: repr(value)
        for name, value in vars(pruner).items()
        if isinstance(value, str | float | int | tuple)
    }


def _pictured(
    entries: Sequence[Entry], main: Entry, ratio: float, rows: Sequence[SampleRow]
) -> dict[str, Pruner]:
    """The main pruner and two baselines for the gallery; layer pruners have no map to show."""
    # Only pruners with answers at this ratio, so that panels can be compared.
    ran = {(row.pruner, row.keep_ratio, row.seed) for row in rows}
    excluded = {*BOUNDS, *variants(main.name)}
    others = [e for e in entries if (e.name, ratio, e.seed) in ran and e.name not in excluded]
    # one seed of each
    others = list({e.name: e for e in others[::-1] if isinstance(e.pruner, Pruner)}.values())[::-1]
    others.sort(key=lambda e: e.name not in ("divprune", "random"))  # where they are there
    return {e.name: e.pruner for e in (main, *others[:2]) if isinstance(e.pruner, Pruner)}


def _commands(cfg: DictConfig) -> list[str]:
    """What to type for these numbers: how the evaluated run was trained, if it is known, and this
    command."""
    record = Path(cfg.run) / "done.json" if cfg.get("run") else None
    trained = []
    if record is not None and record.is_file():
        # Quoted from the record of the finished run; before done.json exists, training goes on.
        trained.append(
            command("train", *(run_directory.settings_of(record.parent, run_directory.DONE) or ()))
        )
    return [text for text in (*trained, command_line()) if text]
