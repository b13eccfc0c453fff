"""`compare=[a,b]`: paired differences of two evaluations."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tprl.errors import UserError
from tprl.evaluation.compare import compare_runs, comparison_table, write_comparison
from tprl.evaluation.results import SampleRow, write_samples

THIRD = 1 / 3


def run(folder: Path, arms: dict[str, Any], ratio: float | None = THIRD, first: int = 0) -> str:
    """A run whose arms have these scores on questions `first`, `first` + 1, ...; two questions an
    image."""
    rows = [
        SampleRow(f"d/{i // 2}/{i % 2}", "f", arm, seed, ratio, None, score, 10)
        for arm, scores in arms.items()
        for seed, values in enumerate([scores] if isinstance(scores[0], int | float) else scores)
        for i, score in enumerate(values, first)
    ]
    folder.mkdir(parents=True)
    write_samples(folder / "samples.jsonl", rows)
    return str(folder)


def test_arms_of_one_name_are_compared_on_the_questions_of_both(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"x": [1.0, 0.0, 1.0, 1.0, 1.0, 0.0], "only": [1.0] * 6})
    b = run(tmp_path / "b", {"x": [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], "other": [1.0] * 8})
    (pair,) = compare_runs(a, b)
    assert (pair.a, pair.b, pair.keep_ratio, pair.questions) == ("x", "x", THIRD, 6)
    assert (pair.score_a, pair.score_b) == pytest.approx((4 / 6, 2 / 6))
    assert pair.difference == pytest.approx(2 / 6)
    # Images differ by 1/2, 1/2 and 0: no draw is below 0, 1 of 27 is 0.
    assert (pair.low, pair.high) == pytest.approx((0.0, 0.5))
    assert 0.05 < pair.p_value < 0.1


def test_arms_by_name_and_lone_arms_of_different_names(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"x": [1.0, 0.0], "y": [0.0, 0.0]})
    b = run(tmp_path / "b", {"z": [0.0, 0.0]})
    assert [(item.a, item.b, item.difference) for item in compare_runs(f"{a}:x", b + ":z")] == [
        ("x", "z", 0.5)
    ]
    c = run(tmp_path / "c", {"w": [1.0, 1.0]})
    assert [(item.a, item.b, item.difference) for item in compare_runs(b, c)] == [("z", "w", -1.0)]
    console = Console(width=160, file=io.StringIO())
    equal = [run(tmp_path / name, {"x": [1.0, 0.0] * 3}) for name in "de"]
    console.print(comparison_table(compare_runs(*equal)))
    assert " level " in console.file.getvalue()  # type: ignore[attr-defined]


def test_seeds_are_compared_one_by_one_where_they_are_the_same(tmp_path: Path) -> None:
    many = run(tmp_path / "a", {"x": [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]})
    same = run(tmp_path / "b", {"x": [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]})
    (pair,) = compare_runs(many, same)
    assert (pair.score_a, pair.score_b, pair.difference) == (0.75, 0.25, 0.5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "{a}",
            "/nowhere",
            "/nowhere/samples.jsonl does not exist: give a directory that src.eval",
        ),
        ("{a}:q", "{b}", "has no arm q: it holds x, y"),
        ("{a}", "{b}", "no arm at the same keep ratio in common: name one of each"),
        ("{a}:x", "{c}:x", "share no question: evaluate both on the same dataset and split"),
    ],
)
def test_incomparable_arms_are_refused(
    tmp_path: Path, first: str, second: str, message: str
) -> None:
    folders = {
        "a": run(tmp_path / "a", {"x": [1.0], "y": [1.0]}),
        "b": run(tmp_path / "b", {"z": [1.0], "v": [1.0]}),
        "c": run(tmp_path / "c", {"x": [1.0]}, first=10),
    }
    with pytest.raises(UserError, match=message):
        compare_runs(first.format(**folders), second.format(**folders))


def test_the_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {"x": [1.0, 1.0, 1.0, 1.0]})
    b = run(tmp_path / "b", {"x": [0.0, 0.0, 0.0, 0.0]})
    write_comparison(compare_runs(a, b), tmp_path)
    assert "+100.0 [+100.0, +100.0]" in capsys.readouterr().out
    assert (tmp_path / "compare.csv").read_text().splitlines()[1].startswith("x,x,0.333")
