"""One table of several evaluations of the same questions: python experiments/merge.py OUT RUN RUN...

OUT gets results.csv, paired.json (the first run's main arm, and its adaptive mode, minus the others), equal_flops.md and pareto.svg. An arm that
several runs hold is taken from the first; its scores must be the same in all.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tprl.evaluation import figures
from tprl.evaluation.analysis import paired
from tprl.evaluation.results import grid, read_results, read_samples, write_results


def main(out: Path, *runs: Path) -> None:
    rows, samples = {}, {}
    for run in runs:
        for row in read_results(run / "results.csv"):
            key = (row.pruner, row.seed, row.keep_ratio, row.metric)
            before = rows.setdefault(key, row)
            assert (before.value, before.kept_tokens) == (row.value, row.kept_tokens), f"{key} differs in {run}"
        for sample in read_samples(run / "samples.jsonl"):
            samples.setdefault((sample.pruner, sample.seed, sample.keep_ratio, sample.uid), sample)
    first = next(iter(rows.values())).pruner
    differences = [vars(d) for name in (first, f"{first}_adaptive") for d in paired(list(samples.values()), name)]
    write_results(out / "results.csv", list(rows.values()))
    (out / "paired.json").write_text(json.dumps(differences, indent=1) + "\n")
    cells = grid(rows.values())
    known = sorted(cells)
    (out / "pareto.svg").write_text(figures.standalone(figures.pareto(cells, known), known))
    (out / "equal_flops.md").write_text(equal_flops(cells, first))


def equal_flops(cells: dict, pruner: str) -> str:
    """Accuracy (%) of every arm at the FLOPs of `pruner` at each keep ratio, linear between the arm's own points."""
    ours = sorted((cell.flops_ratio, ratio, cell.value) for ratio, cell in cells[pruner].items())[::-1]
    heads = " | ".join(f"{100 * flops:.1f} % ({ratio:.3f})" for flops, ratio, _ in ours)
    lines = [f"| at the FLOPs of `{pruner}` | {heads} |", "|---" * (len(ours) + 1) + "|"]
    for name, own in cells.items():
        at = sorted((cell.flops_ratio, cell.value) for cell in own.values())
        if len(at) > 1:
            x, y = zip(*at, strict=True)
            found = (np.interp(flops, x, y, left=np.nan, right=np.nan) for flops, _, _ in ours)
            lines.append(f"| `{name}` | {' | '.join('' if np.isnan(v) else f'{100 * v:.1f}' for v in found)} |")
    return "\n".join(lines) + "\n"


main(*map(Path, sys.argv[1:]))
