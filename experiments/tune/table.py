"""The accuracies of every arm, minutes and memory, from the evaluations of run.sh.

python experiments/tune/table.py runs/study/tune results.csv
"""

import csv
import json
import sys
from pathlib import Path

from tprl.evaluation.results import FULL, read_results

COLUMNS = ("arm", "seed", "tokens", "keep_ratio", "accuracy", "low", "high", "train_seconds")


def rows_of(folder: Path) -> list[dict]:
    """Of one evaluation."""
    arm, _, seed = folder.name.removeprefix("eval_").rpartition("_")
    done = folder.parent / f"{arm}_{seed}" / "done.json"
    seconds = round(json.loads(done.read_text())["seconds"]) if done.is_file() else ""
    rows = []
    for row in read_results(folder / "results.csv"):
        if row.metric == "accuracy":
            ratio = 1.0 if row.pruner == FULL else row.keep_ratio
            numbers = (row.value, row.ci_low, row.ci_high)
            accuracy, low, high = (f"{100 * number:.1f}" for number in numbers)
            name = (arm or "frozen", seed if arm else "", f"{row.kept_tokens:.0f}", ratio)
            values = (*name, accuracy, low, high, seconds)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main(runs: Path, results: Path) -> None:
    """Write the table, and print it."""
    table = [row for folder in sorted(runs.glob("eval_*")) for row in rows_of(folder)]
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
