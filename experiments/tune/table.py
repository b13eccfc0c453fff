"""One study of the evaluations of run.sh, with the score of every question; prints minutes of
training.

python experiments/tune/table.py runs/study/tune experiments/tune

An evaluation `eval_<arm>_<seed>` is of one language model. Arms are named by it: `mixed`
where TPRL prunes, `mixed_attention_words` where that rule does. All tokens are keep ratio 1.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from tprl.evaluation.results import FULL
from tprl.evaluation.scores import ScoreTable, joined, read_scores
from tprl.report.study import SCORES, write_all

FROZEN = "frozen"


def scores(folder: Path) -> ScoreTable:
    """Of one evaluation, its arms named by the language model."""
    arm, seed, *_ = [*folder.name.removeprefix("eval_").split("_"), "0"]
    table = read_scores(folder / SCORES)
    names = {"tprl": arm, FULL: arm}
    arms, rows = [], []
    for row, (pruner, _, ratio) in enumerate(table.arms):
        arms.append((names.get(pruner, f"{arm}_{pruner}"), int(seed), ratio or 1.0))
        rows.append(row)
        if arm == FROZEN and pruner == FULL:  # what all shares of an accuracy are of
            arms.append((FULL, 0, ratio))
            rows.append(row)
    at = np.array(rows)
    fields = {name: getattr(table, name)[at] for name in ("score", "iou", "kept", "cost")}
    return replace(table, main="mixed", arms=tuple(arms), **fields)


def main(runs: Path, out: Path) -> None:
    folders = sorted(runs.glob("eval_*"), key=lambda folder: FROZEN not in folder.name)
    table = joined([scores(folder) for folder in folders])
    write_all(out, table, table.rows())
    for done in sorted(runs.glob("*/done.json")):
        if not done.parent.name.startswith("eval_"):
            print(f"{done.parent.name}: {json.loads(done.read_text())['seconds'] / 60:.0f} minutes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
