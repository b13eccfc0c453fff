"""Kept fractions by seeds on the toy model, with jobs that failed, one that was killed and one that
never started."""

import csv
import io
import math
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tests.commands.calls import call, refused

from tprl.commands.entry import launch
from tprl.commands.evaluate import evaluate
from tprl.commands.train import train
from tprl.errors import UserError
from tprl.evaluation.results import ratio_label, read_results
from tprl.evaluation.sweep import Arm, Summary, Sweep, find_jobs, ratios_of, read_sweep, why_missing
from tprl.report.sweep import report_sweep, sweep_headline
from tprl.runtime.files import write_sealed

TOY = ("model=toy", "dataset=toy", "logger=none")
SHORT = (
    "stage.iterations=1",
    "stage.prompts=2",
    "stage.group=2",
    "stage.served.limit=4",
    "stage.calibrate=null",
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs 0 to 2 finish, 3 is killed, 4 fails (7 is not a kept fraction), 5 never starts."""
    directory = tmp_path_factory.mktemp("sweep")
    swept = (
        "-m",
        "stage=ppo",
        "stage.keep_ratio=0.5,[0.3333,0.25],7",
        "seed=0,1",
        "policy.code_width=0",
    )
    before = sys.argv
    sys.argv = ["src.train", *swept, *TOY, *SHORT, f"hydra.sweep.dir={directory}"]
    try:
        with pytest.raises(SystemExit):
            launch("train", train)
    finally:
        sys.argv = before
    (directory / "3" / "done.json").unlink()
    shutil.rmtree(directory / "5")
    return directory


@pytest.fixture(scope="module")
def table(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("limit=12", "logger=none", "pruners=[random]", "keep_ratios=[0.333,0.1]")
    return call("eval", evaluate, tmp_path_factory.mktemp("eval"), f"sweep={sweep}", *options)


def test_every_job_is_found_with_its_reason(sweep: Path) -> None:
    jobs = find_jobs(sweep)
    assert [job.folder and job.folder.name for job in jobs] == ["0", "1", "2", "3", "4", None]
    assert [job.reason.partition(":")[0] for job in jobs] == [
        "",
        "",
        "",
        "unfinished",
        "failed",
        "never started",
    ]
    assert "keep_ratio must be a number in (0, 1], got 7" in jobs[4].reason
    assert (jobs[5].settings["stage.keep_ratio"], jobs[5].settings["seed"]) == ("7", "1")
    lines = [why_missing(job, ["seed"]) for job in jobs[4:]]
    assert lines[0].startswith(
        f"{sweep}/4: seed=0: failed: stage.keep_ratio must be a number in (0, 1], got 7"
    )
    assert lines[1] == "seed=1: never started"


def test_what_was_planned_for_another_sweep_is_not_missing(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "copy")
    (tmp_path / "copy" / "multirun.yaml").write_text("hydra: {overrides: {task: ['seed=5,6']}}\n")
    assert len(find_jobs(tmp_path / "copy")) == 5


def test_arms_are_the_swept_settings_and_seeds_their_repetitions(sweep: Path) -> None:
    result = read_sweep(sweep, [0.1])
    assert result.keys == ("seed", "stage.keep_ratio")
    assert [arm.name for arm in result.arms] == ["keep_ratio=0.5", "keep_ratio=[0.3333,0.25]"]
    lines = [(entry.name, entry.seed, entry.keep_ratios) for entry in result.entries]
    assert lines == [
        ("keep_ratio=0.5", 0, (0.1, 0.5)),
        ("keep_ratio=0.5", 1, (0.1, 0.5)),
        ("keep_ratio=[0.3333,0.25]", 0, (0.1, 0.3333, 0.25)),
    ]


def test_ratios_with_equal_labels_share_a_column() -> None:
    arm = Arm("a", {}, (0.333, 0.25))
    assert ratios_of(arm, [0.5, 0.3333]) == (0.5, 0.3333, 0.25)
    assert ratio_label(0.333) == ratio_label(0.3333)


def test_the_csv_holds_means_and_spread_over_seeds(table: Path) -> None:
    with (table / "sweep.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == "accuracy"]
    (pair,) = [
        row for row in lines if row["arm"] == "keep_ratio=0.5" and row["keep_ratio"] == "0.5"
    ]
    values = [
        r.value
        for r in read_results(table / "results.csv")
        if (r.pruner, r.keep_ratio) == (pair["arm"], 0.5)
    ]
    values = values[:: len(values) // 2]  # accuracy is the first metric of each seed
    assert (pair["n"], pair["trained"], pair["stage.keep_ratio"]) == ("2", "1", "0.5")
    assert float(pair["mean"]) == pytest.approx(sum(values) / 2)
    assert float(pair["sd"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (float(pair["low"]), float(pair["high"])) == (min(values), max(values))
    alone = [row for row in lines if row["arm"] == "keep_ratio=[0.3333,0.25]"]
    assert {(row["n"], row["sd"]) for row in alone} == {("1", "")}
    assert [row["keep_ratio"] for row in alone if row["trained"] == "1"] == ["0.333", "0.25"]


def test_page_and_plot_name_arms_and_missing_runs(sweep: Path, table: Path) -> None:
    html, svg = (table / "sweep.html").read_text(), (table / "sweep.svg").read_text()
    assert all(
        name in html and name in svg
        for name in ("keep_ratio=0.5", "keep_ratio=[0.3333,0.25]", "random")
    )
    assert (
        f"{sweep}/4: seed=0 stage.keep_ratio=7: failed: "
        "stage.keep_ratio must be a number in (0, 1], got 7"
    ) in html
    assert "3 of 6 runs are finished; at 10\N{NO-BREAK SPACE}% of the visual tokens " in html
    assert (table / "report.html").is_file()


def test_the_page_is_for_phones_too_and_says_where_it_is_from(table: Path) -> None:
    html = (table / "sweep.html").read_text()
    assert html.count('<div class="plot"><svg') == 1
    assert html.count(">all tokens</text>") == 1  # the legend explains the dashed line
    origin = html.partition('id="how-this-was-made"')[2]
    for fact in (
        "<dt>model</dt><dd>toy",
        "<dt>dataset</dt><dd>toy",
        "<dt>questions</dt><dd>12",
        "<dt>versions</dt>",
    ):
        assert fact in origin
    assert "python -m src.eval sweep=" in origin
    assert "keep_ratios:" in origin
    assert '<p class="note">12 questions · ' in html
    title = "Sweep over seed, stage.keep_ratio on toy with toy"
    report = (table / "report.html").read_text()
    assert f"<h1>{title}</h1>" in report
    assert f"<h1>{title}</h1>" in html
    assert report.partition('<p class="headline">')[2].startswith(
        "3 of 6 runs are finished; at 10\N{NO-BREAK SPACE}%"
    )


def test_parts_of_a_table_hold_no_empty_rows(sweep: Path, table: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    report_sweep(
        read_sweep(sweep, [0.333, 0.1]),
        read_results(table / "results.csv"),
        tmp_path,
        console=console,
    )
    tables = out.getvalue().split("accuracy (%)")[1:]
    assert len(tables) > 1
    assert [text.count("keep_all") for text in tables] == [1] + [0] * (len(tables) - 1)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (
            [(1.0, 0.0, 2), (1.0, 0.0, 2)],
            "all arms are level: a with 100.0 ± 0.0 (n=2), b with 100.0 ± 0.0 (n=2)",
        ),
        (
            [(0.90, 0.001, 2), (0.95, 0.06, 2)],
            "all arms are level: b with 95.0 ± 6.0 (n=2), a with 90.0 ± 0.1 (n=2)",
        ),
        ([(0.90, 0.001, 2), (0.95, 0.01, 2)], "b has the highest mean, 95.0 ± 1.0 (n=2)"),
        ([(0.90, math.nan, 1), (0.95, math.nan, 1)], "b has the highest mean, 95.0 (n=1)"),
        (
            [(0.9, 0.1, 2)] * 4 + [(0.1, 0.0, 2)],
            "the best arms are level: a with 90.0 ± 10.0 (n=2), b with 90.0 ± ",
        ),
        ([(0.9, math.nan, 1)], "a has 90.0 (n=1)"),
    ],
)
def test_nobody_is_ahead_of_an_equal(arms: list[tuple[float, float, int]], words: str) -> None:
    names = "abcde"[: len(arms)]
    view = [
        Summary(name, 0.1, "accuracy", n, mean, sd, mean, mean, 8.0, 0.5, False)
        for name, (mean, sd, n) in zip(names, arms, strict=True)
    ]
    sweep = Sweep(Path(), ("x",), tuple(Arm(name, {}, (0.1,)) for name in names), (), (), Path())
    assert sweep_headline(sweep, view, 100.0).startswith(
        f"0 of 0 runs are finished; at 10 % of the visual tokens {words}"
    )
    assert ("more." in sweep_headline(sweep, view, 100.0)) == (len(arms) == 5)


def test_the_table_is_plain_when_piped(
    sweep: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_sweep(
        read_sweep(sweep, [0.333, 0.1]),
        read_results(table / "results.csv"),
        tmp_path,
        console=Console(),
    )
    text = capsys.readouterr().out
    assert text.isascii()
    assert "+- " in text
    assert text.count("left out: ") == 3


def test_folders_that_are_not_sweeps_are_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, "eval", tmp_path / "a", "sweep=/no/such/sweep")
    assert f"is one run, not a sweep: use run={sweep}/0" in refused(
        capsys, "eval", tmp_path, f"sweep={sweep}/0"
    )
    shutil.copytree(sweep / "4", tmp_path / "sweep" / "4")
    with pytest.raises(
        UserError, match=r"has no finished run: .*/4: .*: failed: stage.keep_ratio must be"
    ):
        read_sweep(tmp_path / "sweep", [0.1])


def test_one_table_is_about_one_model(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "sweep")
    config = tmp_path / "sweep" / "1" / "config.yaml"
    write_sealed(config, config.read_text().replace("name: toy\n", "name: other\n", 1))
    with pytest.raises(UserError, match=r"/0 and .*/1 differ in \w+, and one table is about one"):
        read_sweep(tmp_path / "sweep", [0.1])
    assert len(read_sweep(tmp_path / "sweep", [0.1], same=()).entries) == 3
