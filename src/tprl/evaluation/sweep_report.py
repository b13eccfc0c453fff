"""What `python -m src.eval sweep=<directory>` leaves and prints beside the files of any evaluation: the numbers over
training seeds as a table, `sweep.csv`, `sweep.svg` and `sweep.html`."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from tprl.cost import CONVENTION
from tprl.evaluation import figures, page
from tprl.evaluation.results import FULL, Row, print_in_parts, ratio_label, write_atomic
from tprl.evaluation.sweep import Summary, Sweep, explain, summarise_sweep

NUMBERS = ("mean", "sd", "low", "high", "kept_tokens", "flops_ratio")
SPREAD = "Mean over training seeds, ± their standard deviation; † marks a ratio that the run was trained for."


def report_sweep(
    sweep: Sweep, rows: Sequence[Row], directory: Path, metric: str = "accuracy", console: Console | None = None
) -> None:
    """Write the files into `directory`, print the table, and say which jobs are missing from it and why.

    Args:
        sweep: what was found.
        rows: of the evaluation of its entries.
        directory: of the evaluation.
        metric: of table and plots, as in `rows`; sweep.csv holds all of them.
        console: where to print.
    """
    summaries = summarise_sweep(sweep, rows)
    shown = [one for one in summaries if one.metric == metric]
    scale = 100.0 if metric == "accuracy" else 1.0
    left_out = [explain(job, sweep.keys) for job in sweep.left_out]
    sentence = headline(sweep, shown, scale)
    write_atomic(directory / "sweep.csv", as_csv(sweep, summaries))
    known = _names(shown)
    svg = plot(shown, metric, scale)
    write_atomic(directory / "sweep.svg", figures.standalone(svg, known))
    write_atomic(directory / "sweep.html", _html(sweep, shown, svg, sentence, left_out, scale))
    console = console or Console(highlight=False)
    plain = not console.is_terminal
    print_in_parts(lambda ratios: _table(shown, ratios, metric, scale, plain), _ratios(shown), console)
    for text in (SPREAD, sentence, *(f"left out: {line}" for line in left_out), f"sweep: {directory / 'sweep.html'}"):
        console.print(_ascii(text) if plain else text, soft_wrap=True, markup=False, highlight=False)


def headline(sweep: Sweep, shown: Sequence[Summary], scale: float) -> str:
    """How much of the sweep there is, and which arm is ahead at the smallest ratio that all arms share, if one is."""
    runs = len({(entry.name, entry.seed) for entry in sweep.entries if entry.name in {a.name for a in sweep.arms}})
    start = f"{runs} of {runs + len(sweep.left_out)} runs are finished"
    names = {arm.name for arm in sweep.arms}
    own = [one for one in shown if one.arm in names and one.keep_ratio is not None]
    shared = [r for r in _ratios(own) if {one.arm for one in own if one.keep_ratio == r} == names]
    if not shared:
        return f"{start}."
    finding = _ahead([one for one in own if one.keep_ratio == shared[-1]], scale)
    return f"{start}; at {ratio_label(shared[-1])} of the visual tokens {finding}."


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
    seeds: an `<svg>`."""
    names = _names(shown)
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    figures._dress(left, "visual tokens kept, %", f"{metric}, %" if scale == 100 else metric)
    figures._dress(right, "FLOPs, % of the model with all tokens", "")
    for axes, x in ((left, _kept_share), (right, _flops_share)):
        for name in names:
            _line(axes, [one for one in shown if one.arm == name], x, names, scale)
        for one in shown:
            if one.arm == FULL:
                axes.axhline(scale * one.mean, color=figures.MUTED, lw=1.2, ls=(0, (6, 3)), zorder=1)
    style = {"fontsize": 9, "frameon": False, "labelcolor": figures.INK, "ncols": min(3, max(len(names), 1))}
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", **style)
    return figures._svg(figure, "sweep", f"{metric} against kept tokens and against FLOPs: {', '.join(names)}")


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
        color=figures._stand_in(list(known).index(name)),
        ls=known[name][2],
        marker=known[name][3],
        lw=1.6,
        ms=5,
        capsize=2,
        elinewidth=1,
    )


def _html(
    sweep: Sweep, shown: Sequence[Summary], svg: str, sentence: str, left_out: Sequence[str], scale: float
) -> str:
    names, ratios = _names(shown), _ratios(shown)
    found = {(one.arm, one.keep_ratio): one for one in shown}

    def cell(name: str, column: int) -> str:
        one = found.get((name, ratios[column]))
        if one is None:
            return ""
        spread = "" if math.isnan(one.sd) else f"± {scale * one.sd:.1f}, "
        return f"{scale * one.mean:.1f}{'†' if one.trained else ''}<small>{spread}n = {one.n}</small>"

    rows = [*(name for name in (FULL,) if any(one.arm == FULL for one in shown)), *names]
    table = page.table(SPREAD, [escape(ratio_label(ratio)) for ratio in ratios], rows, names, cell)
    drawn = f'<div class="scroll" tabindex="0" role="region" aria-label="Plots">{svg}</div>'
    note = f"<figcaption>Bars: one standard deviation over training seeds. {escape(CONVENTION)}</figcaption>"
    items = "".join(f"<li>{escape(line)}</li>" for line in left_out) or "<li>None: every job is in the table.</li>"
    sections = [
        page.section("Against kept tokens and FLOPs", f'<figure class="plot">{drawn}{note}</figure>'),
        page.section("Over training seeds", table),
        page.section("Runs that are missing", f"<ul>{items}</ul>"),
        page.section("More", '<p>Pictures, paired differences and families: <a href="report.html">report.html</a></p>'),
    ]
    title = f"Sweep over {', '.join(sweep.keys) or 'nothing'}"
    return page.page(title=title, headline=sentence, note="", known=names, sections=sections)


def _table(shown: Sequence[Summary], ratios: Sequence[float | None], metric: str, scale: float, plain: bool) -> Table:
    title = f"{metric} (%)" if scale == 100 else metric
    table = Table(title=title, box=box.ASCII2 if plain else box.ROUNDED, title_justify="left")
    table.add_column("arm", no_wrap=True)
    found = {(one.arm, one.keep_ratio): one for one in shown}
    for ratio in ratios:
        table.add_column(ratio_label(ratio), justify="right", no_wrap=True)
    for name in dict.fromkeys(one.arm for one in shown):
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
