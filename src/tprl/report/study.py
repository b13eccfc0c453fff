"""The numbers of an evaluation, from the scores of its questions: as files, and once more from
`scores.npz`."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tprl.evaluation import analysis
from tprl.evaluation.analysis import Paired
from tprl.evaluation.results import (
    Row,
    SampleRow,
    grid,
    print_table,
    read_results,
    write_atomic,
    write_results,
)
from tprl.evaluation.scores import ScoreTable, read_scores, write_scores
from tprl.report import figures
from tprl.report.spread import TokenSpread, token_spreads

log = logging.getLogger(__name__)
SCORES, COLUMNS = (
    "scores.npz",
    ("pruner", "keep_ratio", "metric", "value", "low", "high", "seeds", "interval"),
)


@dataclass(frozen=True)
class Numbers:
    """What reports show: rows with the intervals of tables, differences of the main arm, of it and
    its adaptive mode, and tokens per question."""

    rows: list[Row]
    differences: list[Paired]
    all_differences: list[Paired]
    token_spreads: list[TokenSpread]


def write_numbers(
    directory: Path, rows: Sequence[Row], samples: Sequence[SampleRow], main: str
) -> Numbers:
    """Write `results.csv`, `intervals.csv`, `paired.json` and `spreads.json`."""
    # Tables show intervals over images and seeds; results.csv keeps the rows of each seed.
    opened = analysis.with_open_sides(rows, samples)
    differences = analysis.paired(samples, main)
    # The adaptive mode is compared too, but headlines speak of the main arm alone.
    everything = differences + analysis.paired(samples, f"{main}_adaptive")
    allocations = token_spreads(samples)
    write_results(directory / "results.csv", rows)
    write_atomic(directory / "intervals.csv", intervals(opened))
    write_atomic(
        directory / "paired.json", json.dumps([vars(d) for d in everything], indent=1) + "\n"
    )
    write_atomic(
        directory / "spreads.json", json.dumps([vars(s) for s in allocations], indent=1) + "\n"
    )
    return Numbers(opened, differences, everything, allocations)


def intervals(rows: Sequence[Row]) -> str:
    """`intervals.csv`: every cell of the tables, seeds together, and what its interval is over."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for metric in dict.fromkeys(row.metric for row in rows):
        for pruner, cells in grid(rows, metric).items():
            for ratio, cell in cells.items():
                over = "images and seeds" if cell.seeds > 1 else "images"
                # Only accuracies get the interval over seeds (`with_open_sides`); other metrics
                # average the bounds.
                if cell.seeds > 1 and not metric.startswith("accuracy"):
                    over = "images, mean of the seeds' bounds"
                place = (pruner, "" if ratio is None else ratio, metric)
                writer.writerow([*place, cell.value, cell.low, cell.high, cell.seeds, over])
    return out.getvalue()


def recompute(study: Path, directory: Path) -> list[Row]:
    """Every number of a study from its `scores.npz`, into `directory`; prints the table, and
    whether the study's own files say the same. What a benchmark publishes is taken over from the
    study's `results.csv`.

    Raises:
        UserError: no such file, or a damaged one.
    """
    table = read_scores(study / SCORES)
    # Scores per question suffice for all metrics except the published, which need the answers.
    rows = table.rows()
    known = {row.metric for row in rows}
    if (study / "results.csv").is_file():
        rows += [row for row in read_results(study / "results.csv") if row.metric not in known]
    numbers = write_all(directory, table, rows)
    print_table(numbers.rows)
    # Byte by byte: a study is reproduced only if its files are identical.
    for name in ("results.csv", "intervals.csv", "paired.json", "spreads.json"):
        before = study / name
        if before.is_file():
            same = before.read_bytes() == (directory / name).read_bytes()
            print(f"{name}: {'equal to' if same else 'differs from'} {before}")
    return rows


def write_all(directory: Path, table: ScoreTable, rows: Sequence[Row]) -> Numbers:
    """All files of a study but its README: those of `write_numbers`, `scores.npz` and
    `pareto.svg`."""
    numbers = write_numbers(directory, rows, table.samples(), table.main)
    write_scores(directory / SCORES, table)
    cells = grid(numbers.rows)
    write_atomic(
        directory / "pareto.svg",
        figures.standalone(figures.pareto(cells, sorted(cells)), sorted(cells)),
    )
    return numbers
