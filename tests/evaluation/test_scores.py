"""`scores.npz`: what it keeps, that it is small, and that a study comes out of it again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Answered, summarize
from tprl.evaluation.results import Row, SampleRow, read_results
from tprl.evaluation.scores import ScoreTable, joined, read_scores, score_table, write_scores
from tprl.report.study import recompute, write_all
from tprl.runtime.files import write_sealed

FILES = ("results.csv", "intervals.csv", "paired.json", "spreads.json", "scores.npz", "pareto.svg")


def answered(
    arms: tuple[tuple[str, int, float | None], ...], questions: int = 40
) -> list[Answered]:
    """Ten questions an image, every fourth with a box; scores depend on arm and question."""
    rng, out = np.random.default_rng(0), []
    for i in range(questions):
        for pruner, seed, ratio in arms:
            iou = float(rng.random()) if i % 4 == 0 else None
            score = float(rng.random() < 0.7) if iou is None else float(iou > 0.5)
            uid = f"scenes/test/{i // 10}/{i % 10}"
            row = SampleRow(
                uid, ("color", "box")[iou is not None], pruner, seed, ratio, "x", score, 8 + seed
            )
            out.append(Answered(row, iou, 1e9 + i / 3, 3e9 + i / 7))
    return out


ARMS = (
    ("keep_all", 0, 1.0),
    *(("tprl", seed, 1 / 9) for seed in range(3)),
    ("tprl_adaptive", 0, 1 / 9),
    ("x", 0, None),
)


def table_of(arms=ARMS) -> tuple[ScoreTable, list[Row]]:
    items = answered(arms)
    rows = summarize(items, "m", Scenes("val"))
    return score_table(items, rows, "tprl"), rows


def test_the_rows_come_back_exactly(tmp_path: Path) -> None:
    table, rows = table_of()
    assert {row.metric for row in rows} == {
        "accuracy",
        "accuracy/color",
        "accuracy/box",
        "mean_iou",
    }
    write_scores(tmp_path / "scores.npz", table)
    again = read_scores(tmp_path / "scores.npz")
    assert again.rows() == rows
    assert again.arms == ARMS
    assert [(s.uid, s.pruner, s.seed, s.score, s.kept_tokens) for s in again.samples()] == [
        (a.row.uid, *arm[:2], a.row.score, a.row.kept_tokens)
        for arm in ARMS
        for a in answered(ARMS)
        if (a.row.pruner, a.row.seed, a.row.keep_ratio) == arm
    ]
    write_scores(tmp_path / "twice.npz", again)
    assert (tmp_path / "twice.npz").read_bytes() == (tmp_path / "scores.npz").read_bytes()


def test_it_holds_plain_arrays_and_is_small(tmp_path: Path) -> None:
    arms = tuple(("random", seed, ratio) for seed in range(5) for ratio in (0.5, 0.25))
    questions = [(f"scenes/final/{i // 5}/{i % 5}", "count") for i in range(5000)]
    rng = np.random.default_rng(0)
    score = (rng.random((10, 5000)) < 0.9).astype(float)
    score[:, -7:] = np.nan  # not answered
    uids, families = (np.array(names) for names in zip(*questions, strict=True))
    nothing, kept = np.full(score.shape, np.nan), np.where(np.isnan(score), np.nan, 300.0)
    table = ScoreTable(
        "m", "scenes", "random", uids, families, arms, score, nothing, kept, np.ones((10, 3))
    )
    write_scores(tmp_path / "scores.npz", table)
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} <= set("iufU")
    assert (tmp_path / "scores.npz").stat().st_size < 60_000  # half a million numbers would be 4 MB
    again = read_scores(tmp_path / "scores.npz")
    assert all(
        np.array_equal(getattr(again, n), getattr(table, n), equal_nan=True)
        for n in ("score", "iou", "kept")
    )


@pytest.mark.parametrize("value", [254.0, 255.0, 65535.0, 0.5, -1.0])
def test_numbers_of_any_size_come_back(tmp_path: Path, value: float) -> None:
    table = table_of()[0]
    kept = table.kept.copy()
    kept[0, :2] = value, np.nan
    write_scores(tmp_path / "scores.npz", replace(table, kept=kept))
    assert np.array_equal(read_scores(tmp_path / "scores.npz").kept, kept, equal_nan=True)


def test_a_study_is_recomputed_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, rows = table_of()
    published = replace(rows[0], metric="scenes/f1", value=71.0)
    write_all(tmp_path / "study", table, [*rows, published])
    assert recompute(tmp_path / "study", tmp_path / "again") == [*rows, published]
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "study" / name).read_bytes()
    assert capsys.readouterr().out.count(": equal to ") == 4
    cells = (tmp_path / "again" / "intervals.csv").read_text().splitlines()
    assert cells[0] == "pruner,keep_ratio,metric,value,low,high,seeds,interval"
    assert [
        line.rsplit(",", 2)[1:]
        for line in cells
        if line.startswith("tprl,0.1111111111111111,accuracy,")
    ] == [["3", "images and seeds"]]
    results = tmp_path / "study" / "results.csv"
    write_sealed(results, results.read_text().replace("tprl,1,", "tprl,7,"))
    recompute(tmp_path / "study", tmp_path / "third")
    assert f"results.csv: differs from {results}" in capsys.readouterr().out
    assert read_results(tmp_path / "third" / "results.csv") == [*rows, published]


def test_evaluations_of_the_same_questions_are_joined() -> None:
    whole, rows = table_of()
    parts = [
        replace(
            whole,
            arms=whole.arms[i:j],
            cost=whole.cost[i:j],
            **{n: getattr(whole, n)[i:j] for n in ("score", "iou", "kept")},
        )
        for i, j in ((0, 4), (3, 6))
    ]
    assert joined(parts).rows() == rows
    other = replace(parts[1], score=1 - parts[1].score)
    with pytest.raises(
        UserError, match=r"tprl \(seed 2, keep_ratio 0\.1.*\) scored differently in two evaluations"
    ):
        joined([parts[0], other])
    with pytest.raises(UserError, match="one table holds one model and one dataset"):
        joined([parts[0], replace(parts[1], model="n")])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(UserError, match=r"scores\.npz does not exist: give a folder"):
        recompute(tmp_path, tmp_path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="is damaged"):
        read_scores(path)
    write_scores(path, table_of()[0])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="is damaged"):
        read_scores(path)
    np.savez(path, format=np.array(99))
    with pytest.raises(UserError, match="has format 99, and this version reads 1"):
        read_scores(path)
