"""How many tokens each question gets, where a pruner decides that question by question."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tprl.evaluation.results import SampleRow, ratio_label
from tprl.report import figures
from tprl.report.page import plot, section

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Spread:
    """Tokens kept for the questions of one group: mean, and the quantiles of `QUANTILES`."""

    pruner: str
    keep_ratio: float | None
    group: str
    questions: int
    mean: float
    quantiles: tuple[float, ...]


def spreads(rows: Sequence[SampleRow]) -> list[Spread]:
    """Of every pruner `<name>_adaptive` or `<name>_keyword`: by family, and by
    whether `<name>` of the same seed is right at the smallest
    keep ratio that was evaluated ("easy", "hard").
    """
    cells: dict[tuple[str, float | None], list[SampleRow]] = defaultdict(list)
    for row in rows:
        cells[row.pruner, row.keep_ratio].append(row)
    out = []
    for (pruner, ratio), questions in cells.items():
        exact = pruner.removesuffix("_adaptive").removesuffix("_keyword")
        smallest = min((r for name, r in cells if name == exact and r is not None), default=None)
        if exact == pruner or smallest is None:
            continue
        right = {(row.uid, row.seed): row.score > 0.5 for row in cells[exact, smallest]}
        groups: dict[str, list[int | float]] = defaultdict(list)
        for row in questions:
            groups[row.family].append(row.kept_tokens)
            if (row.uid, row.seed) in right:
                groups["easy" if right[row.uid, row.seed] else "hard"].append(row.kept_tokens)
        out += [_spread(pruner, ratio, group, counts) for group, counts in groups.items()]
    return out


def _spread(pruner: str, ratio: float | None, group: str, counts: Sequence[int | float]) -> Spread:
    quantiles = tuple(float(value) for value in np.quantile(counts, QUANTILES))
    return Spread(pruner, ratio, group, len(counts), float(np.mean(counts)), quantiles)


def spread_section(found: Sequence[Spread], known: Sequence[str]) -> str:
    """One plot per pruner: a panel per mean keep ratio, a box per group."""
    if not found:
        return ""
    parts = []
    for pruner in dict.fromkeys(one.pruner for one in found):
        panels: dict[str, list[Spread]] = defaultdict(list)
        for one in sorted(
            (o for o in found if o.pruner == pruner), key=lambda o: (o.group in ("easy", "hard"), o.group)
        ):
            panels[f"mean {ratio_label(one.keep_ratio)}"].append(one)
        boxes = {
            title: [(f"{one.group} ({one.mean:.0f})", one.quantiles) for one in group]
            for title, group in sorted(panels.items(), key=lambda item: -(item[1][0].keep_ratio or 0))
        }
        note = (
            f"{pruner}: tokens kept per question by family (in brackets the mean); boxes span the middle half, "
            "lines the middle 80 %. Easy questions are those answered right with the fewest tokens."
        )
        parts.append(plot(lambda narrow, boxes=boxes, pruner=pruner: figures.boxes(boxes, known, pruner, narrow), note))
    return section("How many tokens each question gets", *parts)
