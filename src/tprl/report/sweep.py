"""What `python -m src.eval sweep=<directory>` leaves and prints beside the files of any evaluation: the numbers over
training seeds as a table, `sweep.csv`, `sweep.svg` and `sweep.html`."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from tprl.cost import CONVENTION
from tprl.evaluation.results import FULL, Row, print_in_parts, ratio_label, write_atomic
from tprl.evaluation.sweep import Summary, Sweep, explain, summarise_sweep
from tprl.report import figures
from tprl.report.evaluation import origin_section, summary
from tprl.report.page import Entry, PageTable, Section, page_table, render

NUMBERS = ("mean", "sd", "low", "high", "kept_tokens", "flops_ratio")
BARS = "Bars: one standard deviation over training seeds."
SPREAD = "Mean over training seeds, ± their standard deviation; † marks a ratio that the run was trained for."


@dataclass(frozen=True)
class Origin:
    """Where a page is from: what its numbers are about and were made on, the shell lines, the resolved config."""

    facts: Mapping[str, object]
    commands: Sequence[str] = ()
    config_yaml: str = ""


def report_sweep(
    sweep: Sweep,
    rows: Sequence[Row],
    directory: Path,
    metric: str = "accuracy",
    origin: Origin | None = None,
    console: Console | None = None,
) -> None:
    """Write the files into `directory`, print the table, and say which jobs are missing from it and why.

    Args:
        sweep: what was found.
        rows: of the evaluation of its entries.
        directory: of the evaluation.
        metric: of table and plots, as in `rows`; sweep.csv holds all of them.
        origin: of the numbers, for the page.
        console: where to print.
    """
    summaries = summarise_sweep(sweep, rows)
    shown = [one for one in summaries if one.metric == metric]
    scale = _scale(metric)
    left_out = [explain(job, sweep.keys) for job in sweep.left_out]
    sentence = headline(sweep, shown, scale)
    write_atomic(directory / "sweep.csv", as_csv(sweep, summaries))
    known = _names(shown)
    write_atomic(directory / "sweep.svg", figures.standalone(plot(shown, metric, scale), known))
    origin = origin or Origin({})
    figure = {"drawings": [plot(shown, metric, scale)], "note": f"{BARS} {CONVENTION}"}
    over_seeds = {"full": "", "tables": [_over_seeds(shown, scale)], "note": ""}
    sections = [
        Section("Against kept tokens and FLOPs", "plots.html", {"figures": [figure], "fold": None}),
        Section("Over training seeds", "accuracy.html", over_seeds),
        Section("Runs that are missing", "missing.html", {"lines": left_out}),
        Section("More", "more.html"),
        origin_section(origin.facts, origin.commands, origin.config_yaml),
    ]
    html = render(title(sweep, rows), sentence, summary(origin.facts), known, sections)
    write_atomic(directory / "sweep.html", html)
    console = console or Console(highlight=False)
    plain = not console.is_terminal
    print_in_parts(lambda ratios: _table(shown, ratios, metric, scale, plain), _ratios(shown), console)
    for text in (SPREAD, sentence, *(f"left out: {line}" for line in left_out), f"sweep: {directory / 'sweep.html'}"):
        console.print(_ascii(text) if plain else text, soft_wrap=True, markup=False, highlight=False)


def title(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Of the pages about a sweep."""
    return f"Sweep over {', '.join(sweep.keys) or 'nothing'} on {rows[0].dataset} with {rows[0].model}"


def finding(sweep: Sweep, rows: Sequence[Row], metric: str = "accuracy") -> str:
    """`headline` of the rows of an evaluation."""
    shown = [one for one in summarise_sweep(sweep, rows) if one.metric == metric]
    return headline(sweep, shown, _scale(metric))


def _scale(metric: str) -> float:
    """Shares are shown in percent, a benchmark's own numbers in their own unit."""
    return 100.0 if metric == "accuracy" else 1.0


def headline(sweep: Sweep, shown: Sequence[Summary], scale: float) -> str:
    """How much of the sweep there is, and which arm is ahead at the smallest ratio that all arms share, if one is."""
    runs = len({(entry.name, entry.seed) for entry in sweep.entries if entry.name in {a.name for a in sweep.arms}})
    start = f"{runs} of {runs + len(sweep.left_out)} runs are finished"
    names = {arm.name for arm in sweep.arms}
    own = [one for one in shown if one.arm in names and one.keep_ratio is not None]
    shared = [r for r in _ratios(own) if {one.arm for one in own if one.keep_ratio == r} == names]
    if not shared:
        return f"{start}."
    arms = [one for one in own if one.keep_ratio == shared[-1]]
    return f"{start}; at {ratio_label(shared[-1])} of the visual tokens {_ahead(arms, scale)}."


def _ahead(arms: Sequence[Summary], scale: float) -> str:
    """Which arm is ahead, in words. Arms are level where they read the same, or are less apart than the larger of their
    standard deviations over seeds."""
    best, *others = sorted(arms, key=lambda one: -one.mean)
    level = [best, *(one for one in others if _level(best, one, scale))]
    if not others:
        return f"{best.arm} has {_text(best, scale)}"
    if len(level) == 1:
        return f"{best.arm} is ahead with {_text(best, scale)}"
    who = ", ".join(f"{one.arm} with {_text(one, scale)}" for one in level[:3])
    more = f" and {len(level) - 3} more" if len(level) > 3 else ""
    return f"{'all arms' if len(level) == len(arms) else 'the best arms'} are level: {who}{more}"


def _level(a: Summary, b: Summary, scale: float) -> bool:
    spreads = [one.sd for one in (a, b) if not math.isnan(one.sd)]
    return f"{scale * a.mean:.1f}" == f"{scale * b.mean:.1f}" or abs(a.mean - b.mean) < max(spreads, default=0.0)


def as_csv(sweep: Sweep, summaries: Sequence[Summary]) -> str:
    """One line per arm (or other pruner), keep ratio and metric; a column for every swept setting."""
    arms = {arm.name: arm for arm in sweep.arms}
    keys = list(dict.fromkeys(key for arm in sweep.arms for key in arm.swept))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", *keys, "metric", "keep_ratio", "trained", "n", *NUMBERS])
    for one in summaries:
        swept = arms[one.arm].swept if one.arm in arms else {}
        ratio = "" if one.keep_ratio is None else one.keep_ratio
        numbers = ["" if math.isnan(value := getattr(one, name)) else value for name in NUMBERS]
        settings = [swept.get(key, "") for key in keys]
        writer.writerow([one.arm, *settings, one.metric, ratio, int(one.trained), one.n, *numbers])
    return out.getvalue()


def plot(shown: Sequence[Summary], metric: str, scale: float) -> str:
    """The metric against the kept fraction and against FLOPs, a line per arm, bars of one standard deviation over
    seeds: an `<svg>` with one panel above the other."""
    names = _names(shown)
    # Columns of the legend, by the longest name.
    longest = max(map(len, names), default=0)
    columns = max(1, min(3, int(72 * figures.WIDTH / (40 + 5.5 * longest))))
    height = 6.4 + 0.2 * math.ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(figures.WIDTH, height), layout="constrained")
    first, second = figure.subplots(2, 1, sharey=True)
    value = f"{metric}, %" if scale == 100 else metric
    figures.dress(first, "visual tokens kept, %", value)
    figures.dress(second, "FLOPs, % of the model with all tokens", value)
    for axes, x in ((first, _kept_share), (second, _flops_share)):
        for name in names:
            _line(axes, [one for one in shown if one.arm == name], x, names, scale)
        for one in shown:
            if one.arm == FULL:
                style: dict[str, Any] = {"color": figures.MUTED, "lw": 1.2, "ls": (0, (6, 3)), "zorder": 1}
                axes.axhline(scale * one.mean, label="all tokens", **style)
    look = {"fontsize": 9, "frameon": False, "labelcolor": figures.INK, "ncols": columns}
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", **look)
    what = f"{metric} against kept tokens and against FLOPs: {', '.join(names)}"
    return figures.as_svg(figure, "sweep", what)


def _kept_share(one: Summary) -> float:
    return math.nan if one.keep_ratio is None else 100 * one.keep_ratio


def _flops_share(one: Summary) -> float:
    return 100 * one.flops_ratio


def _line(
    axes: Axes, arm: Sequence[Summary], x: Callable[[Summary], float], names: Sequence[str], scale: float
) -> None:
    points, known, name = sorted(arm, key=x), figures.styles(names), arm[0].arm
    axes.errorbar(
        [x(one) for one in points],
        [scale * one.mean for one in points],
        yerr=[0.0 if math.isnan(one.sd) else scale * one.sd for one in points],
        label=name,
        color=figures.stand_in(list(known).index(name)),
        ls=known[name][2],
        marker=known[name][3],
        lw=1.6,
        ms=5,
        capsize=2,
        elinewidth=1,
    )


def _over_seeds(shown: Sequence[Summary], scale: float) -> PageTable:
    ratios = _ratios(shown)
    places = {(one.arm, one.keep_ratio): one for one in shown}

    def mean(name: str, column: int) -> Entry:
        one = places.get((name, ratios[column]))
        if one is None:
            return Entry()
        deviation = "" if math.isnan(one.sd) else f"± {scale * one.sd:.1f}, "
        return Entry(f"{scale * one.mean:.1f}{'†' if one.trained else ''}", (f"{deviation}n = {one.n}",))

    arms = list(dict.fromkeys(one.arm for one in shown))
    names = [FULL, *_names(shown)] if FULL in arms else _names(shown)
    return page_table(SPREAD, [ratio_label(ratio) for ratio in ratios], names, mean)


def _table(shown: Sequence[Summary], ratios: Sequence[float | None], metric: str, scale: float, plain: bool) -> Table:
    title = f"{metric} (%)" if scale == 100 else metric
    table = Table(title=title, box=box.ASCII2 if plain else box.ROUNDED, title_justify="left")
    table.add_column("arm", no_wrap=True)
    found = {(one.arm, one.keep_ratio): one for one in shown}
    for ratio in ratios:
        table.add_column(ratio_label(ratio), justify="right", no_wrap=True)
    for name in dict.fromkeys(one.arm for one in shown if one.keep_ratio in ratios):
        cells = (found.get((name, ratio)) for ratio in ratios)
        table.add_row(
            name, *("" if one is None else _ascii(_text(one, scale)) if plain else _text(one, scale) for one in cells)
        )
    return table


def _text(one: Summary, scale: float) -> str:
    spread = "" if math.isnan(one.sd) else f" ± {scale * one.sd:.1f}"
    return f"{scale * one.mean:.1f}{spread} (n={one.n}){'†' if one.trained else ''}"


def _ascii(text: str) -> str:
    return text.replace("±", "+-").replace("†", "*")


def _names(shown: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(one.arm for one in shown if one.arm != FULL))


def _ratios(shown: Sequence[Summary]) -> list[float | None]:
    """From large to small; a pruner's own choice last."""
    found = {one.keep_ratio for one in shown}
    return [*sorted((r for r in found if r is not None), reverse=True), *([None] if None in found else [])]
