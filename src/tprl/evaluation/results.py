"""The files an evaluation leaves behind, and the table it prints."""

import csv
import functools
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tprl.cost import CONVENTION
from tprl.errors import UserError
from tprl.runtime.files import read_sealed, write_atomically, write_sealed

FULL = "keep_all"  # the pruner whose row is the reference of all others
# not competitors: one does not prune, two know the answer's region
BOUNDS = frozenset({FULL, "oracle", "oracle_dpp"})


@dataclass(frozen=True)
class Row:
    """One number of `results.csv`.

    `keep_ratio` is None where the pruner decides how many tokens live; `kept_tokens` and `flops`
    are means per question; `flops_ratio` is relative to the same model with all tokens; bounds are
    nan where unknown. `metric` is `accuracy` (overall), `accuracy/<family>`, `mean_iou`, ...
    """

    model: str
    dataset: str
    pruner: str
    seed: int
    keep_ratio: float | None
    kept_tokens: float
    metric: str
    value: float
    ci_low: float
    ci_high: float
    flops: float
    flops_ratio: float


@dataclass(frozen=True)
class SampleRow:
    """One answered question of `samples.jsonl`; `prediction` is None where a teacher-forced forward
    decided."""

    uid: str
    family: str
    pruner: str
    seed: int
    keep_ratio: float | None
    prediction: str | None
    score: float
    kept_tokens: int | float  # a mean over layers where a method drops tokens between them


@dataclass(frozen=True)
class Cell:
    """What a table shows of one pruner at one keep ratio: the mean over seeds of every number."""

    value: float
    low: float
    high: float
    kept_tokens: float
    flops_ratio: float
    seeds: int


COLUMNS = tuple(field.name for field in fields(Row))
_TEXT = ("model", "dataset", "pruner", "metric")


def write_atomic(
    path: Path, text: str, write: Callable[[Path, str], None] = write_atomically
) -> None:
    """`files.write_atomically` (or `write`), in a folder that is made if need be.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text)
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror}): choose "
            "a writable folder with hydra.run.dir=<folder>."
        ) from error


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Write `results.csv`: tidy, one number per line, floats at full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomic(path, out.getvalue(), write_sealed)


def read_results(path: Path) -> list[Row]:
    """The rows that `write_results` wrote, equal to the originals.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path):
        lines = csv.DictReader(io.StringIO(read_sealed(path).decode(), newline=""))
        return [_row(line) for line in lines]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damage as one sentence."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again, or evaluate anew.") from error


def _row(line: dict[str, str]) -> Row:
    # The ratio is empty where a pruner chose by itself; all other numbers are plain floats.
    return Row(
        model=line["model"],
        dataset=line["dataset"],
        pruner=line["pruner"],
        seed=int(line["seed"]),
        keep_ratio=float(line["keep_ratio"]) if line["keep_ratio"] else None,
        kept_tokens=float(line["kept_tokens"]),
        metric=line["metric"],
        value=float(line["value"]),
        ci_low=float(line["ci_low"]),
        ci_high=float(line["ci_high"]),
        flops=float(line["flops"]),
        flops_ratio=float(line["flops_ratio"]),
    )


def write_samples(path: Path, samples: Iterable[SampleRow]) -> None:
    """Write `samples.jsonl`, one answered question per line."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(path, "".join(lines), write_sealed)


def read_samples(path: Path) -> list[SampleRow]:
    """The samples that `write_samples` wrote.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path):
        lines = read_sealed(path).decode().rstrip("\n").split("\n")
        return [SampleRow(**json.loads(line)) for line in lines if line]


def read_facts(path: Path) -> dict[str, Any]:
    """`evaluation.json`: what an evaluation is about.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path):
        return dict(json.loads(read_sealed(path)))


def grid(rows: Iterable[Row], metric: str = "accuracy") -> dict[str, dict[float | None, Cell]]:
    """pruner -> keep ratio -> cell. Several seeds are averaged, bounds too: the interval stays that
    of one seed.

    Raises:
        ValueError: rows of several models or datasets, which would be averaged into nonsense.
    """
    # Rows that differ in their seed alone share a cell.
    groups: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
    sources: set[tuple[str, str]] = set()
    for row in rows:
        sources.add((row.model, row.dataset))
        if row.metric == metric:
            groups[row.pruner, row.keep_ratio].append(row)
    if len(sources) > 1:
        raise ValueError(
            f"one table cannot show {sorted(sources)}: pass the rows of one model on one dataset."
        )
    cells: dict[str, dict[float | None, Cell]] = {}
    for (pruner, ratio), same in groups.items():
        cells.setdefault(pruner, {})[ratio] = Cell(
            _mean([row.value for row in same]),
            _mean([row.ci_low for row in same]),
            _mean([row.ci_high for row in same]),
            kept_tokens=_mean([row.kept_tokens for row in same]),
            flops_ratio=_mean([row.flops_ratio for row in same]),
            seeds=len(same),
        )
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ratios(cells: dict[str, dict[float | None, Cell]]) -> list[float | None]:
    """Columns of a table: keep ratios from large to small, then the pruner's own choice if anybody
    made one."""
    seen = set(chain.from_iterable(cells.values()))
    known = sorted((ratio for ratio in seen if ratio is not None), reverse=True)
    return [*known, None] if None in seen else list(known)


def pruner_order(cells: dict[str, dict[float | None, Cell]]) -> list[str]:
    """Rows of a table: all tokens first, then best first at the smallest shared ratio; names break
    ties."""
    # The smallest ratio separates pruners best; names without a number there come last.
    last = next((r for r in reversed(ratios(cells)) if r is not None), None)

    def key(name: str) -> tuple[bool, float, str]:
        cell = cells[name].get(last)
        return name != FULL, -cell.value if cell else math.inf, name

    return sorted(cells, key=key)


def ratio_label(ratio: float | None) -> str:
    """`33.3 %`, or `own choice` where the pruner decided."""
    return "own choice" if ratio is None else f"{100 * ratio:.3g} %"


def span(values: Sequence[float], form: str) -> str:
    """`low-high` of some numbers, or the one number that they print as."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def _cell_text(cell: Cell | None, best: bool, scale: float) -> Text:
    if cell is None:
        return Text("")
    text = Text(f"{scale * cell.value:.1f}", style="bold" if best else "")
    if not math.isnan(cell.low):
        text.append(f" [{scale * cell.low:.1f}, {scale * cell.high:.1f}]", style="not bold dim")
    return text


def accuracy_table(
    rows: Sequence[Row],
    metric: str = "accuracy",
    plain: bool = False,
    columns: Sequence[float | None] | None = None,
) -> Table:
    """A metric with 95 % intervals, pruners by keep ratio (all, or those of `columns`), best rival
    of each column bold: shares as percent, the numbers of a benchmark (<dataset>/<name>) in their
    own unit."""
    # Numbers of a benchmark have a unit of their own, accuracies are shown in percent.
    cells = grid(rows, metric)
    published = any(metric.startswith(f"{row.dataset}/") for row in rows)
    scale = 1.0 if published else 100.0
    table = Table(
        title=metric if published else f"{metric} (%)",
        box=box.ASCII2 if plain else box.ROUNDED,
        title_justify="left",
    )
    table.add_column("pruner", no_wrap=True)
    columns = ratios(cells) if columns is None else columns
    # Bold is the best of those that compete: bounds do not.
    best: dict[float | None, float] = {}
    for ratio in columns:
        column = {name: row[ratio] for name, row in cells.items() if ratio in row}
        kept = [cell.kept_tokens for cell in column.values()]
        flops = [cell.flops_ratio for cell in column.values()]
        heading = f"{ratio_label(ratio)}\n{span(kept, '.0f')} tokens\nFLOPs x {span(flops, '.2f')}"
        table.add_column(heading, justify="right", no_wrap=True)
        best[ratio] = max(
            (c.value for name, c in column.items() if name not in BOUNDS), default=math.inf
        )
    for name in pruner_order(cells):
        # of a part of a table that is too wide for the terminal
        if cells[name].keys().isdisjoint(columns):
            continue
        # An empty cell keeps the column: not every pruner is served at every ratio.
        texts = [
            _cell_text(
                cell := cells[name].get(ratio),
                cell is not None and name not in BOUNDS and cell.value == best[ratio],
                scale,
            )
            for ratio in columns
        ]
        table.add_row("keep_all (all tokens)" if name == FULL else name, *texts)
    return table


def print_table(
    rows: Sequence[Row], console: Console | None = None, metric: str = "accuracy"
) -> None:
    """Print the table and, under it, what the FLOPs count; ASCII without colors or wrapping when
    not on a terminal."""
    console = console or Console()
    plain = not console.is_terminal
    # The table is made per part, since its rows depend on its columns.
    make = functools.partial(accuracy_table, rows, metric, plain)
    print_in_parts(make, ratios(grid(rows, metric)), console)
    console.print(Text(CONVENTION), soft_wrap=plain)


def print_in_parts(
    make: Callable[[Sequence[float | None]], Table],
    columns: Sequence[float | None],
    console: Console,
) -> None:
    """Print the table that `make` gives for some columns, in parts where the terminal is too narrow
    for all of them. What is no terminal has room for everything, and gets neither colors nor
    wrapped lines."""
    if not console.is_terminal:
        console = Console(
            file=console.file, width=240, color_system=None, highlight=False, emoji=False
        )
    # As many columns as fit, at least one; what is left goes into the next part.
    unbound = console.options.update_width(10_000)
    while columns:
        tables = (make(columns[:count]) for count in range(len(columns), 0, -1))
        # Measured with an unbounded width: within the console's own, no table is wider than it.
        fits = (
            t
            for t in tables
            if console.measure(t, options=unbound).maximum <= console.width or len(t.columns) < 3
        )
        table = next(fits)
        console.print(table)
        # The first column names the pruner in every part.
        columns = columns[len(table.columns) - 1 :]


def mean_accuracy(rows: Sequence[Row], pruner: str) -> float | None:
    """Of a pruner, over its keep ratios and training seeds; None where it was not scored."""
    scores = [row.value for row in rows if row.pruner == pruner and row.metric == "accuracy"]
    return sum(scores) / len(scores) if scores else None


def card_results(rows: Sequence[Row], pruner: str, questions: int) -> list[dict[str, Any]]:
    """The accuracies of a model card: all tokens, then the pruner and its adaptive mode at every
    keep ratio."""
    # The order of a card: reference, policy, adaptive mode. Rows without a ratio have no place
    # there.
    names = (FULL, pruner, f"{pruner}_adaptive")
    means = [row for row in rows if row.metric == "accuracy" and row.keep_ratio is not None]
    of_card = [row for row in means if row.pruner in names]
    # A stable sort: within a pruner the ratios keep their order.
    of_card.sort(key=lambda row: names.index(row.pruner))
    return [
        {
            "dataset": row.dataset,
            "questions": questions,
            "pruner": row.pruner,
            "keep_ratio": row.keep_ratio,
            "kept_tokens": row.kept_tokens,
            "accuracy": row.value,
            "low": row.ci_low,
            "high": row.ci_high,
            "flops_ratio": row.flops_ratio,
        }
        for row in of_card
    ]
