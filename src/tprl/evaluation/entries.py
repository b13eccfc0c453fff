"""Which lines a table gets: trained pruners with their modes, arms of a study, and pruners by
name."""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from tprl.build import choices
from tprl.data.base import BaseDataset
from tprl.data.taking import taken
from tprl.data.values import name_list
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.results import FULL
from tprl.pruners.adaptive import Adaptive
from tprl.pruners.base import named_pruner
from tprl.pruners.core_focus import CORE, CoreFocus
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.pruners.tprl import TPRL

log = logging.getLogger(__name__)
# questions that tell whether a dataset has regions: some have them for a kind of question only
LOOKED_AT = 64
# modes of a trained pruner, and its state before PPO
ADAPTIVE, LFD, THRESHOLD, CORE_FOCUS = "adaptive", "lfd", "threshold", "core_focus"


def variants(name: str) -> frozenset[str]:
    """The entries that are the pruner of this name itself, and so no rivals of it."""
    return frozenset({name, *(f"{name}_{kind}" for kind in (ADAPTIVE, LFD, THRESHOLD, CORE_FOCUS))})


def trained_entries(run: Path, settings: Mapping[str, Any]) -> list[Entry]:
    """The pruner of a run, its other modes, its state after lfd, and the policies taught beside it
    (`baselines`)."""
    if not run.is_dir():
        raise UserError(
            f"run={run} does not exist: give the directory that src.train printed as `run:`."
        )
    ratios = tuple(settings["keep_ratios"])
    final = load_pruner(run)
    entries = with_modes(final.name, final, ratios, seed_of(final))
    # Policies of a study are taught beside the main one, each in a folder of its name.
    folders = {f"{final.name}_{LFD}": run / "lfd"} | {
        name: run / name for name in choices("policy")
    }
    for name, folder in folders.items():
        if folder.is_dir():
            pruner = load_pruner(folder)
            entries.append(Entry(name, pruner, ratios, seed_of(pruner)))
    return entries


def seed_of(pruner: LearnedPruner) -> int:
    """The training seed; weights that do not know theirs count as seed 0."""
    return int(pruner.trained_on.get("seed", 0))


def compared_entries(runs: Any, settings: Mapping[str, Any]) -> list[Entry]:
    """Arms of a study by name: one run, or several that differ in their training seed only.

    Raises:
        UserError: not a mapping of names to runs.
    """
    if not isinstance(runs, Mapping):
        raise UserError(
            f"runs={runs} names no arms: write runs={{name: <run>, other: [<run>, <run>]}}."
        )
    entries = []
    for name, spec in runs.items():
        if not spec:
            raise UserError(f"runs.{name}={spec} holds no run: write runs={{{name}: <run>}}.")
        for run in name_list(f"runs.{name}", spec):
            pruner = load_pruner(run)
            entries += with_modes(name, pruner, tuple(settings["keep_ratios"]), seed_of(pruner))
    return entries


def with_modes(
    name: str, pruner: LearnedPruner, ratios: tuple[float, ...], seed: int = 0
) -> list[Entry]:
    """A trained pruner with exact budgets, and its adaptive, threshold and core-and-focus modes,
    where it was calibrated or trained for them."""
    entries = [Entry(name, pruner, ratios, seed)]
    # Modes exist only where the run was calibrated for them.
    if pruner.serving.prices:
        adaptive = Adaptive(cast(TPRL, pruner))
        if within := _reached(adaptive, ratios):
            entries.append(Entry(f"{name}_{ADAPTIVE}", adaptive, within, seed))
    if pruner.serving.tau is not None:
        entries.append(Entry(f"{name}_{THRESHOLD}", pruner, (None,), seed))
    if CORE in pruner.trained_on:
        shared = CoreFocus(pruner, pruner, **pruner.trained_on[CORE])
        entries.append(Entry(f"{name}_{CORE_FOCUS}", shared, ratios, seed))
    return entries


def check_names(*groups: Sequence[Entry]) -> None:
    """Rows of one name and seed would be counted as one, and those of one name as training seeds of
    one arm. Each group comes from one option of the command line.

    Raises:
        UserError: a name and seed is there twice, or a name in two groups.
    """
    # A name may come back with another seed within a group, in another group never.
    seen = Counter((entry.name, entry.seed) for entry in chain.from_iterable(groups))
    for (name, seed), count in seen.items():
        if count > 1:
            raise UserError(
                f"{name} with seed {seed} occurs {count} times: name each pruner once, give each "
                "arm of runs its own name, and each run of an arm another training seed."
            )
    # Within an option names repeat for seeds; two options must not share one.
    names: Counter[str] = Counter()
    for group in groups:
        names.update({entry.name for entry in group})
    for name, count in names.items():
        if count > 1:
            raise UserError(
                f"{name} occurs {count} times: give the run "
                f"a name of its own, runs={{<name>: <run>}}."
            )


def named_entries(pruners: str | Sequence[str] | None, settings: Mapping[str, Any]) -> list[Entry]:
    """The reference row, and the pruners of conf/pruner by name: one name or a list."""
    entries = [Entry(FULL, named_pruner(FULL), (1.0,))]
    for name in name_list("pruners", pruners):
        if name != FULL:
            entries += seeded_entries(functools.partial(named_pruner, name), settings)
    return entries


def seeded_entries(make: Any, settings: Mapping[str, Any]) -> list[Entry]:
    """One entry, or one per seed for a pruner that draws."""
    first = make()
    ratios = tuple(settings["keep_ratios"])
    if first.name == FULL:
        return [Entry(FULL, first, (1.0,))]
    if isinstance(first, Adaptive):
        # with none left, its own sentence says what it can reach
        ratios = _reached(first, ratios) or ratios
    if first.seed is None:
        return [Entry(first.name, first, ratios)]
    return [Entry(first.name, make(seed=seed), ratios, seed) for seed in settings["seeds"]]


def check_regions(entries: Sequence[Entry], dataset: BaseDataset) -> None:
    """Refuse bounds that read the answer's region on questions that have none: they would be the
    order in which they fill up, under another name.

    Raises:
        UserError: there is one.
    """
    for entry in _blind(entries, dataset):
        raise UserError(
            f"pruner={entry.name} keeps the region that decides the "
            f"answer, and the questions of {dataset.name} have none: leave "
            "it out, or use a dataset with regions, e.g. dataset=scenes."
        )


def with_regions(entries: Sequence[Entry], dataset: BaseDataset) -> list[Entry]:
    """The entries that the questions of a dataset can serve; says which are left out."""
    blind = _blind(entries, dataset)
    if blind:
        names = ", ".join(dict.fromkeys(entry.name for entry in blind))
        log.warning(
            "%s left out of the table: the questions of %s have no regions", names, dataset.name
        )
    return [entry for entry in entries if entry not in blind]


def _blind(entries: Sequence[Entry], dataset: BaseDataset) -> list[Entry]:
    """Those of the entries that read regions, where none of the first questions has one."""
    # Images are opened only where some method reads regions.
    readers = [entry for entry in entries if "region" in entry.pruner.extras]
    first = taken(dataset, range(min(LOOKED_AT, len(dataset))))
    return [] if not readers or any(sample.region for sample in first) else readers


def _reached(adaptive: Adaptive, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Those of the mean keep ratios that the adaptive mode is calibrated for; says which are left
    out."""
    for ratio in ratios:
        if not adaptive.reaches(ratio):
            log.info(
                "%s is not calibrated for a mean keep ratio of %.3g: left out", adaptive.name, ratio
            )
    return tuple(ratio for ratio in ratios if adaptive.reaches(ratio))
