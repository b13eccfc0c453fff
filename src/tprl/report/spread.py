"""How many tokens each question gets, where a pruner decides that question by question."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tprl.evaluation.results import SampleRow, ratio_label
from tprl.report import figures
from tprl.report.page import Section

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class TokenSpread:
    """Tokens kept for the questions of one group: mean, and the quantiles of `QUANTILES`."""

    pruner: str
    keep_ratio: float | None
    group: str
    questions: int
    mean: float
    quantiles: tuple[float, ...]


def token_spreads(rows: Sequence[SampleRow]) -> list[TokenSpread]:
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


def _spread(
    pruner: str, ratio: float | None, group: str, counts: Sequence[int | float]
) -> TokenSpread:
    quantiles = tuple(float(value) for value in np.quantile(counts, QUANTILES))
    return TokenSpread(pruner, ratio, group, len(counts), float(np.mean(counts)), quantiles)


def spread_section(groups: Sequence[TokenSpread], known: Sequence[str]) -> Section | None:
    """One figure per pruner: a panel per mean keep ratio, a box per group."""
    if not groups:
        return None
    drawn = []
    for pruner in dict.fromkeys(group.pruner for group in groups):
        panels: dict[float | None, list[tuple[str, Sequence[float]]]] = defaultdict(list)
        # Families by name, then easy and hard ones.
        for group in sorted(
            groups, key=lambda group: (group.group in ("easy", "hard"), group.group)
        ):
            if group.pruner == pruner:
                panels[group.keep_ratio].append(
                    (f"{group.group} ({group.mean:.0f})", group.quantiles)
                )
        ordered = sorted(panels, key=lambda ratio: -(ratio or 0))
        boxes = {f"mean {ratio_label(ratio)}": panels[ratio] for ratio in ordered}
        note = (
            f"{pruner}: tokens kept per question by family (in brackets the "
            "mean); boxes span the middle half, lines the middle 80 %. Easy "
            "questions are those answered right with the fewest tokens."
        )
        drawn.append({"drawings": figures.boxes(boxes, known, pruner), "note": note})
    return Section(
        "How many tokens each question gets", "plots.html", {"figures": drawn, "fold": None}
    )
