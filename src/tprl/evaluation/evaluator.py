"""Run pruners over a dataset: every batch is encoded once, every pruner and keep ratio answers from
it."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tprl import cost
from tprl.budget import need_ratio
from tprl.data.base import BaseDataset
from tprl.data.taking import nothing_left
from tprl.errors import UserError
from tprl.evaluation.official import OfficialScore, Published
from tprl.evaluation.results import Row, SampleRow
from tprl.evaluation.statistics import Interval, image_key, interval
from tprl.lvlm.layer_drop import LayerPruner
from tprl.pruners.learned import check_family
from tprl.runtime import distributed
from tprl.runtime.store import Record
from tprl.scoring.ahead import Ready, ahead, in_parts, numbered_ready
from tprl.scoring.at_ratio import scored_at
from tprl.scoring.flops import question_flops
from tprl.scoring.lengths import check_lengths
from tprl.scoring.scorer import Scorer
from tprl.types import Encoded, Pruner, Sample

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
    """A SampleRow, what the question cost, and what the official numbers are made of (see
    `OfficialScore`)."""

    row: SampleRow
    iou: float | None
    flops: float
    full_flops: float
    facts: tuple[float, ...] | None = None


def evaluate(
    scorer: Scorer,
    dataset: BaseDataset,
    entries: Sequence[Entry],
    batch_size: int = 100,
    limit: int | None = None,
    tick: Tick = lambda done, total: None,
    record: Record | None = None,
) -> list[Answered]:
    """Answer the first `limit` questions once per entry and keep ratio. `tick(done, total)` follows
    each batch.

    Each rank answers its share of them, and all return the answers to all of them, question by
    question. `record` remembers the answers to every batch, and what it has is not answered again:
    give one that belongs to this evaluation alone.

    Raises:
        UserError: no question is left, since every row is damaged.
    """
    entries = feasible(entries, scorer.lvlm)
    for entry in entries:
        check_family(entry.pruner, scorer.lvlm)
    # What any of the pruners reads is encoded once for all.
    extras = frozenset().union(*(entry.pruner.extras for entry in entries))
    questions = range(min(limit or len(dataset), len(dataset)))
    indices = questions[distributed.rank() :: distributed.count()]
    answered: list[Answered] = []
    done, total, place = 0, len(indices), dict[str, int]()
    pairs = [(entry, ratio) for entry in entries for ratio in entry.keep_ratios]

    def work(batch: Ready) -> list[Answered]:
        encoded = batch.encode(scorer.lvlm, extras)
        parts = (_answer(scorer, batch.samples, encoded, *pair) for pair in pairs)
        return list(chain.from_iterable(parts))

    known = {} if record is None else record.known
    stream = numbered_ready(dataset, indices, batch_size, lambda numbers: _key(numbers) in known)
    for batch in ahead(scorer.lvlm, stream):
        samples, key = batch.samples, _key(batch.numbers)
        uids = (sample.uid for sample in samples)
        _add_places(dataset, place, zip(uids, batch.numbers, strict=True))
        if batch.known:
            answered += [_answered(**item) for item in known[key]]
        else:
            parts = in_parts(work, batch, scorer.lvlm.name)
            fresh = list(chain.from_iterable(parts))
            answered += fresh
            if record is not None:
                record.add({key: [asdict(item) for item in fresh]})
        done += len(samples)
        tick(done, total)
    if done < total:  # damaged rows
        tick(total, total)
    # All ranks get here, or the gathering would wait for ever.
    everything = _of_all_ranks(dataset, answered, place)
    if not everything:
        asked = min(limit or len(dataset), len(dataset))
        raise nothing_left(dataset, asked, "to evaluate", _damage(dataset))
    return everything


def _key(numbers: Sequence[int]) -> str:
    """A batch goes by its first and last row, which a restart draws alike."""
    return f"{numbers[0]}-{numbers[-1]}"


def _answered(
    row: Mapping[str, Any], facts: Sequence[float] | None, **numbers: float | None
) -> Answered:
    """As a record has it in plain values."""
    measured = None if facts is None else tuple(facts)
    return Answered(SampleRow(**row), facts=measured, **numbers)  # type: ignore[arg-type]


def _of_all_ranks(
    dataset: BaseDataset, answered: list[Answered], place: Mapping[str, int]
) -> list[Answered]:
    """The answers that all ranks gave, sorted by the place that the question of a uid has in the
    dataset."""
    everywhere = dict[str, int]()
    for item in distributed.gathered(place):
        _add_places(dataset, everywhere, item.items())
    whole = list(chain.from_iterable(distributed.gathered(answered)))
    return sorted(whole, key=lambda item: everywhere[item.row.uid])


def _add_places(
    dataset: BaseDataset, place: dict[str, int], more: Iterable[tuple[str, int]]
) -> None:
    """Scores are kept by uid: two questions of one uid would be counted as one."""
    for uid, index in more:
        if uid in place:
            raise UserError(
                f"{dataset.name} has two questions of uid {uid}: give every row an id of its own."
            )
        place[uid] = index


def check_cost(lvlm: Any) -> None:
    """Refuse an LVLM whose FLOPs are unknown before anything is computed.

    Raises:
        UserError: it has no cost model, or the cost model does not know its config.
    """
    if not hasattr(lvlm, "shape"):
        raise UserError(
            f"{lvlm.name} has no cost model (tprl.cost), so it can be trained on but not evaluated."
        )


def check_answers(lvlm: Any, dataset: BaseDataset, limit: int | None = None) -> None:
    """Refuse a dataset without answers, or whose answers this LVLM cannot write.

    Raises:
        UserError: no labels, or `check_lengths`'s reason.
    """
    if not dataset.labelled:
        raise UserError(
            f"dataset {dataset.name} has no answers (dataset.labelled=false), "
            "so it cannot be scored: use one with answers."
        )
    check_lengths(lvlm, dataset, limit)


def about(dataset: BaseDataset, answered: Sequence[Answered]) -> dict[str, Any]:
    """What the numbers are about: where the questions are from, how many were answered, rows that
    were passed over by reason, what was changed in others, and the protocol."""
    facts: dict[str, Any] = {"dataset": dataset.name}
    if dataset.source:
        facts["source"] = dataset.source
    facts["questions"] = len({item.row.uid for item in answered})
    # Each rank has seen its own rows: counts are those of all of them.
    damage = _damage(dataset)
    facts["damaged rows"] = damage.total()
    facts |= {f"damaged: {reason}": count for reason, count in sorted(damage.items())}
    notes = sum(map(Counter, distributed.gathered(dict(dataset.notes))), Counter[str]())
    facts |= dict(sorted(notes.items()))
    if isinstance(dataset, Published):
        facts["protocol"] = dataset.protocol
    return facts


def _damage(dataset: BaseDataset) -> Counter[str]:
    """Rows that all ranks passed over, by reason; each rank has only seen that its own were not too
    many."""
    damage = sum(map(Counter, distributed.gathered(dict(dataset.damage))), Counter[str]())
    # Together the ranks may have passed over more than one of them was allowed to.
    allowed = dataset.max_bad_rows
    if damage.total() > allowed * len(dataset):
        raise UserError(
            f"{damage.total()} of {len(dataset)} rows of {dataset.name} are "
            f"damaged ({dict(damage)}), more than max_bad_rows={allowed:g} "
            "allows: mend them, or raise dataset.max_bad_rows."
        )
    return damage


def check_entries(entries: Sequence[Entry], lvlm: Any) -> None:
    """Refuse pruners that this LVLM cannot serve at any of their keep ratios before anything is
    answered.

    Raises:
        UserError: a pruner of another family, one that reads what this LVLM does not have, or no
            ratio that is left.
    """
    for entry in entries:
        check_family(entry.pruner, lvlm)
        if hasattr(lvlm, "check_extras"):
            lvlm.check_extras(frozenset(entry.pruner.extras), lvlm.known_extras | {"region"})
        reasons = [_infeasible(entry.pruner, ratio, lvlm) for ratio in entry.keep_ratios]
        if all(reasons):
            raise UserError(f"{entry.name} cannot be evaluated on {lvlm.name}: {reasons[0]}")


def fitting(entries: Sequence[Entry], lvlm: Any) -> list[Entry]:
    """What `check_entries` accepts of a list written for any LVLM; says what is left out."""
    fit = []
    for entry in entries:
        try:
            check_entries([entry], lvlm)
        except UserError as error:
            log.info("%s is left out: %s", entry.name, error)
        else:
            fit.append(entry)
    return fit


def feasible(entries: Sequence[Entry], lvlm: Any) -> list[Entry]:
    """The entries without the keep ratios that a method inside this LVLM's layers or tower cannot
    have; says which they are, and marks methods that read a substitute.

    Raises:
        UserError: the LVLM has no layers that could be reached into.
    """
    reachable = []
    for entry in entries:
        if isinstance(entry.pruner, LayerPruner) and not hasattr(lvlm, "layers"):
            raise UserError(
                f"{entry.name} drops tokens between layers, and {lvlm.name} has none: leave it out."
            )
        ratios = tuple(ratio for ratio in entry.keep_ratios if _possible(entry.pruner, ratio, lvlm))
        if ratios:
            reachable.append(replace(entry, keep_ratios=ratios, name=_named(entry, lvlm)))
    return reachable


def _named(entry: Entry, lvlm: Any) -> str:
    """The entry's name, with a star where its method reads something that stands in for what this
    encoder lacks."""
    instead = {k: v for k, v in lvlm.substitutes.items() if k in entry.pruner.extras}
    for extra, what in instead.items():
        log.info(
            "%s*: %s has no %s of its own; in its place: %s", entry.name, lvlm.name, extra, what
        )
    return f"{entry.name}*" if instead else entry.name


def _possible(pruner: Any, ratio: float | None, lvlm: Any) -> bool:
    reason = _infeasible(pruner, ratio, lvlm)
    if reason:
        log.info("left out: %s", reason)
    return not reason


def _infeasible(pruner: Any, ratio: float | None, lvlm: Any) -> str:
    """Why a method inside this LVLM's layers or tower cannot have a keep ratio; empty where it
    can."""
    try:
        if isinstance(pruner, LayerPruner):
            if not hasattr(lvlm, "layers"):
                return (
                    f"{pruner.name} drops tokens between layers, "
                    f"and {lvlm.name} has none: leave it out."
                )
            if hasattr(lvlm, "check_layers"):
                lvlm.check_layers(pruner.name)
            pruner.stages(need_ratio(pruner.name, ratio), lvlm.layers)
        else:
            pruner.check_reach(ratio, lvlm.shape)
    except UserError as error:
        return str(error)
    return ""


def _answer(
    scorer: Scorer, samples: Sequence[Sample], encoded: Encoded, entry: Entry, ratio: float | None
) -> list[Answered]:
    pruner = entry.pruner
    scored, selection, plan = scored_at(scorer, samples, encoded, pruner, ratio)
    # Where tokens drop between layers, a question's count is the mean over layers.
    kept = selection.per_image(encoded)
    counts = [cost.layer_mean(plan.counts(*images)) if plan else sum(images) for images in kept]
    scores = scored.score.tolist()
    out = []
    for i, sample in enumerate(samples):
        text = scored.predictions[i]
        # A teacher-forced score has no text, and so no box.
        overlap = None
        if sample.box is not None and text is not None:
            overlap = scorer.dataset.iou(sample, text)  # type: ignore[attr-defined]
        row = SampleRow(
            sample.uid, sample.family, entry.name, entry.seed, ratio, text, scores[i], counts[i]
        )
        facts = None
        if isinstance(scorer.dataset, Published):
            # A teacher-forced score says only whether the answer is the reference; any other answer
            # has the same facts.
            forced = sample.answers[0] if scores[i] else ""
            facts = tuple(scorer.dataset.facts(sample, forced if text is None else text))
        flops = question_flops(scorer, encoded, i, sample, pruner, kept[i], plan)
        out.append(Answered(row, overlap, *flops, facts))
    return out


def summarize(answered: Sequence[Answered], model: str, dataset: BaseDataset) -> list[Row]:
    """Tidy rows: accuracy (the mean score), accuracy per family, mean IoU, and the numbers that the
    benchmark publishes as <dataset>/<name>, each with a 95 % bootstrap interval over images."""
    # A row per arm and metric; seeds are averaged later, where tables are made.
    groups: dict[tuple[str, int, float | None], list[Answered]] = defaultdict(list)
    for item in answered:
        groups[item.row.pruner, item.row.seed, item.row.keep_ratio].append(item)
    return list(
        chain.from_iterable(_rows(model, dataset, key, group) for key, group in groups.items())
    )


def _rows(
    model: str, dataset: BaseDataset, key: tuple[str, int, float | None], group: Sequence[Answered]
) -> list[Row]:
    pruner, seed, ratio = key
    # Means over questions; FLOPs are compared as means too, not as a mean of ratios.
    kept = float(np.mean([item.row.kept_tokens for item in group]))
    flops = float(np.mean([item.flops for item in group]))
    relative = flops / float(np.mean([item.full_flops for item in group]))
    names = [(item.row.uid, item.row.family) for item in group]
    ious = np.array([np.nan if item.iou is None else item.iou for item in group])
    metrics = metrics_of(names, np.array([item.row.score for item in group], dtype=float), ious)
    if isinstance(dataset, Published):
        for name, value in _official(dataset, group).items():
            metrics[f"{dataset.name}/{name}"] = value
    place = (model, dataset.name, pruner, seed, ratio, kept)
    rows = []
    for metric, item in metrics.items():
        rows.append(Row(*place, metric, item.mean, item.low, item.high, flops, relative))
    return rows


def _official(dataset: Published, group: Sequence[Answered]) -> dict[str, Interval]:
    metric = OfficialScore(dataset)
    facts = [item.facts for item in group if item.facts is not None]
    metric.update([item.row.uid for item in group], facts)
    return metric.intervals()


def metrics_of(
    questions: Sequence[tuple[str, str]], scores: NDArray[np.float64], ious: NDArray[np.float64]
) -> dict[str, Interval]:
    """Accuracy (the mean score), that of each family, and the mean IoU where there are boxes, with
    their intervals.

    Args:
        questions: (uid, family) of each.
        scores: in [0, 1].
        ious: nan where no box was asked for.
    """
    families = np.array([family for _, family in questions], dtype=np.str_)
    images = np.array([image_key(uid) for uid, _ in questions], dtype=np.str_)
    values = {"accuracy": (scores, np.ones(len(scores), dtype=bool))}
    for family in dict.fromkeys(family for _, family in questions if family):
        values[f"accuracy/{family}"] = (scores, families == family)
    if not np.isnan(ious).all():
        values["mean_iou"] = (ious, ~np.isnan(ious))
    return {
        name: interval(x[present], images[present].tolist())
        for name, (x, present) in values.items()
    }
