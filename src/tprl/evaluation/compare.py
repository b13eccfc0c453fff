"""Two evaluations of the same questions, question by question."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tprl.errors import UserError
from tprl.evaluation.analysis import Scores, by_arm, common, difference
from tprl.evaluation.results import ratio_label, read_facts, read_samples, write_atomic
from tprl.evaluation.statistics import identical

Arms = dict[tuple[str, float | None], Scores]


@dataclass(frozen=True)
class Compared:
    """Mean scores of two arms at one keep ratio on the `questions` that both answered; `difference`
    is a - b with its 95 % interval and the two-sided p-value, by a paired bootstrap over images;
    with several training seeds, by Student's t over images and seeds (`statistics.over_seeds`)."""

    a: str
    b: str
    keep_ratio: float | None
    questions: int
    score_a: float
    score_b: float
    difference: float
    low: float
    high: float
    p_value: float


def compare_runs(a: str, b: str) -> list[Compared]:
    """Compare runs that hold a `samples.jsonl`; `<run>:<arm>` names one of its pruners.

    Without arms, those of one name in both are compared; two runs of one arm each are compared
    whatever these are called.

    Raises:
        UserError: no such run or arm, no arm in both, no question in both, or other rows or rules.
    """
    # A named arm meets the one named in the other run, else its own name there.
    (first, arm_a), (second, arm_b) = _arms(a), _arms(b)
    _same_protocol(a, b)
    names_a = sorted({name for name, _ in first})
    names_b = sorted({name for name, _ in second})
    # Equal names by default; named arms, or single arms of any name, override that.
    pairs = [(name, name) for name in names_a if name in names_b]
    if arm_a or arm_b or len(names_a) == len(names_b) == 1:
        pairs = [(arm_a or arm_b, arm_b or arm_a)] if arm_a or arm_b else [(names_a[0], names_b[0])]
    # Arms meet at equal keep ratios only: another budget is another question.
    compared = []
    for x, y in pairs:
        for (name, ratio), scores in first.items():
            if name == x and (y, ratio) in second:
                compared.append(_pair(x, y, ratio, scores, second[y, ratio]))
    if not compared:
        raise UserError(
            f"{a} ({', '.join(names_a)}) and {b} ({', '.join(names_b)}) have no "
            "arm at the same keep ratio in common: name one of each, "
            "compare=[<run>:<arm>,<run>:<arm>], evaluated at the same keep_ratios."
        )
    return compared


def _same_protocol(a: str, b: str) -> None:
    """Refuse runs that were scored by different rules, or on different rows that go by the same
    ids."""
    paths = [_folder(run)[0] / "evaluation.json" for run in (a, b)]
    if not all(path.is_file() for path in paths):
        return  # written before evaluations said what they were about
    first, second = map(read_facts, paths)
    # Any of these changes what a score means, so a paired difference would be nonsense.
    for name in ("dataset", "source", "protocol"):
        if first.get(name) != second.get(name):
            raise UserError(
                f"compare: {a} and {b} differ in {name} ({first.get(name)}; "
                f"{second.get(name)}): evaluate both alike."
            )


def _folder(run: str) -> tuple[Path, str]:
    """A run and the arm that is asked for, or ""."""
    # A directory may have a colon in its name: what exists is taken as a whole.
    folder, _, arm = run.rpartition(":") if not Path(run).is_dir() else (run, "", "")
    return Path(folder or run), arm


def _arms(run: str) -> tuple[Arms, str]:
    folder, arm = _folder(run)
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise UserError(
            f"compare: {path} does not exist: give a directory "
            "that src.eval (or stage=all) has written."
        )
    arms = by_arm(read_samples(path))
    names = sorted({name for name, _ in arms})
    if arm and arm not in names:
        raise UserError(f"compare: {folder} has no arm {arm}: it holds {', '.join(names)}.")
    return arms, arm


def _pair(x: str, y: str, ratio: float | None, ours: Scores, baseline: Scores) -> Compared:
    # Questions that either run lacks are dropped, because the bootstrap is paired.
    uids = common(ours, baseline)
    if not uids:
        raise UserError(
            f"compare: {x} and {y} share no question: evaluate both on the same dataset and split."
        )
    # Over seeds and the questions that both answered.
    means = []
    for side in (ours, baseline):
        total = sum(seed[uid] for seed in side.values() for uid in uids)
        means.append(total / len(side) / len(uids))
    return Compared(x, y, ratio, len(uids), *means, *map(float, difference(ours, baseline, uids)))


def comparison_table(compared: Sequence[Compared]) -> Table:
    """Percent; the difference is in points."""
    out = Table(title="a - b, score (%)", box=box.ASCII2, title_justify="left")
    numbers = ("keep ratio", "questions", "score a", "score b", "difference [95 %]", "p")
    for heading in ("a", "b", *numbers):
        out.add_column(heading, justify="left" if heading in ("a", "b") else "right")
    for row in compared:
        # Equal scores on every image leave no interval: the table says so in place of zeros.
        level = identical(row.difference, row.low, row.high)
        bounds = f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
        change = "level" if level else f"{100 * row.difference:+.1f} {bounds}"
        scores = (f"{100 * row.score_a:.1f}", f"{100 * row.score_b:.1f}")
        about = (row.a, row.b, ratio_label(row.keep_ratio), str(row.questions))
        out.add_row(*about, *scores, change, f"{row.p_value:.4f}")
    return out


def write_comparison(compared: Sequence[Compared], directory: Path) -> None:
    """Print the table and write `compare.csv`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(asdict(compared[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, compared))
    write_atomic(directory / "compare.csv", out.getvalue())
    Console(width=160, color_system=None, highlight=False).print(comparison_table(compared))
