"""One table of several evaluations of the same questions: python experiments/merge.py OUT RUN RUN...

OUT gets results.csv, paired.json (the first run's main arm, and its adaptive mode, minus the others) and pareto.svg. An arm that
several runs hold is taken from the first; its scores must be the same in all.
"""

import json
import sys
from pathlib import Path

from tprl.evaluation import figures
from tprl.evaluation.analysis import paired
from tprl.evaluation.evaluator import Answered
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
    answered = [Answered(sample, None, 0.0, 0.0) for sample in samples.values()]
    first = next(iter(rows.values())).pruner
    differences = [vars(d) for name in (first, f"{first}_adaptive") for d in paired(answered, name)]
    write_results(out / "results.csv", list(rows.values()))
    (out / "paired.json").write_text(json.dumps(differences, indent=1) + "\n")
    cells = grid(rows.values())
    known = sorted(cells)
    (out / "pareto.svg").write_text(figures.standalone(figures.pareto(cells, known), known))


main(*map(Path, sys.argv[1:]))
