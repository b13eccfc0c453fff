"""What mode=turns leaves behind: `turns.csv`, every question in `turns.jsonl`, and a table per
length and kind of equal tokens."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from tprl.evaluation.results import write_atomic
from tprl.evaluation.turns import READ, Turn, TurnRow, TurnSetting

TITLES = {
    READ: "every turn reads as many visual tokens",
    "computed": "every conversation computes as many visual tokens",
}


def write_turns(rows: Sequence[TurnRow], main: str, directory: Path) -> None:
    """Write the files and print the table."""
    out = io.StringIO()
    columns = [field.name for field in fields(TurnRow)]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # Six digits are more than an interval over images is worth.
        table = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()}
        writer.writerow(table)
    write_atomic(directory / "turns.csv", out.getvalue())
    text = turns_table(rows, main)
    write_atomic(directory / "turns.md", text)
    print(text, end="")


def write_questions(turns: Mapping[TurnSetting, Sequence[Turn]], directory: Path) -> None:
    """Every answered question: what `turns.csv` averages, so that any interval can be computed
    again."""
    lines = [
        json.dumps(setting._asdict() | turn._asdict()) + "\n"
        for setting, answered in turns.items()
        for turn in answered
    ]
    write_atomic(directory / "turns.jsonl", "".join(lines))


def turns_table(rows: Sequence[TurnRow], main: str) -> str:
    """Markdown: a table per budget, with a line per arm."""

    def budget(row: TurnRow) -> tuple[int, str, float]:
        return row.turns, row.equal, row.keep_ratio

    parts = []
    ordered = sorted(rows, key=lambda row: (row.turns, row.equal != READ, -row.keep_ratio))
    for (turns, equal, keep_ratio), group in groupby(ordered, budget):
        lines = list(group)
        head = (
            f"{turns} questions, keep_ratio {keep_ratio:.4g}: {TITLES[equal]} "
            f"({lines[0].images} images)"
        )
        columns = ["arm", "accuracy", *(f"turn {number + 1}" for number in range(turns))]
        columns += ["read a turn", "computed", "cached", f"{main} minus it"]
        parts += [head, "", _line(columns), _line(["---"] * len(columns))]
        lines.sort(key=lambda row: row.arm != main)  # the main arm first, the others as they are
        for name in dict.fromkeys((row.arm, row.seed) for row in lines):
            parts.append(_arm([row for row in lines if (row.arm, row.seed) == name]))
        parts.append("")
    towers = max(row.tower_runs for row in rows)
    parts.append(
        f"The vision tower saw {towers:.3g} images per conversation. Accuracy in %, with 95 % "
        "intervals over images; tokens computed and cached are per conversation."
    )
    return "\n".join(parts) + "\n"


def _arm(rows: Sequence[TurnRow]) -> str:
    whole = next(row for row in rows if row.turn == 0)
    cells = [whole.arm, _percent(whole.accuracy, whole.low, whole.high)]
    cells += [f"{100 * row.accuracy:.1f}" for row in rows if row.turn]
    cells += [f"{whole.read / whole.turns:.1f}", f"{whole.computed:.1f}", f"{whole.cached:.1f}"]
    # The main arm itself has nothing to be compared with.
    apart = whole.difference, whole.difference_low, whole.difference_high
    known = apart[0] == apart[0]
    cells.append(_percent(*apart, sign="+") if known else "")
    return _line(cells)


def _percent(value: float, low: float, high: float, sign: str = "") -> str:
    numbers = (format(100 * x, f"{sign}.1f") for x in (value, low, high))
    middle, lower, upper = numbers
    return f"{middle} [{lower}, {upper}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
