"""What the table does not say: paired differences, intervals over training seeds, and the finding
in a sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from tprl.evaluation.entries import variants
from tprl.evaluation.pictures import Guided, guided_line
from tprl.evaluation.results import BOUNDS, FULL, Row, SampleRow, grid, ratio_label
from tprl.evaluation.statistics import (
    Interval,
    PairedInterval,
    identical,
    image_key,
    interval,
    open_side,
    paired_interval,
)

Scores = dict[int, dict[str, float]]  # training seed -> uid -> score


@dataclass(frozen=True)
class Paired:
    """Accuracy of `pruner` minus accuracy of `other` on the same samples, with its interval."""

    pruner: str
    other: str
    keep_ratio: float | None
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def identical(self) -> bool:
        """Whether the two score the same on every image, which says nothing of an interval."""
        return identical(self.difference, self.low, self.high)


def by_arm(rows: Sequence[SampleRow]) -> dict[tuple[str, float | None], Scores]:
    """The scores of every pruner at every keep ratio."""
    arms: dict[tuple[str, float | None], Scores] = {}
    for row in rows:
        arm = arms.setdefault((row.pruner, row.keep_ratio), {})
        arm.setdefault(row.seed, {})[row.uid] = row.score
    return arms


def difference(ours: Scores, baseline: Scores, uids: Sequence[str]) -> PairedInterval:
    """Mean score of ours minus theirs on `uids`. With the same training seeds on both sides they
    are compared seed by seed, by the seeds' numbers; otherwise the seeds of either side widen the
    interval by themselves (`over_seeds`)."""
    same = ours.keys() == baseline.keys()
    images = [image_key(uid) for uid in uids]
    return paired_interval(_by_seed(ours, uids), _by_seed(baseline, uids), images, same_seeds=same)


def _by_seed(side: Scores, uids: Sequence[str]) -> np.ndarray:
    """[S n] scores of the seeds, in their order."""
    lines = []
    for seed in sorted(side):
        lines.append([side[seed][uid] for uid in uids])
    return np.array(lines)


def common(*sides: Scores) -> list[str]:
    """The questions that all seeds of all sides answered, in the order of the first."""
    arms = chain.from_iterable(side.values() for side in sides)
    everyone = set.intersection(*map(set, arms))
    return [uid for uid in next(iter(sides[0].values())) if uid in everyone]


def paired(rows: Sequence[SampleRow], pruner: str) -> list[Paired]:
    """Accuracy of `pruner` minus that of every other entry at the same keep ratio, on the same
    questions.

    See `difference` for how training seeds enter.
    """
    # Bounds are no rivals, and without a shared question there is no pair.
    scores, out = by_arm(rows), []
    for (other, ratio), baseline in scores.items():
        ours = scores.get((pruner, ratio))
        if other == pruner or other in BOUNDS or ours is None or ratio is None:
            continue
        uids = common(ours, baseline)
        if not uids:
            continue
        gap = difference(ours, baseline, uids)
        out.append(Paired(pruner, other, ratio, *map(float, gap)))
    return out


def with_open_sides(rows: Sequence[Row], samples: Sequence[SampleRow]) -> list[Row]:
    """The rows as tables show them; `results.csv` keeps what the bootstrap over images gave each
    seed.

    The accuracies of an arm of several seeds get, in all its rows, the one interval over images and
    seeds (around the mean, see `over_seeds`), cut at 0 and 1. Where all scores agree, the interval
    is that of `open_side`.
    """
    # Scores by arm and metric; official numbers are no means of scores, and stay as they are.
    arms: dict[tuple[str, float | None, str], Scores] = {}
    for sample in samples:
        for metric in ("accuracy", f"accuracy/{sample.family}"):
            arm = arms.setdefault((sample.pruner, sample.keep_ratio, metric), {})
            arm.setdefault(sample.seed, {})[sample.uid] = sample.score
    # Of each arm the images that it answered, and its interval over seeds if it has several.
    pooled = {key: _over_seeds(arm) for key, arm in arms.items()}
    out = []
    for row in rows:
        count, whole = pooled.get((row.pruner, row.keep_ratio, row.metric), (0, None))
        whole = whole or Interval(row.value, row.ci_low, row.ci_high)
        _, low, high = open_side(whole, count)
        out.append(replace(row, ci_low=low, ci_high=high))
    return out


def _over_seeds(arm: Scores) -> tuple[int, Interval | None]:
    """How many images an arm answered, and its interval if it has several seeds."""
    uids = common(arm)
    images = [image_key(uid) for uid in uids]
    # One seed keeps the bootstrap's interval; how many images it had still counts.
    if len(arm) < 2 or not uids:
        return len(set(map(image_key, chain.from_iterable(arm.values())))), None
    lines = []
    for scores in arm.values():
        lines.append([scores[uid] for uid in uids])
    mean, low, high = interval(lines, images)
    return len(set(images)), Interval(mean, max(low, 0.0), min(high, 1.0))


def evaluation_headline(rows: Sequence[Row], differences: Sequence[Paired], pruner: str) -> str:
    """The finding in one sentence, with the numbers of the table."""
    # The smallest budget tells methods apart.
    cells = grid(rows)
    full = next(iter(cells.get(FULL, {}).values()), None)
    main_row = cells.get(pruner, {})
    lowest = min((ratio for ratio in main_row if ratio is not None), default=None)
    if lowest is None or full is None:
        return f"{pruner} on {rows[0].dataset} with {rows[0].model}."
    cell = main_row[lowest]
    sentence = (
        f"With {cell.kept_tokens:.0f} of {full.kept_tokens:.0f} visual tokens "
        f"({ratio_label(lowest)}) and {cell.flops_ratio:.2f} of the FLOPs, {pruner} "
        f"scores {100 * cell.value:.1f} %; all tokens score {100 * full.value:.1f} %"
    )
    # The best of the others, and never a mode of the pruner itself.
    rivals = [d for d in differences if d.keep_ratio == lowest and d.other not in variants(pruner)]
    if rivals:
        best = min(rivals, key=lambda d: d.difference)
        # A rival at as many tokens may cost more: one that reads the model first.
        rival = cells.get(best.other, {}).get(lowest)
        cost = "" if rival is None else f", {rival.flops_ratio:.2f} of the FLOPs"
        sentence += f", and the best other pruner ({best.other}{cost}) is {_distance(best)}"
    return sentence + "."


def _distance(pair: Paired) -> str:
    """How far the other pruner is from ours, in words."""
    # Level is what the table would print as level.
    points = f"{abs(pair.difference) * 100:.1f}"
    where = (
        "level"
        if points == "0.0"
        else f"{points} points {'below' if pair.difference > 0 else 'above'}"
    )
    if pair.identical or math.isnan(pair.low):
        return where
    sure = "" if pair.low > 0 or pair.high < 0 else ", which includes zero"
    return (
        f"{where} (95 % interval of the difference "
        f"{pair.low * 100:+.1f} to {pair.high * 100:+.1f}{sure})"
    )


def say(measured: Mapping[str, Any], differences: Sequence[Paired], guided: Guided | None) -> None:
    """What the terminal shows below the table."""
    for name, value in measured.items():
        print(f"{name}: {value}")
    if differences:
        print("differences of the mean score over questions:")
    for d in differences:
        where = f"{d.pruner} - {d.other} at {ratio_label(d.keep_ratio)}"
        bounds = f"(95 % interval {d.low * 100:+.1f} to {d.high * 100:+.1f})"
        if math.isnan(d.low):
            bounds = "(no interval: one image says nothing about others)"
        points = f"{d.difference * 100:+.1f} points {bounds}"
        print(f"{where}: {'level on every image' if d.identical else points}")
    if guided is not None:
        print(guided_line(guided))
