"""One table of several evaluations of the same questions: python experiments/merge.py OUT RUN
RUN...

OUT gets every file of a study (results.csv, intervals.csv, paired.json, spreads.json, scores.npz,
pareto.svg) and equal_flops.md. An arm that several runs hold is taken from the first; its scores
must be the same in all. RUN@1 counts the pruners of an evaluation as those of training seed 1, for
pruners that take a trained one by `pruner.pretrained`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from tprl.evaluation.results import FULL, grid
from tprl.evaluation.scores import ScoreTable, joined, read_scores
from tprl.report.study import SCORES, write_all


def main(out: Path, *runs: str) -> None:
    table = joined([scores(run) for run in runs])
    numbers = write_all(out, table, table.rows())
    (out / "equal_flops.md").write_text(equal_flops(grid(numbers.rows), table.main))


def scores(run: str) -> ScoreTable:
    """Those of an evaluation, RUN or RUN@SEED."""
    folder, _, seed = run.partition("@")
    table = read_scores(Path(folder) / SCORES)
    if not seed:
        return table
    arms = [(name, 0 if name == FULL else int(seed), ratio) for name, _, ratio in table.arms]
    return replace(table, arms=tuple(arms))


def equal_flops(cells: dict, pruner: str) -> str:
    """Accuracy (%) of every arm at the FLOPs of `pruner` at each keep ratio, linear between the
    arm's own points."""
    ours = sorted((cell.flops_ratio, ratio, cell.value) for ratio, cell in cells[pruner].items())[
        ::-1
    ]
    heads = " | ".join(f"{100 * flops:.1f} % ({ratio:.3f})" for flops, ratio, _ in ours)
    lines = [f"| at the FLOPs of `{pruner}` | {heads} |", "|---" * (len(ours) + 1) + "|"]
    for name, row in cells.items():
        at = sorted((cell.flops_ratio, cell.value) for cell in row.values())
        if len(at) > 1:
            x, y = zip(*at, strict=True)
            levels = (np.interp(flops, x, y, left=np.nan, right=np.nan) for flops, _, _ in ours)
            lines.append(
                f"| `{name}` | "
                f"{' | '.join('' if np.isnan(v) else f'{100 * v:.1f}' for v in levels)} |"
            )
    return "\n".join(lines) + "\n"


main(Path(sys.argv[1]), *sys.argv[2:])
