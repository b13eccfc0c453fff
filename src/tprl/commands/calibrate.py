"""`retention=0.98` in place of keep ratios: calibrating pruners for it, and what an evaluation says
of the promise."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.setup import asked_entries, model_and_data, one_process, plain
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.evaluation.calibrating import calibrate, check_labels
from tprl.evaluation.calibration import (
    Calibration,
    calibration_of,
    file_of,
    home_of,
)
from tprl.evaluation.evaluator import Entry, check_answers
from tprl.evaluation.results import BOUNDS, FULL, Row
from tprl.evaluation.retention import smallest
from tprl.pruners.folder import ASSETS
from tprl.runtime.progress import Progress

log = logging.getLogger(__name__)
EXAMPLES = (0.99, 0.98, 0.95)  # shares that a calibration is tried with when it is made


def calibrate_pruners(cfg: DictConfig, directory: Path) -> None:
    """Write the calibration of every pruner that is asked for, into `directory` and beside the
    weights of those that have some of their own.

    Raises:
        UserError: bad input, or several processes.
    """
    cfg = checked(cfg, "eval")
    settings = plain(cfg)
    check_logger(settings)
    one_process("calibrate")
    # Entries are made at the ratios of the calibration, not at those of an evaluation.
    how = settings["calibrate"]
    asked = {**settings, "keep_ratios": how["keep_ratios"]}
    cfg, entries, _ = asked_entries(cfg, asked)
    entries = [entry for entry in entries if entry.name != FULL]
    # All names are known now: the model, the slowest part, is loaded next.
    lvlm, dataset = model_and_data(cfg, directory, entries, how["split"])
    # What cannot be scored is refused before the first answer.
    check_labels(dataset, how["labels"])
    if how["labels"]:
        check_answers(lvlm, dataset, how["limit"])
    # A single pass over the questions serves all pruners, which share encodings and full answers.
    pruners = [entry.pruner for entry in entries]
    options = {name: how[name] for name in ("keep_ratios", "limit", "labels", "split")}
    with Progress("calibrate") as tick:
        calibrations = calibrate(
            lvlm, dataset, pruners, batch_size=settings["batch_size"], tick=tick, **options
        )
    for entry, calibration in zip(entries, calibrations, strict=True):
        _keep(entry, calibration, directory)


def _keep(entry: Entry, calibration: Calibration, directory: Path) -> None:
    """Write a calibration, and say what it can promise."""
    # The run keeps a copy; the pruner's own folder is where serving looks.
    places = [directory / entry.pruner.name]
    home = home_of(entry.pruner)
    if home is not None and not _is_of_others(home):
        places.append(home)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        calibration.save(place / file_of(entry.pruner))
    print(f"{entry.name}: {places[-1] / file_of(entry.pruner)}")
    # Examples tell at once whether the questions suffice, before an evaluation relies on them.
    trials, kept = calibration.trials
    for retention in EXAMPLES:
        try:
            setting = smallest(trials, retention, 0.9).setting
        except UserError as error:
            print(f"  {error}")
        else:
            share = 1.0 if setting is None else kept[setting]
            print(f"  retention={retention:g} confidence=0.9: {100 * share:.3g} % of the tokens")


def _is_of_others(folder: Path) -> bool:
    """Whether a folder came with TPRL or from the hub: nothing is written there."""
    return ASSETS in folder.parents or "snapshots" in folder.parts


def read_calibrations(
    entries: Sequence[Entry], settings: Mapping[str, Any]
) -> dict[int, Calibration]:
    """The calibrations of those entries that are to keep the promise, by their number; all but
    bounds.

    Raises:
        UserError: one has none.
    """
    # Read before the model is loaded, so a missing calibration is refused at once.
    competing = {number: entry for number, entry in enumerate(entries) if entry.name not in BOUNDS}
    calibrations = {}
    for number, entry in competing.items():
        calibrations[number] = calibration_of(entry.pruner, settings["calibration"])
    return calibrations


def promised(
    entries: Sequence[Entry],
    calibrations: Mapping[int, Calibration],
    lvlm: Any,
    dataset: BaseDataset,
    settings: Mapping[str, Any],
) -> list[Entry]:
    """The entries, each at the one setting that keeps the promise; says which it is.

    Raises:
        UserError: a calibration of another model, dataset or state of a pruner, or one with too few
            questions.
    """
    retention, confidence = settings["retention"], settings["confidence"]
    chosen = []
    for number, entry in enumerate(entries):
        # Bounds have no calibration and stay as they are.
        calibration = calibrations.get(number)
        if calibration is None:
            chosen.append(entry)
            continue
        # Checked with the loaded model: its weights are part of what the promise holds for.
        calibration.check(lvlm.identified, entry.pruner, dataset.name)
        served = calibration.serve(entry.pruner, retention, confidence)
        log.info("%s: keeps %.3g of the tokens", entry.name, served.kept)
        chosen.append(Entry(entry.name, served.pruner, (served.keep_ratio,), entry.seed))
    return chosen


def say_promise(rows: Sequence[Row], settings: Mapping[str, Any], questions: int) -> None:
    """Print what was promised of each pruner, and what was found."""
    # The promise is about the expected ratio; the printed ratio is that of this sample.
    means = [row for row in rows if row.metric == "accuracy"]
    full = next(row for row in means if row.pruner == FULL)
    for row in means:
        if row.pruner not in BOUNDS and full.value:
            tokens = f"{row.kept_tokens:.1f} of {full.kept_tokens:.0f} tokens"
            print(
                f"{row.pruner}: at least {settings['retention']:g} promised with confidence "
                f"{settings['confidence']:g}, {row.value / full.value:.4f} found on {questions} "
                f"questions with {tokens}"
            )
