"""What pruners kept of single questions, and whether a pruner listens to the question: material for
the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tprl.data.base import BaseDataset
from tprl.data.taking import batches, taken
from tprl.evaluation.evaluator import Entry, Tick
from tprl.evaluation.results import ratio_label
from tprl.evaluation.statistics import Interval, image_key, interval, open_side
from tprl.pruners.learned import LearnedPruner
from tprl.runtime.progress import Progress
from tprl.scoring.ahead import Ready, ahead
from tprl.scoring.scorer import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Box, Encoded, Pruner, Sample, TokenSelection

Mask = NDArray[np.bool_]  # [rows columns] over what the model sees of the image


@dataclass(frozen=True)
class Panel:
    """What one pruner kept of one image: `keep` and `probability` are [rows, columns] over what the
    model sees of it.

    `keep` is None for methods whose tokens are no longer patches (pooling). `right` is None where
    unknown.
    """

    pruner: str
    keep: Mask | None
    answer: str
    right: bool | None = None
    probability: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class GalleryItem:
    """One question, the reference answer, the answer with all tokens, and what each pruner made of
    it."""

    image: Image.Image
    question: str
    reference: str
    full_answer: str
    panels: Sequence[Panel]
    full_right: bool | None = None
    seen: Box | None = None  # the part of the image that the model sees, in pixels; None: all of it


@dataclass(frozen=True)
class GuidedPair:
    """One image, two questions, and what the same pruner kept for each; `overlap` as in
    `Guided`."""

    image: Image.Image
    questions: tuple[str, str]
    keeps: tuple[Mask, Mask]
    answers: tuple[str, str]
    overlap: float
    seen: Box | None = None  # as above


@dataclass(frozen=True)
class Guided:
    """Evidence that a pruner listens to the question.

    `overlap` is the mean share of kept tokens that two questions about one image have in common (1:
    the question changes nothing), `chance` the same for two random choices (the keep ratio).
    `shuffled` is the accuracy when the pruner reads another sample's question while the model
    answers the right one. All of it over `questions` about `images`.
    """

    pruner: str
    keep_ratio: float
    overlap: float
    chance: float
    accuracy: Interval
    shuffled: Interval
    pairs: Sequence[GuidedPair]
    questions: int
    images: int


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Share of kept tokens that two selections have in common: |A and B| over the mean of |A| and
    |B|."""
    return float((a & b).sum() / (0.5 * (a.sum() + b.sum())))


def guided(
    scorer: Scorer,
    dataset: BaseDataset,
    pruner: Pruner,
    keep_ratio: float,
    limit: int | None = None,
    images: int = 200,
    batch_size: int = 100,
    tick: Tick = lambda done, total: None,
) -> Guided | None:
    """Does the pruner listen to the question?

    Every question is paired with the next one about the same image: how much of what is kept do
    they share? Then the pruner is given the question of another image while the model answers the
    right one. Reads the questions of the first `images` images, at most `limit`; None where these
    show one image, since then there is nothing to swap, and where no image is asked twice. Up to
    `batch_size` questions are encoded at a time, those of an image together. `tick(done, total)`
    counts images.
    """
    groups = _by_image(dataset, limit, images)
    if len(groups) < 2:
        return None
    shares, right, shuffled, clusters, pairs = [], [], [], [], []
    for numbers in _together(groups, batch_size):
        tick(numbers[0], len(groups))
        samples = list(chain.from_iterable(groups[number] for number in numbers))
        swapped = list(chain.from_iterable(_swapped(groups, number) for number in numbers))
        encoded = Ready(samples).encode_in_parts(scorer.lvlm, pruner.extras)
        keep = pruner.select(encoded, keep_ratio).keep
        strange = Ready(swapped).encode_in_parts(scorer.lvlm, pruner.extras)
        wrong = pruner.select(strange, keep_ratio).keep
        # Both choices of every question are prompts of one pass.
        scores = scorer.selections(
            samples, encoded, [*range(len(samples))] * 2, torch.cat([keep, wrong])
        ).score
        right += scores[: len(samples)].tolist()
        shuffled += scores[len(samples) :].tolist()
        clusters += [image_key(sample.uid) for sample in samples]
        # Questions of an image follow each other: each is compared with the next one.
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
    accuracy = open_side(interval(right, clusters), len(groups))
    other = open_side(interval(shuffled, clusters), len(groups))
    # Two random choices share as many as are kept: chance is the keep ratio.
    share = float(np.mean(shares))
    return Guided(
        pruner.name, keep_ratio, share, keep_ratio, accuracy, other, pairs, len(right), len(groups)
    )


def looked_at(
    scorer: Scorer,
    dataset: BaseDataset,
    main: Entry,
    pruners: Mapping[str, Pruner],
    ratio: float,
    settings: Mapping[str, Any],
) -> tuple[Guided | None, list[GalleryItem]]:
    """Whether the main pruner listens to the question, where it was taught to, and the pictures of
    the report."""
    listens, pictures = None, list[GalleryItem]()
    if isinstance(main.pruner, LearnedPruner):
        with Progress("questions") as tick:
            options = {
                "limit": settings["limit"],
                "batch_size": settings["batch_size"],
                "tick": tick,
            }
            listens = guided(scorer, dataset, main.pruner, ratio, **options)
    if pruners:
        with Progress("pictures") as tick:
            options = {
                "batch_size": settings["batch_size"],
                "limit": settings["limit"],
                "tick": tick,
            }
            pictures = gallery(scorer, dataset, pruners, ratio, **options)
    return listens, pictures


def gallery(
    scorer: Scorer,
    dataset: BaseDataset,
    pruners: Mapping[str, Pruner],
    keep_ratio: float,
    batch_size: int = 100,
    items: int = 6,
    limit: int | None = None,
    pool: int = 100,
    tick: Tick = lambda done, total: None,
) -> list[GalleryItem]:
    """What each pruner kept of a few questions: a question of every family in turn, failures of the
    first pruner as often as there are some (every third picture). They are among the first `pool`
    questions, and of an evaluation with a `limit` among those that it answered; `tick(done, total)`
    counts these."""
    extras = frozenset().union(*(pruner.extras for pruner in pruners.values()))
    pool = min(pool, limit or pool, len(dataset))
    # A failure scores less than with all tokens, whatever the score is.
    samples, failed = list[Sample](), list[bool]()
    for part in ahead(scorer.lvlm, map(Ready, batches(dataset, pool, batch_size))):
        tick(len(samples), pool)
        batch, encoded = part.samples, part.encode_in_parts(scorer.lvlm, extras)
        keep = next(iter(pruners.values())).select(encoded, keep_ratio)
        first = scorer(batch, splice(encoded, keep)).score
        failed += (first < scorer.full(batch, encoded).score).tolist()
        samples += batch
    tick(pool, pool)
    if not samples:  # the first rows are damaged, and only later ones were answered
        return []
    picked = [samples[i] for i in _mixed(samples, failed, items)]
    part = Ready(picked).encode_in_parts(scorer.lvlm, extras)
    answers = scorer.lvlm.answer(splice(part, keep_all(part)))
    columns = [
        panels(scorer, picked, part, name, pruner, keep_ratio) for name, pruner in pruners.items()
    ]
    rows = zip(*columns, strict=True) if columns else [()] * len(picked)
    out = []
    for i, (sample, answer, row) in enumerate(zip(picked, answers, rows, strict=True)):
        right = scorer.dataset.score(sample, answer) > 0.5
        image, reference = sample.images[-1], sample.answers[0]
        seen = last_seen(part, i)
        out.append(GalleryItem(image, sample.question, reference, answer, list(row), right, seen))
    return out


def _by_image(dataset: BaseDataset, limit: int | None, images: int) -> list[list[Sample]]:
    """The questions of the first `images` images, at most `limit`."""
    groups: dict[str, list[Sample]] = {}
    for sample in taken(dataset, range(min(limit or len(dataset), len(dataset)))):
        key = image_key(sample.uid)
        if key not in groups and len(groups) == images:
            break
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def _together(groups: Sequence[Sequence[Sample]], size: int) -> list[list[int]]:
    """The numbers of the groups, those of up to `size` samples together; a larger group is
    alone."""
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
    # Any family may meet any other: shuffled within families, a question would keep half of what it
    # says.
    questions = [foreign[(i + number) % len(foreign)].question for i in range(len(groups[number]))]
    return [
        s._replace(question=question) for s, question in zip(groups[number], questions, strict=True)
    ]


def _pair(
    scorer: Scorer,
    samples: Sequence[Sample],
    encoded: Encoded,
    keep: Bool[Tensor, "B V"],
    masks: Sequence[NDArray[np.bool_]],
) -> GuidedPair:
    """The two questions of an image that share least."""
    # The pair that shows most of what the question changes.
    couples = [(overlap(masks[i], masks[j]), i, j) for j, i in combinations(range(len(masks)), 2)]
    share, i, j = min(couples)
    answers = scorer.lvlm.answer(splice(encoded, TokenSelection(keep)))
    questions = (samples[i].question, samples[j].question)
    seen = last_seen(encoded, i)
    keeps, texts = (masks[i], masks[j]), (answers[i], answers[j])
    return GuidedPair(samples[i].images[-1], questions, keeps, texts, share, seen)


def panels(
    scorer: Scorer,
    samples: Sequence[Sample],
    encoded: Encoded,
    name: str,
    pruner: Pruner,
    keep_ratio: float,
) -> list[Panel]:
    """What one pruner keeps of each sample, and what the model then answers."""
    selection = pruner.select(encoded, keep_ratio)
    answers = scorer.lvlm.answer(splice(encoded, selection))
    # Only a policy has probabilities: its logits at this budget.
    chances = None
    if isinstance(pruner, LearnedPruner):
        chances = pruner.logits(pruner.observe(encoded), keep_ratio).sigmoid()
    out = []
    for i, sample in enumerate(samples):
        # Merged tokens are no cells of a grid any more.
        keep = None if selection.extra is not None else on_grid(encoded, i, selection.keep[i])
        chance = None if chances is None else on_grid(encoded, i, chances[i]).astype(float)
        right = scorer.dataset.score(sample, answers[i]) > 0.5
        out.append(Panel(name, keep, answers[i], right, chance))
    return out


def on_grid(encoded: Encoded, i: int, values: Tensor) -> NDArray:
    """[V] -> [rows columns] of the last view of the sample's last image."""
    # Views follow each other; the last one shows the whole image.
    *others, (rows, columns) = list(chain.from_iterable(encoded.grids[i]))
    start = sum(r * c for r, c in others)
    return values[start : start + rows * columns].reshape(rows, columns).cpu().numpy()


def last_seen(encoded: Encoded, i: int) -> Box | None:
    """What the model sees of the sample's last image, in its pixels; None where that is not
    known."""
    return encoded.seen[i][-1] if encoded.seen and encoded.seen[i] else None


def _mixed(samples: Sequence[Sample], failed: Sequence[bool], items: int) -> list[int]:
    """Indices with the families in turn; every third is a failure, while there are failures."""
    families = list(dict.fromkeys(sample.family for sample in samples))
    chosen: list[int] = []
    for number in range(items):
        # A failure first where one is due, then the family whose turn it is.
        want = number % 3 == 2
        others = [i for i in range(len(samples)) if i not in chosen]
        if not others:
            break
        family = families[number % len(families)]
        others.sort(key=lambda i: (failed[i] != want, samples[i].family != family))
        chosen.append(others[0])
    return chosen


def guided_line(guided: Guided) -> str:
    """`Guided` in one sentence."""
    return (
        f"guided by the question at {ratio_label(guided.keep_ratio)}: two questions "
        f"about one image share {guided.overlap:.0%} of the kept tokens (chance "
        f"{guided.chance:.0%}); accuracy {guided.accuracy.mean:.1%}, with the "
        f"questions shuffled {guided.shuffled.mean:.1%} ({guided.questions} questions)"
    )
