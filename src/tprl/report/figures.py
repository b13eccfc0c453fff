"""Plots of the report: inline SVG that follows the page's colors."""

import html
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tprl.bench.latency import Line
from tprl.evaluation.results import BOUNDS, FULL, Cell, pruner_order

# name: (on light, on dark, line style, marker). Ours are loud, the others are muted; every color is
# legible as text (4.5 to 1) on the page's background.
STYLES: dict[str, tuple[str, str, str, str]] = {
    "tprl": ("#c2410c", "#fb923c", "-", "o"),
    "tprl_lfd": ("#c2410c", "#fb923c", "--", "s"),
    "tprl_adaptive": ("#9a3412", "#fdba74", ":", "D"),
    "mlp": ("#675f94", "#ada4de", "-", "^"),
    "random": ("#6b6760", "#a8a39a", "-", "x"),
    "uniform": ("#3b7578", "#7cbcbf", "-", "v"),
    "pooling": ("#4f7549", "#93c08c", "-", "P"),
    "cls_attention": ("#94586a", "#dc9bae", "-", "<"),
    "vispruner": ("#4b6a9b", "#8fb0e0", "-", ">"),
    "divprune": ("#7d6324", "#d0b25e", "-", "d"),
    "oracle": ("#111827", "#f9fafb", ":", "*"),
}
SPARE = (
    ("#6b7034", "#b5bb72"),
    ("#85597f", "#cf9fc9"),
    ("#87623f", "#cfa57d"),
    ("#4a6f86", "#8dbad3"),
    ("#5f7148", "#a9c08a"),
)
SPARE_MARKERS = "hXp1*s24"  # with five colors: forty pruners before a pair repeats
# stand-ins that `_themed` turns into CSS variables
INK, MUTED, GRID, PAGE = "#fe00ff", "#fe00fe", "#fe00fd", "#fe00fc"
OURS = "tprl"  # the series that stands out
WIDTH, PANEL = 5.2, 3.9  # inches of a plot, and of one of several: legible on a phone and on a desk
LINE = 0.185  # inches from one label to the next


def styles(names: Sequence[str]) -> dict[str, tuple[str, str, str, str]]:
    """The known styles, and spare colors for the other names (in alphabetical order)."""
    unknown = sorted(set(names) - set(STYLES) - {FULL})
    extra = {
        n: (*SPARE[i % len(SPARE)], "-", SPARE_MARKERS[i % len(SPARE_MARKERS)])
        for i, n in enumerate(unknown)
    }
    return STYLES | extra


def color_variables(names: Sequence[str], dark: bool) -> str:
    """CSS declarations `--s0: ...;` of every series, in the order of `styles`."""
    return " ".join(f"--s{i}: {style[dark]};" for i, style in enumerate(styles(names).values()))


def series_color(names: Sequence[str], name: str) -> str:
    """The CSS value of a series' color."""
    return f"var(--s{list(styles(names)).index(name)})"


def pareto(cells: Mapping[str, Mapping[float | None, Cell]], all_names: Sequence[str]) -> str:
    """Accuracy against FLOPs, both in percent, with intervals: an `<svg>`.

    Series are labelled at their cheapest point; a broad line joins the points that no cheaper one
    equals. `all_names` are the pruners of the whole report: they decide the colors of the unknown
    ones.
    """
    table = {name: dict(row) for name, row in cells.items()}
    names = [name for name in pruner_order(table) if name != FULL]
    height = max(4.4, 0.8 + 0.2 * len(names))
    figure, axes = _axes("FLOPs, % of the model with all tokens", "accuracy, %", WIDTH, height)
    known = styles(all_names)
    colors = {name: stand_in(place) for place, name in enumerate(known)}
    points = {}
    for name in names:
        points[name] = sorted(
            (100 * cell.flops_ratio, 100 * cell.value, cell) for cell in table[name].values()
        )
    if FULL in table:
        _full_line(axes, next(iter(table[FULL].values())))
    best = _frontier([(x, y) for name in names if name not in BOUNDS for x, y, _ in points[name]])
    broad: dict[str, Any] = {
        "lw": 9,
        "alpha": 0.22,
        "solid_capstyle": "round",
        "solid_joinstyle": "round",
    }
    x, y = zip(*best, strict=True) if best else ((), ())
    axes.plot(x, y, color=MUTED, zorder=1, **broad)
    for name in reversed(names):  # the best lie on top
        _series(axes, points[name], known[name], colors[name], bold=name == OURS)
    flops = [x for x, *_ in chain.from_iterable(points.values())] or [100.0]
    span = max(max(flops) - min(flops), 1.0)
    axes.set_xlim(min(flops) - 0.55 * span, max(flops) + 0.04 * span)
    ends = [(series[0][1], series[0][0], name) for name, series in points.items()]
    _label_ends(axes, ends, colors, min(flops) - 0.06 * span, height)
    axes.set_xticks(
        [x for x in axes.get_xticks() if min(flops) - 0.06 * span <= x <= axes.get_xlim()[1]]
    )
    axes.set_yticks([y for y in axes.get_yticks() if y <= 100 and y >= axes.get_ylim()[0]])
    return as_svg(
        figure, "pareto", "Accuracy against FLOPs for every pruner; the numbers are in the tables."
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Small line plots over samples seen, an `<svg>` each. Series named `score: ...` share the plot
    `score`."""
    panels: dict[str, list[tuple[str, Sequence[tuple[float, float]]]]] = defaultdict(list)
    for name, points in series.items():
        title, _, label = name.partition(": ")
        panels[title].append((label, _thinned(points)))
    return [_curve(place, title, lines) for place, (title, lines) in enumerate(panels.items())]


def _curve(
    place: int, title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> str:
    figure, axes = _axes("samples seen", "", PANEL, 2.5)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.locator_params(axis="x", nbins=5)  # more labels run into each other
    ends = []
    for i, (label, points) in enumerate(lines):
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else ""
        style: dict[str, Any] = {
            "color": stand_in((0, 8, 6, 3)[i % 4]),
            "ls": ("-", "--", ":", "-.")[i % 4],
        }
        axes.plot(x, y, **style, lw=1.6, marker=marker, ms=3, label=label)
        ends.append(f"{label or title} from {y[0]:.3g} to {y[-1]:.3g}")
    if any(label for label, _ in lines):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")
    return as_svg(figure, f"curves-{place}", f"{title}: {'; '.join(ends)}.")


def _thinned(points: Sequence[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """At most that many points: means of neighbors."""
    size = math.ceil(len(points) / most)
    means = []
    for start in range(0, len(points), size):
        x, y = zip(*points[start : start + size], strict=True)
        means.append((sum(x) / len(x), sum(y) / len(y)))
    return means


def boxes(
    panels: Mapping[str, Sequence[tuple[str, Sequence[float]]]],
    all_names: Sequence[str],
    pruner: str,
) -> list[str]:
    """Small box plots, an `<svg>` each. A box is (label, the 10, 25, 50, 75 and 90 % quantiles)."""
    color = stand_in(list(styles(all_names)).index(pruner))
    drawn = []
    for place, (title, group) in enumerate(panels.items()):
        figure, axes = _axes("tokens kept", "", PANEL, 0.9 + 0.24 * len(group))
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        for y, (_, quantiles) in enumerate(group):
            _box(axes, y, quantiles, color)
        axes.set_yticks(range(len(group)), [label for label, _ in group])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        drawn.append(as_svg(figure, f"boxes-{pruner}-{place}", f"Tokens kept by {pruner}, {title}"))
    return drawn


def _box(axes: Axes, y: int, quantiles: Sequence[float], color: str) -> None:
    low, first, middle, third, high = quantiles
    axes.plot([low, high], [y, y], color=color, lw=1.2)
    axes.plot([first, third], [y, y], color=color, lw=7, solid_capstyle="butt", alpha=0.5)
    axes.plot([middle], [y], color=color, marker="|", ms=10, mew=2)


def speedups(lines: Sequence[Line]) -> str:
    """Measured against predicted speed-up, of the prefill and from pixels to the last token: an
    `<svg>`. A line joins the keep ratios of a pruner at one batch size. On the dashed line it gets
    all that its FLOPs promise; below 1 it is slower than not pruning."""
    names = sorted({line.pruner for line in lines})
    batches = sorted({line.batch for line in lines})
    figure = Figure(figsize=(9.4, 4.6), layout="constrained")
    panels: list[Axes] = [figure.add_subplot(1, 2, place) for place in (1, 2)]
    for axes, (stage, title) in zip(
        panels, (("prefill", "prefill"), ("total", "pixels to last token")), strict=True
    ):
        dress(axes, "speed-up that FLOPs predict", "measured speed-up" if axes is panels[0] else "")
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        end = max(line.predicted(stage) for line in lines)
        axes.plot([1, end], [1, end], color=MUTED, lw=1.2, ls=(0, (6, 3)))
        axes.axhline(1, color=MUTED, lw=0.8)
        for name in names:
            for place, batch in enumerate(batches):
                series = [line for line in lines if (line.pruner, line.batch) == (name, batch)]
                _speedup_series(axes, series, stage, names, marker_size=5 + 2 * place)
    # One entry a pruner, whatever number of batch sizes it has.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        loc="outside right center",
    )
    what = (
        "Measured against predicted speed-up. A line joins the keep ratios of a pruner at one "
        f"batch size; larger marks are larger batches ({', '.join(map(str, batches))})."
    )
    return as_svg(figure, "speedups", what)


def _speedup_series(
    axes: Axes, series: Sequence[Line], stage: str, names: Sequence[str], marker_size: int
) -> None:
    """The keep ratios of a pruner at one batch size: medians on a line, and their quantiles."""
    if not series:
        return
    known, name = styles(names), series[0].pruner
    color = stand_in(list(known).index(name))
    joined = sorted(series, key=lambda line: line.predicted(stage))
    x = [line.predicted(stage) for line in joined]
    spreads = [line.speedup(stage) for line in joined]
    axes.plot(
        x,
        [spread.median for spread in spreads],
        color=color,
        ls=known[name][2],
        lw=1.2,
        marker=known[name][3],
        ms=marker_size,
        label=name,
    )
    for place, spread in zip(x, spreads, strict=True):
        axes.plot([place] * 2, [spread.low, spread.high], color=color, lw=1, alpha=0.55)


def _axes(x: str, y: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, x, y)
    return figure, axes


def dress(axes: Axes, x: str, y: str) -> None:
    """Labels, grid and colors of every plot here."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _series(
    axes: Axes,
    points: Sequence[tuple[float, float, Cell]],
    style: tuple[str, str, str, str],
    color: str,
    bold: bool,
) -> None:
    x = [point[0] for point in points]
    y = [point[1] for point in points]
    low = [max(100 * (c.value - c.low), 0) if c.low == c.low else 0 for *_, c in points]
    high = [max(100 * (c.high - c.value), 0) if c.high == c.high else 0 for *_, c in points]
    axes.errorbar(
        x,
        y,
        yerr=[low, high],
        fmt="none",
        ecolor=color,
        elinewidth=1,
        capsize=2,
        alpha=0.55,
        zorder=2,
    )
    width, size = (2.6, 7) if bold else (1.1, 5)
    axes.plot(
        x, y, color=color, ls=style[2], marker=style[3], lw=width, ms=size, zorder=4 if bold else 3
    )


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that are better than every cheaper one."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _full_line(axes: Axes, cell: Cell) -> None:
    value = 100 * cell.value
    if cell.low == cell.low:
        axes.axhspan(100 * cell.low, 100 * cell.high, color=MUTED, alpha=0.15, lw=0)
    axes.axhline(value, color=MUTED, lw=1.2, ls=(0, (6, 3)), zorder=1)
    place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(
        "all tokens", **place, xytext=(-2, 3), ha="right", va="bottom", color=INK, fontsize=9
    )


def _label_ends(
    axes: Axes,
    ends: list[tuple[float, float, str]],
    colors: Mapping[str, str],
    x: float,
    height: float,
) -> None:
    """Names to the left of the cheapest points, pushed apart, each tied to its point by a thin
    line; the axes are about `height` - 0.6 inches high."""
    low, high = axes.get_ylim()
    step = (high - low) / (height - 0.6) * LINE
    places = _spread([e[0] for e in sorted(ends)], step)
    excess = max(places[-1] - high, 0.0) if places else 0.0
    for y, (value, at, name) in zip(places, sorted(ends), strict=True):
        y -= excess  # a few rows lower, rather than an axis that goes far beyond 100 %
        axes.plot([x, at], [y, value], color=colors[name], lw=0.6, alpha=0.6, zorder=1)
        weight = "bold" if name == OURS else "normal"
        style: dict[str, Any] = {"color": colors[name], "fontsize": 9.5, "fontweight": weight}
        # no line strikes a name through
        style["bbox"] = {"facecolor": PAGE, "edgecolor": "none", "pad": 0.5}
        axes.text(x, y, name + " ", ha="right", va="center", **style)
        low = min(low, y - step)
    axes.set_ylim(low, high)


def _spread(values: Sequence[float], step: float) -> list[float]:
    """Ascending values moved as little as needed (least squares) for neighbors to be `step`
    apart."""
    blocks: list[tuple[float, int]] = []  # pool adjacent violators on value - i * step
    for i, value in enumerate(values):
        block = (value - i * step, 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, size = blocks.pop()
            block = ((mean * size + block[0] * block[1]) / (size + block[1]), size + block[1])
        blocks.append(block)
    flat = [mean for mean, size in blocks for _ in range(size)]
    return [value + i * step for i, value in enumerate(flat)]


def stand_in(index: int) -> str:
    """The color of a series by its place in `styles`, until `as_svg` makes it a CSS variable."""
    return f"#fe01{index:02x}"


def as_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an inline `<svg>`: ids made unique, colors as CSS variables, fonts of the
    page."""
    out = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    svg = re.sub(
        r"font(-family)?: ([^;\"]*?)'[^;\"]*",
        lambda m: f"font{m[1] or ''}: {m[2]}system-ui, sans-serif",
        svg,
    )
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
    return _themed(svg)


def standalone(svg: str, all_names: Sequence[str]) -> str:
    """An `<svg>` of this module as a file of its own, on white: the colors that a page would give
    it are inside."""
    ink = "--page: #ffffff; --ink: #1c1917; --muted: #6b6760; --grid: #e4e2dd;"
    style = (
        f"<style>svg {{ background: #ffffff; {ink} "
        f"{color_variables(all_names, dark=False)} }}</style>"
    )
    head, _, body = svg.partition(">")
    return f"{head}>{style}{body}\n"


def _themed(svg: str) -> str:
    for stand_in, variable in (
        (INK, "--ink"),
        (MUTED, "--muted"),
        (GRID, "--grid"),
        (PAGE, "--page"),
    ):
        svg = svg.replace(stand_in, f"var({variable})")
    return re.sub(r"#fe01([0-9a-f]{2})", lambda m: f"var(--s{int(m[1], 16)})", svg)
