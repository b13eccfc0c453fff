"""`scores.npz`: the score of every question, small enough to be kept, from which every interval is
computed again."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tprl.errors import UserError
from tprl.evaluation.evaluator import Answered, metrics_of
from tprl.evaluation.results import Row, SampleRow
from tprl.runtime.files import write_atomically

Floats = NDArray[np.float64]
Names = np.ndarray  # of str
Arm = tuple[str, int, float | None]  # pruner, seed, keep ratio
FIELDS = ("score", "iou", "kept")
FORMAT = 1


@dataclass(frozen=True)
class ScoreTable:
    """A row per arm, a column per question; nan where an arm did not answer (or, of `iou`, where no
    box was asked for).

    `cost` is, per arm, what `results.csv` says of it: kept tokens, FLOPs, FLOPs relative to all
    tokens. `main` is the arm that others are compared with.
    """

    model: str
    dataset: str
    main: str
    uids: Names
    families: Names
    arms: tuple[Arm, ...]
    score: Floats
    iou: Floats
    kept: Floats
    cost: Floats

    def rows(self) -> list[Row]:
        """The rows of `results.csv`, but for the numbers that a benchmark publishes."""
        rows = []
        for i, (pruner, seed, ratio) in enumerate(self.arms):
            # In the order of the table: the bootstrap does not depend on it.
            present = ~np.isnan(self.score[i])
            uids, families = self.uids[present].tolist(), self.families[present].tolist()
            kept, flops, relative = self.cost[i].tolist()
            place = (self.model, self.dataset, pruner, seed, ratio, kept)
            metrics = metrics_of(
                list(zip(uids, families, strict=True)), self.score[i, present], self.iou[i, present]
            )
            for metric, (mean, low, high) in metrics.items():
                rows.append(Row(*place, metric, mean, low, high, flops, relative))
        return rows

    def samples(self) -> list[SampleRow]:
        """The lines of `samples.jsonl` without predictions, arm by arm."""
        names = list(zip(self.uids.tolist(), self.families.tolist(), strict=True))
        rows = []
        for i, arm in enumerate(self.arms):
            for j in np.flatnonzero(~np.isnan(self.score[i])):
                score, kept = float(self.score[i, j]), float(self.kept[i, j])
                rows.append(SampleRow(*names[j], *arm, None, score, kept))
        return rows


def score_table(answered: Sequence[Answered], rows: Sequence[Row], main: str) -> ScoreTable:
    """The table of an evaluation and its `results.csv`."""
    cost = {(r.pruner, r.seed, r.keep_ratio): (r.kept_tokens, r.flops, r.flops_ratio) for r in rows}
    # Columns in the order of first mention, which a dict keeps.
    uids = dict.fromkeys(item.row.uid for item in answered)
    column = {uid: j for j, uid in enumerate(uids)}
    row = {arm: i for i, arm in enumerate(cost)}
    families = dict[str, str]()
    # [arms questions], nan until answered.
    score, iou, kept = (np.full((len(row), len(column)), np.nan) for _ in range(3))
    for item in answered:
        at = row[item.row.pruner, item.row.seed, item.row.keep_ratio], column[item.row.uid]
        families[item.row.uid] = item.row.family
        score[at], kept[at] = item.row.score, item.row.kept_tokens
        iou[at] = np.nan if item.iou is None else item.iou
    return ScoreTable(
        rows[0].model,
        rows[0].dataset,
        main,
        np.array(list(column), dtype=np.str_),
        np.array([families[uid] for uid in column], dtype=np.str_),
        tuple(row),
        score,
        iou,
        kept,
        np.array(list(cost.values()), dtype=np.float64),
    )


def joined(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Evaluations of one model on one dataset as one; an arm that several hold is the first's.

    Raises:
        UserError: other models or datasets, or an arm that scored differently.
    """
    first = tables[0]
    # Questions of all tables, each in one column whichever tables asked it.
    every = chain.from_iterable(table.uids.tolist() for table in tables)
    uids = np.array(list(dict.fromkeys(every)), dtype=np.str_)
    place = {uid: j for j, uid in enumerate(uids.tolist())}
    families, rows = dict[str, str](), dict[Arm, tuple[dict[str, Floats], Floats]]()
    for table in tables:
        if (table.model, table.dataset) != (first.model, first.dataset):
            raise UserError(
                f"one table holds one model and one dataset, got {first.model} on "
                f"{first.dataset} and {table.model} on {table.dataset}: merge them separately."
            )
        at = [place[uid] for uid in table.uids.tolist()]
        families |= dict(zip(table.uids.tolist(), table.families.tolist(), strict=True))
        for i, arm in enumerate(table.arms):
            spread = {name: np.full(len(uids), np.nan) for name in FIELDS}
            for name, values in spread.items():
                values[at] = getattr(table, name)[i]
            # An arm that several evaluations hold must have scored alike in all.
            before = rows.setdefault(arm, (spread, table.cost[i]))
            if not np.array_equal(before[0]["score"], spread["score"], equal_nan=True):
                raise UserError(
                    f"{arm[0]} (seed {arm[1]}, keep_ratio {arm[2]}) scored differently in two "
                    "evaluations: leave one of them out, or evaluate both again."
                )
    # [arms questions] of every field, and [arms 3] of costs.
    fields = dict[str, Floats]()
    for name in FIELDS:
        fields[name] = np.stack([values[name] for values, _ in rows.values()])
    cost = np.stack([cost for _, cost in rows.values()])
    kinds = np.array([families[uid] for uid in place], dtype=np.str_)
    return ScoreTable(
        first.model, first.dataset, first.main, uids, kinds, tuple(rows), **fields, cost=cost
    )


def write_scores(path: Path, table: ScoreTable) -> None:
    """Write `scores.npz`: plain arrays, compressed, the same bytes for the same table."""
    out = io.BytesIO()
    # Arrays of numbers and texts only: no pickle is ever loaded.
    pruners, seeds, ratios = zip(*table.arms, strict=True)
    fields: dict[str, Any] = {name: _narrow(getattr(table, name)) for name in FIELDS}
    np.savez_compressed(
        out,
        format=np.array(FORMAT),
        about=np.array([table.model, table.dataset, table.main], dtype=np.str_),
        uids=table.uids,
        families=table.families.astype(np.str_),
        pruner=np.array(pruners, dtype=np.str_),
        seed=np.array(seeds, dtype=np.int64),
        keep_ratio=np.array(
            [np.nan if ratio is None else ratio for ratio in ratios], dtype=np.float64
        ),
        cost=table.cost,
        **fields,
    )
    write_atomically(path, out.getvalue())


def read_scores(path: Path) -> ScoreTable:
    """The table that `write_scores` wrote.

    Raises:
        UserError: nothing there, damaged, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: give a folder with the scores.npz of an evaluation."
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again.") from error
    if int(parts.get("format", 0)) != FORMAT:
        raise UserError(
            f"{path} has format {parts.get('format', 'none')}, and this version reads {FORMAT}: "
            "evaluate again."
        )
    # nan stands for a pruner that decides alone.
    ratios = [None if np.isnan(ratio) else float(ratio) for ratio in parts["keep_ratio"]]
    arms = tuple(zip(parts["pruner"].tolist(), parts["seed"].tolist(), ratios, strict=True))
    model, dataset, main = parts["about"].tolist()
    fields = {name: _wide(parts[name]) for name in FIELDS}
    return ScoreTable(
        model, dataset, main, parts["uids"], parts["families"], arms, **fields, cost=parts["cost"]
    )


def _narrow(x: Floats) -> NDArray:
    """The same numbers in one or two bytes where they are whole and small (the largest code is
    nan), else as given."""
    # Scores of 0 and 1, and counts of tokens, need no float.
    known = x[~np.isnan(x)]
    for kind in (np.uint8, np.uint16):
        nan = np.iinfo(kind).max
        if bool(((known == np.floor(known)) & (known >= 0) & (known < nan)).all()):
            return np.where(np.isnan(x), nan, x).astype(kind)
    return x


def _wide(x: NDArray) -> Floats:
    if x.dtype.kind != "u":
        return x.astype(np.float64)
    return np.where(x == np.iinfo(x.dtype).max, np.nan, x.astype(np.float64))
