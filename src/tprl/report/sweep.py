"""What `python -m src.eval sweep=<directory>` leaves and prints beside the files of any evaluation:
the numbers over training seeds as a table, `sweep.csv`, `sweep.svg` and `sweep.html`."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from tprl.cost import CONVENTION
from tprl.evaluation.results import FULL, Row, print_in_parts, ratio_label, write_atomic
from tprl.evaluation.sweep import Summary, Sweep, summarize_sweep, why_missing
from tprl.report import figures
from tprl.report.evaluation import origin_section, summary
from tprl.report.page import PageTable, Section, TableEntry, page_table, render_page

NUMBERS = ("mean", "sd", "low", "high", "kept_tokens", "flops_ratio")
BARS = "Bars: one standard deviation over training seeds."
SPREAD = (
    "Mean over training seeds, ± their standard deviation; "
    "† marks a ratio that the run was trained for."
)


@dataclass(frozen=True)
class Origin:
    """Where a page is from: what its numbers are about and were made on, the shell lines, the
    resolved config."""

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
    """Write the files into `directory`, print the table, and say which jobs are missing from it and
    why.

    Args:
        sweep: what was found.
        rows: of the evaluation of its entries.
        directory: of the evaluation.
        metric: of table and plots, as in `rows`; sweep.csv holds all of them.
        origin: of the numbers, for the page.
        console: where to print.
    """
    # sweep.csv holds every metric; table, plots and headline show the requested metric alone.
    summaries = summarize_sweep(sweep, rows)
    selected = [item for item in summaries if item.metric == metric]
    scale = _scale(metric)
    left_out = [why_missing(job, sweep.keys) for job in sweep.left_out]
    sentence = sweep_headline(sweep, selected, scale)
    write_atomic(directory / "sweep.csv", as_csv(sweep, summaries))
    known = _names(selected)
    write_atomic(directory / "sweep.svg", figures.standalone(plot(selected, metric, scale), known))
    origin = origin or Origin({})
    sections = _sections(selected, metric, scale, left_out, origin)
    html = render_page(title(sweep, rows), sentence, summary(origin.facts), known, sections)
    write_atomic(directory / "sweep.html", html)
    # The console comes last, so that its final line points to files that exist.
    console = console or Console(highlight=False)
    plain = not console.is_terminal
    print_in_parts(
        lambda ratios: _table(selected, ratios, metric, scale, plain), _ratios(selected), console
    )
    for text in (
        SPREAD,
        sentence,
        *(f"left out: {line}" for line in left_out),
        f"sweep: {directory / 'sweep.html'}",
    ):
        console.print(
            _ascii(text) if plain else text, soft_wrap=True, markup=False, highlight=False
        )


def _sections(
    selected: Sequence[Summary], metric: str, scale: float, left_out: Sequence[str], origin: Origin
) -> list[Section | None]:
    """Of the page, top to bottom."""
    # The plot is drawn a second time: a page colors lines by its own style sheet, a file brings its
    # colors.
    figure = {"drawings": [plot(selected, metric, scale)], "note": f"{BARS} {CONVENTION}"}
    over_seeds = {"full": "", "tables": [_over_seeds(selected, scale)], "note": ""}
    return [
        Section("Against kept tokens and FLOPs", "plots.html", {"figures": [figure], "fold": None}),
        Section("Over training seeds", "accuracy.html", over_seeds),
        Section("Runs that are missing", "missing.html", {"lines": left_out}),
        Section("More", "more.html"),
        origin_section(origin.facts, origin.commands, origin.config_yaml),
    ]


def title(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Of the pages about a sweep."""
    return (
        f"Sweep over {', '.join(sweep.keys) or 'nothing'} on {rows[0].dataset} with {rows[0].model}"
    )


def finding(sweep: Sweep, rows: Sequence[Row], metric: str = "accuracy") -> str:
    """`sweep_headline` of the rows of an evaluation."""
    selected = [item for item in summarize_sweep(sweep, rows) if item.metric == metric]
    return sweep_headline(sweep, selected, _scale(metric))


def _scale(metric: str) -> float:
    """Shares are shown in percent, a benchmark's own numbers in their own unit."""
    return 100.0 if metric == "accuracy" else 1.0


def sweep_headline(sweep: Sweep, summaries: Sequence[Summary], scale: float) -> str:
    """How much of the sweep there is, and which arm is ahead at the smallest ratio that all arms
    share, if one is."""
    # A run is an arm and a training seed; its modes and keep ratios do not count again.
    names = {arm.name for arm in sweep.arms}
    runs = len({(entry.name, entry.seed) for entry in sweep.entries if entry.name in names})
    start = f"{runs} of {runs + len(sweep.left_out)} runs are finished"
    # Arms are compared at the smallest ratio that all of them were served at.
    swept = [item for item in summaries if item.arm in names and item.keep_ratio is not None]
    arms_at: dict[float | None, set[str]] = {}
    for item in swept:
        arms_at.setdefault(item.keep_ratio, set()).add(item.arm)
    shared = [ratio for ratio in _ratios(swept) if arms_at[ratio] == names]
    if not shared:
        return f"{start}."
    arms = [item for item in swept if item.keep_ratio == shared[-1]]
    return f"{start}; at {ratio_label(shared[-1])} of the visual tokens {_ahead(arms, scale)}."


def _ahead(arms: Sequence[Summary], scale: float) -> str:
    """Which arm is ahead, in words. Arms are level where they read the same, or are less apart than
    the larger of their standard deviations over seeds."""
    # Rivals count as level with the best arm alone, since being level is not transitive.
    best, *others = sorted(arms, key=lambda item: -item.mean)
    level = [best, *(item for item in others if _level(best, item, scale))]
    if not others:
        return f"{best.arm} has {_text(best, scale)}"
    if len(level) == 1:
        return f"{best.arm} has the highest mean, {_text(best, scale)}"
    who = ", ".join(f"{item.arm} with {_text(item, scale)}" for item in level[:3])
    more = f" and {len(level) - 3} more" if len(level) > 3 else ""
    return f"{'all arms' if len(level) == len(arms) else 'the best arms'} are level: {who}{more}"


def _level(a: Summary, b: Summary, scale: float) -> bool:
    # The deviation is nan where an arm has a single seed; then only the printed digits decide.
    spreads = [item.sd for item in (a, b) if not math.isnan(item.sd)]
    return f"{scale * a.mean:.1f}" == f"{scale * b.mean:.1f}" or abs(a.mean - b.mean) < max(
        spreads, default=0.0
    )


def as_csv(sweep: Sweep, summaries: Sequence[Summary]) -> str:
    """One line per arm (or other pruner), keep ratio and metric; a column for every swept
    setting."""
    arms = {arm.name: arm for arm in sweep.arms}
    # Arms may differ in the settings that they sweep: columns are the union, in order of
    # appearance.
    keys = list(dict.fromkeys(chain.from_iterable(arm.swept for arm in sweep.arms)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", *keys, "metric", "keep_ratio", "trained", "n", *NUMBERS])
    for item in summaries:
        # Baselines and the unpruned model belong to no arm, so their settings stay empty.
        swept = arms[item.arm].swept if item.arm in arms else {}
        ratio = "" if item.keep_ratio is None else item.keep_ratio
        numbers = ["" if math.isnan(value := getattr(item, name)) else value for name in NUMBERS]
        settings = [swept.get(key, "") for key in keys]
        writer.writerow(
            [item.arm, *settings, item.metric, ratio, int(item.trained), item.n, *numbers]
        )
    return out.getvalue()


def plot(summaries: Sequence[Summary], metric: str, scale: float) -> str:
    """The metric against the kept fraction and against FLOPs, a line per arm, bars of one standard
    deviation over seeds: an `<svg>` with one panel above the other."""
    names = _names(summaries)
    # Columns of the legend, by the longest name.
    longest = max(map(len, names), default=0)
    columns = max(1, min(3, int(72 * figures.WIDTH / (40 + 5.5 * longest))))
    # The legend stands below both panels: the figure grows with its rows.
    height = 6.4 + 0.2 * math.ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(figures.WIDTH, height), layout="constrained")
    first, second = figure.subplots(2, 1, sharey=True)
    value = f"{metric}, %" if scale == 100 else metric
    figures.dress(first, "visual tokens kept, %", value)
    figures.dress(second, "FLOPs, % of the model with all tokens", value)
    # Both panels show the same summaries over another x; nan leaves points without a ratio out of
    # the first.
    for axes, x in ((first, _kept_share), (second, _flops_share)):
        for name in names:
            _line(axes, [item for item in summaries if item.arm == name], x, names, scale)
        for item in summaries:
            # The unpruned model is a level line, because its accuracy belongs to no kept fraction.
            if item.arm == FULL:
                style: dict[str, Any] = {
                    "color": figures.MUTED,
                    "lw": 1.2,
                    "ls": (0, (6, 3)),
                    "zorder": 1,
                }
                axes.axhline(scale * item.mean, label="all tokens", **style)
    look = {"fontsize": 9, "frameon": False, "labelcolor": figures.INK, "ncols": columns}
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", **look)
    what = f"{metric} against kept tokens and against FLOPs: {', '.join(names)}"
    return figures.as_svg(figure, "sweep", what)


def _kept_share(item: Summary) -> float:
    return math.nan if item.keep_ratio is None else 100 * item.keep_ratio


def _flops_share(item: Summary) -> float:
    return 100 * item.flops_ratio


def _line(
    axes: Axes,
    arm: Sequence[Summary],
    x: Callable[[Summary], float],
    names: Sequence[str],
    scale: float,
) -> None:
    # Styles depend on all names, so a line looks alike in both panels and on the page.
    points, known, name = sorted(arm, key=x), figures.styles(names), arm[0].arm
    axes.errorbar(
        [x(item) for item in points],
        [scale * item.mean for item in points],
        yerr=[0.0 if math.isnan(item.sd) else scale * item.sd for item in points],
        label=name,
        color=figures.stand_in(list(known).index(name)),
        ls=known[name][2],
        marker=known[name][3],
        lw=1.6,
        ms=5,
        capsize=2,
        elinewidth=1,
    )


def _over_seeds(summaries: Sequence[Summary], scale: float) -> PageTable:
    ratios = _ratios(summaries)
    places = {(item.arm, item.keep_ratio): item for item in summaries}

    def mean(name: str, column: int) -> TableEntry:
        item = places.get((name, ratios[column]))
        if item is None:
            return TableEntry()
        deviation = "" if math.isnan(item.sd) else f"± {scale * item.sd:.1f}, "
        return TableEntry(
            f"{scale * item.mean:.1f}{'†' if item.trained else ''}", (f"{deviation}n = {item.n}",)
        )

    # All tokens come first, then arms in the order of the sweep.
    arms = list(dict.fromkeys(item.arm for item in summaries))
    names = [FULL, *_names(summaries)] if FULL in arms else _names(summaries)
    return page_table(SPREAD, [ratio_label(ratio) for ratio in ratios], names, mean)


def _table(
    summaries: Sequence[Summary],
    ratios: Sequence[float | None],
    metric: str,
    scale: float,
    plain: bool,
) -> Table:
    title = f"{metric} (%)" if scale == 100 else metric
    table = Table(title=title, box=box.ASCII2 if plain else box.ROUNDED, title_justify="left")
    table.add_column("arm", no_wrap=True)
    places = {(item.arm, item.keep_ratio): item for item in summaries}
    for ratio in ratios:
        table.add_column(ratio_label(ratio), justify="right", no_wrap=True)
    # Only arms with a number in these columns: a wide table is printed in parts.
    for name in dict.fromkeys(item.arm for item in summaries if item.keep_ratio in ratios):
        cells = (places.get((name, ratio)) for ratio in ratios)
        table.add_row(
            name,
            *(
                "" if item is None else _ascii(_text(item, scale)) if plain else _text(item, scale)
                for item in cells
            ),
        )
    return table


def _text(item: Summary, scale: float) -> str:
    spread = "" if math.isnan(item.sd) else f" ± {scale * item.sd:.1f}"
    return f"{scale * item.mean:.1f}{spread} (n={item.n}){'†' if item.trained else ''}"


def _ascii(text: str) -> str:
    return text.replace("±", "+-").replace("†", "*")


def _names(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(item.arm for item in summaries if item.arm != FULL))


def _ratios(summaries: Sequence[Summary]) -> list[float | None]:
    """From large to small; a pruner's own choice last."""
    ratios = {item.keep_ratio for item in summaries}
    return [
        *sorted((r for r in ratios if r is not None), reverse=True),
        *([None] if None in ratios else []),
    ]
