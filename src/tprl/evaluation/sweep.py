"""All runs of a sweep (`python -m src.train -m ...`): what was swept, what finished, and the
numbers over seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from tprl.data.values import several
from tprl.errors import UserError
from tprl.evaluation.entries import seed_of, with_modes
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.results import Row, ratio_label
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.runtime.quoting import in_short
from tprl.runtime.run_directory import read_yaml

SEED = "seed"


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its folder (None if it never started), its settings on the command line,
    and why it cannot be evaluated (empty if it can)."""

    folder: Path | None
    settings: Mapping[str, str]
    reason: str = ""


@dataclass(frozen=True)
class Arm:
    """Jobs that differ in their training seed only: `swept` is what this arm has of its own,
    `trained_at` the kept fractions that it was trained for."""

    name: str
    swept: Mapping[str, str]
    trained_at: tuple[float, ...]


@dataclass(frozen=True)
class Sweep:
    """What `read_sweep` found. `entries` are the lines of a table, `config` that of a job, which
    stands for all."""

    directory: Path
    keys: tuple[str, ...]  # of the settings that differ between jobs
    arms: tuple[Arm, ...]
    entries: tuple[Entry, ...]
    left_out: tuple[Job, ...]
    config: Path


@dataclass(frozen=True)
class Summary:
    """A metric of an arm (or another pruner of the same table) at one keep ratio, over `n` training
    seeds: mean, standard deviation (nan for one seed) and extremes. `trained` is whether the arm
    was trained for this ratio."""

    arm: str
    keep_ratio: float | None
    metric: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    kept_tokens: float
    flops_ratio: float
    trained: bool


def read_sweep(
    directory: Path, keep_ratios: Sequence[float], same: Sequence[str] = ("model", "dataset")
) -> Sweep:
    """Load every finished run below `directory`, to be evaluated at `keep_ratios` and where it was
    trained; `same` are the groups that they need to have in common.

    Raises:
        UserError: no sweep there, nothing finished, or runs of several models or datasets.
    """
    # What does not load is left out with its reason; the rest makes the table.
    jobs = find_jobs(directory)
    keys = tuple(key for key in _keys(jobs) if _differs(jobs, key))
    pruners: dict[Path, LearnedPruner] = {}
    left_out: list[Job] = []
    for job in jobs:
        try:
            pruners[_finished(job)] = load_pruner(_finished(job))
        except UserError as error:
            left_out.append(Job(job.folder, job.settings, str(error)))
    if not pruners:
        raise UserError(
            f"sweep={directory} has no finished run: "
            f"{'; '.join(why_missing(job, keys) for job in left_out)}"
        )
    _check_same(directory, list(pruners), same)
    # Jobs that differ in nothing but the seed share a name, and so an arm.
    arms: dict[str, Arm] = {}
    entries: list[Entry] = []
    for job in jobs:
        if job.folder in pruners:
            pruner = pruners[job.folder]
            arm = _arm(job, [k for k in keys if k != SEED], pruner.name)
            arms[arm.name] = arm
            entries += with_modes(arm.name, pruner, ratios_of(arm, keep_ratios), seed_of(pruner))
    config = next(iter(pruners)) / "config.yaml"
    return Sweep(directory, keys, tuple(arms.values()), tuple(entries), tuple(left_out), config)


def find_jobs(directory: Path) -> list[Job]:
    """The jobs of a sweep in the order of their folders, then those that never started.

    Raises:
        UserError: there are none.
    """
    runs = [path.parent.parent for path in directory.glob("**/.hydra/overrides.yaml")]
    if not directory.is_dir() or not runs:
        why = "holds no jobs" if directory.is_dir() else "does not exist"
        raise UserError(
            f"sweep={directory} {why}: give the directory of a `python -m src.train -m ...`."
        )
    evaluated = (directory / "evaluation.json").is_file()
    if directory in runs and evaluated and not (directory / "pruner").is_dir():
        raise UserError(
            f"sweep={directory} is an evaluation, not a sweep: its numbers are in its results.csv."
        )
    if directory in runs:
        raise UserError(f"sweep={directory} is one run, not a sweep: use run={directory}.")
    runs.sort(key=lambda path: _order(path.relative_to(directory)))
    words = {path: _words(_left(path / ".hydra" / "overrides.yaml", ListConfig)) for path in runs}
    # What started is known from its own folder, what never did from Hydra's plan.
    jobs = [Job(path, _settings(words[path]), _state(path)) for path in runs]
    planned = _planned(directory / "multirun.yaml")
    # otherwise the file is another sweep's
    if all(started in planned for started in words.values()):
        never = [settings for settings in planned if settings not in words.values()]
        jobs += [Job(None, _settings(settings), "never started") for settings in never]
    return jobs


def _order(job: Path) -> list[tuple[bool, str]]:
    """Jobs are named by numbers: 10 comes after 9, and names after all numbers."""
    return [(not part.isdigit(), part.zfill(9)) for part in job.parts]


def why_missing(job: Job, keys: Sequence[str]) -> str:
    """A line about a job that is left out, with its settings of these keys."""
    what = " ".join(f"{key}={job.settings[key]}" for key in keys if key in job.settings)
    where = "" if job.folder is None else f"{job.folder}: "
    return f"{where}{what or 'the only job'}: {job.reason}"


def ratios_of(arm: Arm, keep_ratios: Sequence[float]) -> tuple[float, ...]:
    """The kept fractions to evaluate an arm at: the common ones, and its own where they read
    differently (0.333 beside 0.3333 would be a column of its own)."""
    known = {ratio_label(ratio) for ratio in keep_ratios}
    return (*keep_ratios, *(ratio for ratio in arm.trained_at if ratio_label(ratio) not in known))


def _differs(jobs: Sequence[Job], key: str) -> bool:
    """Whether a setting has several values in a sweep."""
    return len({job.settings.get(key) for job in jobs}) > 1


def summarize_sweep(sweep: Sweep, rows: Sequence[Row]) -> list[Summary]:
    """Every metric of a table over training seeds."""
    # Rows of one arm, ratio and metric differ in their seed alone.
    groups: dict[tuple[str, float | None, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.pruner, row.keep_ratio, row.metric].append(row)
    trained = {(arm.name, ratio_label(ratio)) for arm in sweep.arms for ratio in arm.trained_at}
    out = []
    for (arm, ratio, metric), same in groups.items():
        # Sample deviation (n - 1); one seed has none.
        values = [row.value for row in same]
        deviation = statistics.stdev(values) if len(same) > 1 else float("nan")
        kept = statistics.fmean(row.kept_tokens for row in same)
        flops = statistics.fmean(row.flops_ratio for row in same)
        spread = statistics.fmean(values), deviation, min(values), max(values)
        known = (arm, ratio_label(ratio)) in trained
        out.append(Summary(arm, ratio, metric, len(same), *spread, kept, flops, known))
    return out


def _finished(job: Job) -> Path:
    if job.reason or job.folder is None:
        raise UserError(job.reason)
    return job.folder


def _state(folder: Path) -> str:
    """Why a job has not finished, or nothing."""
    if (folder / "done.json").is_file():
        return ""
    if (folder / "FAILED").is_file():
        lines = (folder / "FAILED").read_text(errors="replace").split("\n")
        stripped = [line.strip() for line in lines if line.strip()]
        reason = stripped[-1] if stripped else "for an unknown reason"
        return f"failed: {reason.removeprefix('tprl.errors.UserError: ')}"
    return "unfinished: it still runs, or was killed"


def _check_same(directory: Path, folders: Sequence[Path], same: Sequence[str]) -> None:
    """One table is about one model and one dataset."""
    configs = [_left(folder / "config.yaml") for folder in folders]
    for name in same:
        nodes = [OmegaConf.to_container(config[name]) for config in configs]
        other = next((i for i, node in enumerate(nodes) if node != nodes[0]), None)
        if other is not None:
            raise UserError(
                f"sweep={directory}: {folders[0]} and {folders[other]} differ "
                f"in {name}, and one table is about one: evaluate each by "
                f"runs={{name: [<run>, ...]}}, or give {name}=<name> for all."
            )


def _left(path: Path, kind: type[DictConfig] | type[ListConfig] = DictConfig) -> Any:
    return read_yaml(path, "copy it again, or move its job out of the sweep", kind)


def _arm(job: Job, keys: Sequence[str], pruner: str) -> Arm:
    swept = {key: job.settings.get(key, "(not set)") for key in keys}
    # The last part of a key names it, unless two keys end alike.
    last = [key.rpartition(".")[2] for key in keys]
    short = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    name = " ".join(f"{key}={value}" for key, value in zip(short, swept.values(), strict=True))
    # stage=all has its kept fractions under ppo, a single stage in its module.
    stage = _left(_finished(job) / "config.yaml").get("stage", {})
    part = stage.get("ppo", stage)
    trained_ratio = part.get("module", part).get("keep_ratio")
    ratios = several(trained_ratio)
    return Arm(name or pruner, swept, tuple(float(ratio) for ratio in ratios))


def _keys(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(job.settings for job in jobs)))


def _words(overrides: Any) -> frozenset[str]:
    """What a job was started with; that it was resumed later does not make it another one."""
    return frozenset(str(word) for word in overrides if not str(word).startswith("resume="))


def _settings(words: frozenset[str]) -> dict[str, str]:
    pairs = (in_short(word.lstrip("+~")).partition("=") for word in sorted(words))
    return {key: value for key, _, value in pairs}


def _planned(path: Path) -> list[frozenset[str]]:
    """The jobs that Hydra wrote down before it started the first."""
    if not path.is_file():
        return []
    overrides = OverridesParser.create().parse_overrides(
        [str(w) for w in _left(path).hydra.overrides.task]
    )
    parts = []
    # A sweep is the product of its options in their order, as Hydra's own sweeper makes it.
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            parts.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            parts.append([override.input_line or ""])
    return [frozenset(combination) for combination in product(*parts)]
