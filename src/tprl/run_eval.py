"""From a composed config to a finished evaluation; with `run.py` the only code that sees a DictConfig."""

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from tprl.budget import check_keep_ratio
from tprl.build import build, load_component
from tprl.data.benchmark import take
from tprl.entry import chosen
from tprl.errors import UserError
from tprl.evaluation import analysis, selectors
from tprl.evaluation.compare import compare, report
from tprl.evaluation.entries import check_names, compared_entries, named_entries, seeded_entries, trained_entries
from tprl.evaluation.evaluator import Entry, about, check_answers, check_cost, summarise
from tprl.evaluation.evaluator import evaluate as answer_all
from tprl.evaluation.official import Published
from tprl.evaluation.parity import parity, table, varied
from tprl.evaluation.report import write_report
from tprl.evaluation.results import BOUNDS, Row, print_table, write_results, write_samples
from tprl.evaluation.spread import spreads
from tprl.evaluation.sweep import read_sweep
from tprl.evaluation.sweep_report import report_sweep
from tprl.lvlm.frozen import FrozenLVLM
from tprl.progress import Progress
from tprl.pruners.learned import LearnedPruner
from tprl.scoring import Scorer
from tprl.tracking import log_results
from tprl.types import LVLM, Dataset, Pruner

log = logging.getLogger(__name__)
NOISE = (  # Lightning's, about itself or about a choice that was meant
    r".*isinstance\(treespec, LeafSpec\)",
    r"Your `IterableDataset` has `__len__` defined",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def evaluate(cfg: DictConfig, directory: Path) -> Path:
    """Evaluate a run (`run=<directory>`), a sweep, or named pruners (`pruner=<name>`, `pruners=[...]`), and return
    `directory`.

    Raises:
        UserError: bad input.
    """
    settings = plain(cfg)
    for ratio in cfg.keep_ratios:
        check_keep_ratio(ratio)
    if cfg.mode not in ("accuracy", "parity", "selectors"):
        raise UserError(f"mode={cfg.mode} is unknown: use accuracy, parity or selectors.")
    if cfg.mode != "accuracy":
        return (_parity if cfg.mode == "parity" else _selectors)(cfg, directory)
    if cfg.compare:
        return _compare(settings["compare"], cfg, directory)
    entries: list[Entry] = []
    if cfg.run:
        cfg = _with_run_config(cfg, Path(cfg.run))
        entries += trained_entries(Path(cfg.run), settings)
    swept = None
    if cfg.sweep:
        same = [group for group in ("model", "dataset") if not chosen(group)]
        swept = read_sweep(Path(cfg.sweep), settings["keep_ratios"], same)
        cfg = _with_run_config(cfg, swept.config.parent)
        entries += swept.entries
    entries += compared_entries(settings["runs"] or {}, settings)
    if cfg.get("pruner") is not None:
        entries += seeded_entries(lambda **live: build(cfg.pruner, **live), settings)
    entries += named_entries(settings["pruners"], settings)
    check_names(entries)
    if len(entries) == 1 and not cfg.get("pruner"):
        raise UserError(
            "nothing to evaluate: give run=<directory of a training run>, sweep, runs, pruner=<name> or pruners."
        )
    start(cfg, directory)
    lvlm = build(cfg.model)
    check_cost(lvlm)
    logger = make_logger(cfg, directory)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    rows = evaluate_entries(lvlm, dataset, entries, settings, cfg, directory, logger)
    if swept is not None:
        report_sweep(swept, rows, directory, _headline_metric(dataset))
    return directory


def _headline_metric(dataset: Dataset) -> str:
    """The number that tables show."""
    return f"{dataset.name}/{dataset.headline}" if isinstance(dataset, Published) else "accuracy"


def _parity(cfg: DictConfig, directory: Path) -> Path:
    """Compare the model, or small random builds of `models`, with its stock class; prints and writes a table."""
    start(cfg, directory)
    lvlms = [load_component("model", name, pretrained=None, dtype="float32") for name in cfg.models or []]
    found = {}
    for lvlm in lvlms or [build(cfg.model)]:
        questions = make_dataset(cfg.dataset, lvlm, cfg.split)
        samples = varied(take(questions, range(min(cfg.limit or 6, len(questions)))))
        if not isinstance(lvlm, FrozenLVLM):
            raise UserError(f"model={lvlm.name} has no stock class to compare with.")
        found[lvlm.name] = parity(lvlm, samples)
        log.info("%s: %s", lvlm.name, found[lvlm.name])
    (directory / "parity.md").write_text(table(found) + "\n")
    print(table(found))
    return directory


def _selectors(cfg: DictConfig, directory: Path) -> Path:
    """The table of docs/baselines.md."""
    start(cfg, directory)
    text = selectors.table(selectors.measure())
    (directory / "selectors.md").write_text(text + "\n")
    print(text)
    return directory


def make_dataset(config: DictConfig, lvlm: LVLM, split: str) -> Dataset:
    """A split of the questions, which reads boxes as this LVLM writes them."""
    made = build(config, split=split)
    if hasattr(made, "reads_boxes_as"):
        made.reads_boxes_as(lvlm)
    return made


def _compare(runs: Any, cfg: DictConfig, directory: Path) -> Path:
    """Two evaluations against each other."""
    if not isinstance(runs, list) or len(runs) != 2:
        raise UserError(
            f"compare={runs} is not two runs: write compare=[<run>,<run>] or compare=[<run>:<arm>,<run>:<arm>]."
        )
    found = compare(*map(str, runs))
    start(cfg, directory)
    report(found, directory)
    return directory


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


def evaluate_entries(
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
    check_answers(lvlm, dataset)
    scorer = Scorer(lvlm, dataset, frozenset({"score"}))
    with Progress("evaluate") as tick:
        answered = answer_all(scorer, dataset, entries, settings["batch_size"], settings["limit"], tick)
    rows = summarise(answered, lvlm.name, dataset)
    write_results(directory / "results.csv", rows)
    measured = about(dataset, answered)
    (directory / "evaluation.json").write_text(json.dumps(measured, indent=1) + "\n")
    log_results(logger, rows)
    main = next((entry for entry in entries if entry.name not in BOUNDS), entries[0])
    sample_rows = [one.row for one in answered]
    write_samples(directory / "samples.jsonl", sample_rows)
    differences = analysis.paired(sample_rows, main.name)
    all_differences = differences + analysis.paired(sample_rows, f"{main.name}_adaptive")
    (directory / "paired.json").write_text(json.dumps([vars(d) for d in all_differences], indent=1) + "\n")
    ratio = min((r for r in main.keep_ratios if r is not None), default=1 / 9)
    shown = [main, *(e for e in entries if e.name in ("divprune", "random") and e.seed == 0 and e is not main)][:3]
    pruners = {e.name: e.pruner for e in shown if isinstance(e.pruner, Pruner)}  # layer pruners have no map to show
    guided = None
    if isinstance(main.pruner, LearnedPruner):
        guided = analysis.guided(scorer, dataset, main.pruner, ratio, settings["limit"])
    found_spreads = spreads(sample_rows)
    (directory / "spreads.json").write_text(json.dumps([vars(s) for s in found_spreads], indent=1) + "\n")
    sentence = analysis.headline(answered, differences, main.name)
    write_report(
        directory / "report.html",
        title=f"{main.name} on {dataset.name} with {lvlm.name}",
        headline=sentence,
        rows=rows,
        paired=all_differences,
        gallery=analysis.gallery(scorer, dataset, pruners, ratio, settings["batch_size"]) if pruners else [],
        guided=guided,
        spreads=found_spreads,
        learning_curves=curves,
        commands=[f"python -m src.eval run={directory}"],
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
        protocol=measured.get("protocol", ""),
    )
    print_table(rows, metric=_headline_metric(dataset))
    for name, value in measured.items():
        print(f"{name}: {value}")
    if differences:
        print("differences of the mean score over questions:")
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


def start(cfg: DictConfig, directory: Path) -> None:
    """What every run begins with: its directory, its resolved config, its seed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    pl.seed_everything(cfg.get("seed", 0), verbose=False)
    os.environ.setdefault("WANDB_QUIET", "true")  # no summary at the end; where the run is, it says at the start
    disable_progress_bar()
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for beside_the_point in NOISE:
        warnings.filterwarnings("ignore", message=beside_the_point)


def make_logger(cfg: DictConfig, directory: Path) -> Any:
    """The tracker of a run, or False."""
    return build(cfg.logger, save_dir=directory) if cfg.get("logger") else False


def plain(config: Any) -> dict[str, Any]:
    """A config node as containers of plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
