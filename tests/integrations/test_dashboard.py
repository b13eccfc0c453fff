"""The W&B workspace and report, as they would be sent; nothing is."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from tests.commands.test_wandb_run import SECTIONS, documented, pattern

from tprl.errors import UserError
from tprl.integrations import dashboard
from tprl.integrations.dashboard import CHARTS, PICTURES, create, dashboard_report, main, workspace


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def plots(node: Any) -> list[dict[str, Any]]:
    """Every line plot in what is sent to W&B."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    entries = (
        [node["config"]]
        if isinstance(node, dict) and node.get("viewType") == "Run History Line Plot"
        else []
    )
    return entries + [plot for child in children for plot in plots(child)]


@pytest.mark.parametrize("make", [workspace, dashboard_report])
def test_every_chart_is_sent_with_its_axis(make: Any) -> None:
    sent = plots(json.loads(make("me", "tprl")._to_model().model_dump_json(by_alias=True)))
    charts = [chart for group in CHARTS.values() for chart in group]
    assert [(item["chartTitle"], item["xAxis"]) for item in sent] == [
        (chart.title, chart.axis) for chart in charts
    ]
    assert [item["metricRegex"] for item in sent] == [chart.regex for chart in charts]
    assert [tuple(item["metrics"]) for item in sent] == [chart.metrics for chart in charts]


def test_charts_show_documented_metrics_over_their_axes() -> None:
    names = documented((*SECTIONS, "`stage=distill`"))
    known = [pattern(name) for name in names]
    charts = [chart for group in CHARTS.values() for chart in group]
    drawn_metrics = {metric for chart in charts for metric in chart.metrics} | {*PICTURES}
    assert {
        name for name in drawn_metrics if not any(item.fullmatch(name) for item in known)
    } == set()
    for chart in charts:
        matches = [n for n in names if chart.regex and re.search(chart.regex, n)] or list(
            chart.metrics
        )
        assert matches
        assert {
            "keep_ratio" if name.startswith("eval/") else "samples_seen" for name in matches
        } == {chart.axis}


def test_seeds_and_speed_and_distillation_are_shown() -> None:
    charts = [chart for group in CHARTS.values() for chart in group]
    for name in ("accuracy", "flops_ratio", "kept_tokens"):
        for arm in ("eval/tprl/", "eval/tprl/seed1/"):
            assert (
                sum(bool(chart.regex and re.search(chart.regex, arm + name)) for chart in charts)
                == 1
            )
    frontier = CHARTS["Frontier"][0].regex or ""
    assert not re.search(frontier, "eval/tprl/accuracy/color")  # of a family
    drawn_metrics = {metric for chart in charts for metric in chart.metrics}
    assert {"ppo/evaluations_per_second", "distill/served", "distill/loss"} <= drawn_metrics
    assert any(chart.regex and re.search(chart.regex, "time/score") for chart in charts)


def test_panels_of_the_report_do_not_overlap() -> None:
    for charts in CHARTS.values():
        places = [(plot.layout.x, plot.layout.y) for plot in dashboard._plots(charts)]
        assert len(set(places)) == len(places)
        assert all(x + 8 <= 24 for x, _ in places)


class TestOneSentence:
    def test_without_a_key(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["dashboard"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        sentence = "make dashboard needs a W&B account: run `wandb login`, or set WANDB_API_KEY."
        assert capsys.readouterr().err == f"error: {sentence}\n"

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
        with pytest.raises(UserError, match=r"pip install 'tprl\[dashboard\]'"):
            create("tprl")

    def test_when_wandb_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise ConnectionError("no\nroute")

        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setattr(wandb, "Api", refuse)
        with pytest.raises(UserError, match=r"project tprl \(ConnectionError: no route\)"):
            create("tprl")


def test_the_make_target_calls_the_dashboard() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert re.search(
        r"^dashboard: install .*\n\t\$\(BIN\)/python -m src\.dashboard$", makefile, re.MULTILINE
    )
