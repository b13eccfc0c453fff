"""What the table does not say: paired differences, pictures of what was kept, and whether the question mattered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from tprl.data.benchmark import batches, taken
from tprl.evaluation.entries import variants
from tprl.evaluation.evaluator import Entry, Tick
from tprl.evaluation.results import BOUNDS, FULL, Row, SampleRow, grid, ratio_label
from tprl.evaluation.statistics import Interval, PairedInterval, image_key, interval, open_side, paired_interval
from tprl.pruners.learned import LearnedPruner
from tprl.report.evaluation import Paired
from tprl.report.gallery import GalleryItem, Guided, GuidedPair, Panel, overlap
from tprl.runtime.progress import Progress
from tprl.scoring.scorer import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Dataset, Encoded, Pruner, Sample, TokenSelection

Scores = dict[int, dict[str, float]]  # training seed -> uid -> score


def by_arm(rows: Sequence[SampleRow]) -> dict[tuple[str, float | None], Scores]:
    """The scores of every pruner at every keep ratio."""
    arms: dict[tuple[str, float | None], Scores] = {}
    for row in rows:
        arms.setdefault((row.pruner, row.keep_ratio), {}).setdefault(row.seed, {})[row.uid] = row.score
    return arms


def difference(ours: Scores, baseline: Scores, uids: Sequence[str]) -> PairedInterval:
    """Mean score of ours minus theirs on `uids`. With the same training seeds on both sides they are compared seed by
    seed, by the seeds' numbers; otherwise the seeds of either side widen the interval by themselves (`over_seeds`)."""
    a, b = (np.array([[side[seed][uid] for uid in uids] for seed in sorted(side)]) for side in (ours, baseline))
    same = ours.keys() == baseline.keys()
    return paired_interval(a, b, [image_key(uid) for uid in uids], same_seeds=same)


def common(*sides: Scores) -> list[str]:
    """The questions that all seeds of all sides answered, in the order of the first."""
    answered = [set(scores) for side in sides for scores in side.values()]
    everyone = set.intersection(*answered)
    return [uid for uid in next(iter(sides[0].values())) if uid in everyone]


def paired(rows: Sequence[SampleRow], pruner: str) -> list[Paired]:
    """Accuracy of `pruner` minus that of every other entry at the same keep ratio, on the same questions.

    See `difference` for how training seeds enter.
    """
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
    """The rows as tables show them; `results.csv` keeps what the bootstrap over images gave each seed.

    The accuracies of an arm of several seeds get, in all its rows, the one interval over images and seeds (around the
    mean, see `over_seeds`), cut at 0 and 1. Where all scores agree, the interval is that of `open_side`.
    """
    arms: dict[tuple[str, float | None, str], Scores] = {}
    for sample in samples:
        for metric in ("accuracy", f"accuracy/{sample.family}"):
            arms.setdefault((sample.pruner, sample.keep_ratio, metric), {}).setdefault(sample.seed, {})[sample.uid] = (
                sample.score
            )
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
    if len(arm) < 2 or not uids:
        return len({image_key(uid) for scores in arm.values() for uid in scores}), None
    mean, low, high = interval([[scores[uid] for uid in uids] for scores in arm.values()], images)
    return len(set(images)), Interval(mean, max(low, 0.0), min(high, 1.0))


def guided(
    scorer: Scorer,
    dataset: Dataset,
    pruner: Pruner,
    keep_ratio: float,
    limit: int | None = None,
    images: int = 200,
    batch_size: int = 100,
    tick: Tick = lambda done, total: None,
) -> Guided | None:
    """Does the pruner listen to the question?

    Every question is paired with the next one about the same image: how much of what is kept do they share? Then the
    pruner is given the question of another image while the model answers the right one. Reads the questions of the
    first `images` images, at most `limit`; None where these show one image, since then there is nothing to swap, and
    where no image is asked twice. Up to `batch_size` questions are encoded at a time, those of an image together.
    `tick(done, total)` counts images.
    """
    groups = _by_image(dataset, limit, images)
    if len(groups) < 2:
        return None
    shares, right, shuffled, clusters, pairs = [], [], [], [], []
    for numbers in _together(groups, batch_size):
        tick(numbers[0], len(groups))
        samples = [sample for number in numbers for sample in groups[number]]
        swapped = [sample for number in numbers for sample in _swapped(groups, number)]
        encoded = scorer.lvlm.encode(samples, pruner.extras)
        keep = pruner.select(encoded, keep_ratio).keep
        wrong = pruner.select(scorer.lvlm.encode(swapped, pruner.extras), keep_ratio).keep
        # Both choices of every question are prompts of one pass.
        scores = scorer.selections(samples, encoded, [*range(len(samples))] * 2, torch.cat([keep, wrong])).score
        right += scores[: len(samples)].tolist()
        shuffled += scores[len(samples) :].tolist()
        clusters += [image_key(sample.uid) for sample in samples]
        masks = [on_grid(encoded, i, row) for i, row in enumerate(keep)]
        start = 0
        for number in numbers:
            rows = [*range(start, start + len(groups[number]))]
            shares += [overlap(masks[i], masks[i + 1]) for i in rows[:-1]]
            if number < 3 and len(rows) > 1:
                pairs_encoded, chosen = encoded.rows(rows), [masks[i] for i in rows]
                pairs.append(_pair(scorer, groups[number], pairs_encoded, keep[rows], chosen))
            start += len(rows)
    tick(len(groups), len(groups))
    if not shares:
        return None
    accuracy, other = (open_side(interval(scores, clusters), len(groups)) for scores in (right, shuffled))
    share = float(np.mean(shares))
    return Guided(pruner.name, keep_ratio, share, keep_ratio, accuracy, other, pairs, len(right), len(groups))


def looked_at(
    scorer: Scorer,
    dataset: Dataset,
    main: Entry,
    pruners: Mapping[str, Pruner],
    ratio: float,
    settings: Mapping[str, Any],
) -> tuple[Guided | None, list[GalleryItem]]:
    """Whether the main pruner listens to the question, where it was taught to, and the pictures of the report."""
    listens, pictures = None, list[GalleryItem]()
    if isinstance(main.pruner, LearnedPruner):
        with Progress("questions") as tick:
            options = {"limit": settings["limit"], "batch_size": settings["batch_size"], "tick": tick}
            listens = guided(scorer, dataset, main.pruner, ratio, **options)
    if pruners:
        with Progress("pictures") as tick:
            options = {"batch_size": settings["batch_size"], "limit": settings["limit"], "tick": tick}
            pictures = gallery(scorer, dataset, pruners, ratio, **options)
    return listens, pictures


def gallery(
    scorer: Scorer,
    dataset: Dataset,
    pruners: Mapping[str, Pruner],
    keep_ratio: float,
    batch_size: int = 100,
    items: int = 6,
    limit: int | None = None,
    pool: int = 100,
    tick: Tick = lambda done, total: None,
) -> list[GalleryItem]:
    """What each pruner kept of a few questions: a question of every family in turn, failures of the first pruner as
    often as there are some (every third picture). They are among the first `pool` questions, and of an evaluation with
    a `limit` among those that it answered; `tick(done, total)` counts these."""
    extras = frozenset().union(*(pruner.extras for pruner in pruners.values()))
    pool = min(pool, limit or pool, len(dataset))
    samples, failed = list[Sample](), list[bool]()
    for batch in batches(dataset, pool, batch_size):
        tick(len(samples), pool)
        encoded = scorer.lvlm.encode(batch, extras)
        keep = next(iter(pruners.values())).select(encoded, keep_ratio)
        first = scorer(batch, splice(encoded, keep)).score
        failed += (first < scorer.full(batch, encoded).score).tolist()
        samples += batch
    tick(pool, pool)
    if not samples:  # the first rows are damaged, and only later ones were answered
        return []
    picked = [samples[i] for i in _mixed(samples, failed, items)]
    part = scorer.lvlm.encode(picked, extras)
    answers = scorer.lvlm.answer(splice(part, keep_all(part)))
    columns = [panels(scorer, picked, part, name, pruner, keep_ratio) for name, pruner in pruners.items()]
    return [
        GalleryItem(
            sample.images[-1],
            sample.question,
            sample.answers[0],
            answers[i],
            [column[i] for column in columns],
            scorer.dataset.score(sample, answers[i]) > 0.5,
        )
        for i, sample in enumerate(picked)
    ]


def _by_image(dataset: Dataset, limit: int | None, images: int) -> list[list[Sample]]:
    """The questions of the first `images` images, at most `limit`."""
    groups: dict[str, list[Sample]] = {}
    for sample in taken(dataset, range(min(limit or len(dataset), len(dataset)))):
        key = image_key(sample.uid)
        if key not in groups and len(groups) == images:
            break
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def _together(groups: Sequence[Sequence[Sample]], size: int) -> list[list[int]]:
    """The numbers of the groups, those of up to `size` samples together; a larger group is alone."""
    batched: list[list[int]] = []
    count = size
    for number, group in enumerate(groups):
        count += len(group)
        if count > size:
            batched.append([])
            count = len(group)
        batched[-1].append(number)
    return batched


def _swapped(groups: Sequence[Sequence[Sample]], number: int) -> list[Sample]:
    """The samples of a group with the questions of the next one."""
    foreign = groups[(number + 1) % len(groups)]
    # Any family may meet any other: shuffled within families, a question would keep half of what it says.
    questions = [foreign[(i + number) % len(foreign)].question for i in range(len(groups[number]))]
    return [s._replace(question=question) for s, question in zip(groups[number], questions, strict=True)]


def _pair(
    scorer: Scorer,
    samples: Sequence[Sample],
    encoded: Encoded,
    keep: Bool[Tensor, "B V"],
    masks: Sequence[NDArray[np.bool_]],
) -> GuidedPair:
    """The two questions of an image that share least."""
    couples = [(overlap(masks[i], masks[j]), i, j) for i in range(len(masks)) for j in range(i)]
    share, i, j = min(couples)
    answers = scorer.lvlm.answer(splice(encoded, TokenSelection(keep)))
    questions = (samples[i].question, samples[j].question)
    return GuidedPair(samples[i].images[-1], questions, (masks[i], masks[j]), (answers[i], answers[j]), share)


def panels(
    scorer: Scorer, samples: Sequence[Sample], encoded: Encoded, name: str, pruner: Pruner, keep_ratio: float
) -> list[Panel]:
    """What one pruner keeps of each sample, and what the model then answers."""
    selection = pruner.select(encoded, keep_ratio)
    answers = scorer.lvlm.answer(splice(encoded, selection))
    chances = (
        pruner.logits(pruner.observe(encoded), keep_ratio).sigmoid() if isinstance(pruner, LearnedPruner) else None
    )
    out = []
    for i, sample in enumerate(samples):
        keep = None if selection.extra is not None else on_grid(encoded, i, selection.keep[i])
        chance = None if chances is None else on_grid(encoded, i, chances[i]).astype(float)
        out.append(Panel(name, keep, answers[i], scorer.dataset.score(sample, answers[i]) > 0.5, chance))
    return out


def on_grid(encoded: Encoded, i: int, values: Tensor) -> NDArray:
    """[V] -> [rows columns] of the last view of the sample's last image."""
    *others, (rows, columns) = [view for views in encoded.grids[i] for view in views]
    start = sum(r * c for r, c in others)
    return values[start : start + rows * columns].reshape(rows, columns).cpu().numpy()


def _mixed(samples: Sequence[Sample], failed: Sequence[bool], items: int) -> list[int]:
    """Indices with the families in turn; every third is a failure, while there are failures."""
    families = list(dict.fromkeys(sample.family for sample in samples))
    chosen: list[int] = []
    for number in range(items):
        want = number % 3 == 2
        others = [i for i in range(len(samples)) if i not in chosen]
        if not others:
            break
        family = families[number % len(families)]
        others.sort(key=lambda i: (failed[i] != want, samples[i].family != family))
        chosen.append(others[0])
    return chosen


def evaluation_headline(rows: Sequence[Row], differences: Sequence[Paired], pruner: str) -> str:
    """The finding in one sentence, with the numbers of the table."""
    cells = grid(rows)
    full = next(iter(cells.get(FULL, {}).values()), None)
    main_row = cells.get(pruner, {})
    lowest = min((ratio for ratio in main_row if ratio is not None), default=None)
    if lowest is None or full is None:
        return f"{pruner} on {rows[0].dataset} with {rows[0].model}."
    cell = main_row[lowest]
    sentence = (
        f"With {cell.kept_tokens:.0f} of {full.kept_tokens:.0f} visual tokens ({ratio_label(lowest)}) and "
        f"{cell.flops_ratio:.2f} of the FLOPs, {pruner} scores {100 * cell.value:.1f} %; all tokens score "
        f"{100 * full.value:.1f} %"
    )
    rivals = [d for d in differences if d.keep_ratio == lowest and d.other not in variants(pruner)]
    if rivals:
        best = min(rivals, key=lambda d: d.difference)
        sentence += f", and the best other pruner ({best.other}) is {_distance(best)}"
    return sentence + "."


def _distance(pair: Paired) -> str:
    """How far the other pruner is from ours, in words."""
    points = f"{abs(pair.difference) * 100:.1f}"
    where = "level" if points == "0.0" else f"{points} points {'below' if pair.difference > 0 else 'above'}"
    if pair.identical or math.isnan(pair.low):
        return where
    sure = "" if pair.low > 0 or pair.high < 0 else ", which includes zero"
    return f"{where} (95 % interval of the difference {pair.low * 100:+.1f} to {pair.high * 100:+.1f}{sure})"


def guided_line(guided: Guided) -> str:
    """`Guided` in one sentence."""
    return (
        f"guided by the question at {ratio_label(guided.keep_ratio)}: two questions about one image share "
        f"{guided.overlap:.0%} of the kept tokens (chance {guided.chance:.0%}); accuracy {guided.accuracy.mean:.1%}, "
        f"with the questions shuffled {guided.shuffled.mean:.1%} ({guided.questions} questions)"
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
        print(
            f"{where}: level on every image" if d.identical else f"{where}: {d.difference * 100:+.1f} points {bounds}"
        )
    if guided is not None:
        print(guided_line(guided))
