"""Run pruners over a dataset: every batch is encoded once, every pruner and keep ratio answers from it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from tprl import cost
from tprl.budget import need_ratio
from tprl.errors import UserError
from tprl.evaluation.results import FULL, Row, SampleRow
from tprl.evaluation.statistics import image_key, interval
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner
from tprl.pruners.learned import check_family
from tprl.scoring import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Dataset, Encoded, Pruner, Sample

log = logging.getLogger(__name__)
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One line of the table: a pruner under the name it gets there.

    `keep_ratios` of (None,) lets the pruner decide how many tokens live.
    """

    name: str
    pruner: Pruner | LayerPruner
    keep_ratios: tuple[float | None, ...]
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """A SampleRow and what the question cost."""

    row: SampleRow
    iou: float | None
    flops: float
    full_flops: float


def evaluate(
    scorer: Scorer,
    dataset: Dataset,
    entries: Sequence[Entry],
    batch_size: int = 100,
    limit: int | None = None,
    tick: Tick = lambda done, total: None,
) -> list[Answered]:
    """Answer the first `limit` questions once per entry and keep ratio. `tick(done, total)` follows each batch."""
    entries = feasible(entries, scorer.lvlm)
    for entry in entries:
        check_family(entry.pruner, scorer.lvlm)
    extras = frozenset().union(*(entry.pruner.extras for entry in entries))
    total = min(limit or len(dataset), len(dataset))
    answered: list[Answered] = []
    for start in range(0, total, batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, total))]
        encoded = scorer.lvlm.encode(samples, extras)
        for entry in entries:
            for ratio in entry.keep_ratios:
                answered += _answer(scorer, samples, encoded, entry, ratio)
        tick(min(start + batch_size, total), total)
    return answered


def check_cost(lvlm: Any) -> None:
    """Refuse an LVLM whose FLOPs are unknown before anything is computed.

    Raises:
        UserError: the cost model does not know it.
    """
    lvlm.shape  # noqa: B018  # a property that raises


def feasible(entries: Sequence[Entry], lvlm: Any) -> list[Entry]:
    """The entries without the keep ratios that a method inside this LVLM's layers cannot have; says which they are, and
    marks methods that read a substitute.

    Raises:
        UserError: the LVLM has no layers that could be reached into.
    """
    found = []
    for entry in entries:
        ratios = entry.keep_ratios
        if isinstance(entry.pruner, LayerPruner):
            if not hasattr(lvlm, "layers"):
                raise UserError(f"{entry.name} drops tokens between layers, and {lvlm.name} has none: leave it out.")
            ratios = tuple(ratio for ratio in ratios if _possible(entry.pruner, ratio, lvlm.layers))
        if ratios:
            found.append(replace(entry, keep_ratios=ratios, name=_named(entry, lvlm)))
    return found


def _named(entry: Entry, lvlm: Any) -> str:
    """The entry's name, with a star where its method reads something that stands in for what this encoder lacks."""
    instead = {k: v for k, v in getattr(lvlm, "substitutes", {}).items() if k in entry.pruner.extras}
    for extra, what in instead.items():
        log.info("%s*: %s has no %s of its own; in its place: %s", entry.name, lvlm.name, extra, what)
    return f"{entry.name}*" if instead else entry.name


def _possible(pruner: LayerPruner, ratio: float | None, layers: int) -> bool:
    try:
        pruner.stages(need_ratio(pruner.name, ratio), layers)
    except UserError as error:
        log.info("left out: %s", error)
        return False
    return True


def _answer(
    scorer: Scorer, samples: Sequence[Sample], encoded: Encoded, entry: Entry, ratio: float | None
) -> list[Answered]:
    pruner, plan = entry.pruner, None
    if isinstance(pruner, LayerPruner):
        lvlm: Any = scorer.lvlm
        plan = LayerPlan.of(pruner, need_ratio(pruner.name, ratio), lvlm.layers)
        scored = scorer(samples, splice(encoded, keep_all(encoded)), plan=plan)
        counts = [_layer_mean(plan, encoded, i) for i in range(len(samples))]
    else:
        selection = pruner.select(encoded, ratio)
        scored = scorer(samples, splice(encoded, selection))
        counts = selection.count.tolist()
    scores = scored.score.tolist()
    out = []
    for i, sample in enumerate(samples):
        text = scored.predictions[i]
        overlap = None if sample.box is None or text is None else scorer.dataset.iou(sample, text)  # type: ignore[attr-defined]
        row = SampleRow(sample.uid, sample.family, entry.name, entry.seed, ratio, text, scores[i], counts[i])
        out.append(Answered(row, overlap, *question_flops(scorer, encoded, i, sample, pruner, counts[i], plan)))
    return out


def _layer_counts(plan: LayerPlan, encoded: Encoded, i: int) -> list[int]:
    """Visual tokens of one sample, all images together, that each layer computes."""
    images = encoded.image_of[i][encoded.visual_mask[i]].bincount().tolist()
    return [sum(layer) for layer in zip(*(plan.counts(n) for n in images), strict=True)] or [0] * plan.layers


def _layer_mean(plan: LayerPlan, encoded: Encoded, i: int) -> float:
    counts = _layer_counts(plan, encoded, i)
    return sum(counts) / len(counts)


def question_flops(
    scorer: Scorer,
    encoded: Encoded,
    i: int,
    sample: Sample,
    pruner: Pruner | LayerPruner,
    kept: Any,
    plan: LayerPlan | None = None,
) -> tuple[float, float]:
    """FLOPs of one question as pruned and with all its tokens (see `cost.CONVENTION`); the answer's length is the
    reference's. `kept` is the number of tokens that the language model reads, unless a plan drops them between its
    layers."""
    lvlm: Any = scorer.lvlm
    tokens = int(encoded.visual_mask[i].sum())
    text = int(encoded.attention[i].sum()) - tokens
    answer = lvlm.answer_length(sample.answers[0])
    words, images = int(encoded.question[i].sum()), len(sample.images)
    full = _total(lvlm.shape, text, tokens, answer, images)
    if pruner.name == FULL:
        return full, full
    if plan is not None:
        layers = tuple(_layer_counts(plan, encoded, i))
        return _total(lvlm.shape, text, layers, answer, images) + plan.flops(lvlm.shape.lm, text, tokens), full
    chooser: Any = pruner
    if hasattr(chooser, "flops_by_part"):  # a policy reads all images of a prompt together
        selector = sum(chooser.flops_by_part(tokens, words, kept).values())
    else:
        each = max(images, 1)
        selector = images * chooser.flops(lvlm.shape, tokens // each, kept // each)
    return _total(lvlm.shape, text, kept, answer, images) + selector, full


@lru_cache(maxsize=4096)
def _total(shape: cost.LVLMShape, text: int, visual: int | tuple[int, ...], answer: int, images: int) -> float:
    parts = cost.total(shape, text_tokens=text, visual_tokens=visual, answer_tokens=answer, images=images)
    return float(parts["total"])


def summarise(answered: Sequence[Answered], model: str, dataset: str) -> list[Row]:
    """Tidy rows: accuracy, accuracy per family and mean IoU, each with a 95 % bootstrap interval over images."""
    groups: dict[tuple[str, int, float | None], list[Answered]] = defaultdict(list)
    for one in answered:
        groups[one.row.pruner, one.row.seed, one.row.keep_ratio].append(one)
    return [row for key, group in groups.items() for row in _rows(model, dataset, key, group)]


def _rows(model: str, dataset: str, key: tuple[str, int, float | None], group: Sequence[Answered]) -> list[Row]:
    pruner, seed, ratio = key
    kept = float(np.mean([one.row.kept_tokens for one in group]))
    flops = float(np.mean([one.flops for one in group]))
    relative = flops / float(np.mean([one.full_flops for one in group]))
    metrics: dict[str, Mapping[str, Sequence[Any]]] = {"accuracy": _values(group)}
    for family in dict.fromkeys(one.row.family for one in group):
        metrics[f"accuracy/{family}"] = _values([one for one in group if one.row.family == family])
    boxes = [one for one in group if one.iou is not None]
    if boxes:
        metrics["mean_iou"] = {"values": [one.iou for one in boxes], "clusters": [image_key(o.row.uid) for o in boxes]}
    rows = []
    for metric, data in metrics.items():
        found = interval(np.array(data["values"], dtype=float), data["clusters"])
        numbers = (float(found.mean), float(found.low), float(found.high))
        rows.append(Row(model, dataset, pruner, seed, ratio, kept, metric, *numbers, flops, relative))
    return rows


def _values(group: Sequence[Answered]) -> dict[str, list[Any]]:
    return {"values": [one.row.score for one in group], "clusters": [image_key(one.row.uid) for one in group]}
