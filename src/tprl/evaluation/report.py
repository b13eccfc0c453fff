"""`report.html`: one self-contained page about one evaluation. No network, no scripts, light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tprl.cost import CONVENTION
from tprl.evaluation import figures
from tprl.evaluation.gallery import GalleryItem, Guided, gallery_section, guided_section, pictures, pruners_shown
from tprl.evaluation.page import number, page, section, table
from tprl.evaluation.results import BOUNDS, FULL, Cell, Row, grid, pruner_order, ratio_label, ratios, span, write_atomic
from tprl.evaluation.spread import Spread, spread_section


@dataclass(frozen=True)
class Paired:
    """Accuracy of `pruner` minus accuracy of `other` on the same samples, with its interval."""

    pruner: str
    other: str
    keep_ratio: float | None
    difference: float
    low: float
    high: float
    p_value: float


def write_report(
    path: Path,
    *,
    title: str,
    headline: str,
    rows: Sequence[Row],
    paired: Sequence[Paired] = (),
    gallery: Sequence[GalleryItem] = (),
    guided: Guided | None = None,
    spreads: Sequence[Spread] = (),
    learning_curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    commands: Sequence[str] = (),
    config_yaml: str = "",
    protocol: str = "",
) -> None:
    """Write the page, and its first plot beside it as `pareto.svg`. Sections without material are left out; the page
    stays under 3 MB whatever the number of pictures.

    Args:
        path: `report.html`.
        title: of the page.
        headline: what was found, in one sentence.
        rows: of one model on one dataset.
        paired: differences, shown per `Paired.pruner`.
        gallery: pictures of what was kept.
        guided: the answer to "does it listen to the question?".
        spreads: how many tokens adaptive pruners give to which questions.
        learning_curves: name -> (samples seen, value); `score: sampled` and `score: served` share one plot.
        commands: shell lines that made the run and this page.
        config_yaml: the resolved config.
        protocol: how the benchmark counts, where rows hold its own numbers.

    Raises:
        UserError: the folder cannot be written.
        ValueError: rows of several models or datasets.
    """
    cells = grid(rows)
    known = sorted({*cells, *(n for p in paired for n in (p.pruner, p.other)), *pruners_shown(gallery)})
    side = figures.picture_side(pictures(gallery, guided))
    sections = [
        _pareto_section(cells, known),
        _accuracy_section(cells, known),
        _published_section(rows, pruner_order(cells), known, protocol),
        _families_section(rows, pruner_order(cells), known),
        _paired_section(paired, pruner_order(cells), known),
        spread_section(spreads, known),
        gallery_section(gallery, known, side),
        guided_section(guided, side),
        _curves_section(learning_curves or {}),
        _origin_section(commands, config_yaml),
    ]
    write_atomic(path, page(title, headline, known, sections))
    write_atomic(path.with_name("pareto.svg"), figures.standalone(figures.pareto(cells, known), known))


def _pareto_section(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> str:
    note = (
        "Every line is one pruner, every point one keep ratio; bars are 95 % intervals (bootstrap over images). "
        "Points of one ratio are spread sideways a little so that their bars can be told apart. " + CONVENTION
    )
    plot = f'<div class="scroll" tabindex="0" role="region" aria-label="Plot">{figures.pareto(cells, known)}</div>'
    caption = f"<figcaption>{escape(note)}</figcaption>"
    return section("Accuracy against compute", f'<figure class="plot">{plot}{caption}</figure>')


def _accuracy_section(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> str:
    columns, names = ratios(cells), pruner_order(cells)
    rivals = [name for name in names if name not in BOUNDS]
    best = {r: max((cells[n][r].value for n in rivals if r in cells[n]), default=None) for r in columns}

    def cell(name: str, column: int) -> str:
        ratio = columns[column]
        found = cells[name].get(ratio)
        if found is None:
            return ""
        return number(found.value, found.low, found.high, name in rivals and found.value == best[ratio])

    caption = "Accuracy in percent with 95 % intervals, by share of visual tokens kept; best of each column in bold."
    heads = [_ratio_head(ratio, [row[ratio] for row in cells.values() if ratio in row]) for ratio in columns]
    notes = ["keep_all is the model with all its tokens."] if FULL in cells else []
    notes += ["The oracle knows where the answer is and does not compete."] if "oracle" in cells else []
    seeds = max(cell.seeds for row in cells.values() for cell in row.values())
    notes += [f"Means over up to {seeds} seeds; intervals are those of one seed."] if seeds > 1 else []
    note = f'<p class="note">{" ".join(notes)}</p>'
    return section("Accuracy by keep ratio", table(caption, heads, names, known, cell), note if notes else "")


def _ratio_head(ratio: float | None, column: Sequence[Cell]) -> str:
    """A column's heading: the ratio, and what it comes to in tokens and FLOPs."""
    kept, flops = span([c.kept_tokens for c in column], ".0f"), span([c.flops_ratio for c in column], ".2f")
    return f"{ratio_label(ratio)}<small>{kept} tokens</small><small>FLOPs × {flops}</small>"


def _families_section(rows: Sequence[Row], names: Sequence[str], known: Sequence[str]) -> str:
    """Families and the overlap of boxes."""
    own = {row.metric for row in rows if row.metric.startswith(f"{row.dataset}/")}
    metrics = sorted(
        {row.metric for row in rows} - {"accuracy"} - own, key=lambda m: (not m.startswith("accuracy/"), m)
    )
    heads = {metric: metric.removeprefix("accuracy/") for metric in metrics}
    caption = "Percent, with 95 % intervals; best of each column in bold."
    return section("By kind of question", *_by_ratio(rows, heads, names, known, caption)) if heads else ""


def _published_section(rows: Sequence[Row], names: Sequence[str], known: Sequence[str], protocol: str) -> str:
    """The benchmark's own numbers in their own unit; its breakdowns are left to results.csv."""
    own = dict.fromkeys(row.metric for row in rows if row.metric.startswith(f"{row.dataset}/"))
    heads = {metric: metric.partition("/")[2] for metric in own if metric.count("/") == 1}
    caption = "With 95 % intervals; best of each column in bold. Breakdowns are in results.csv."
    parts = _by_ratio(rows, heads, names, known, caption, 1.0)
    return section("As the benchmark counts", f"<p>{escape(protocol)}.</p>", *parts) if heads else ""


def _by_ratio(
    rows: Sequence[Row],
    heads: Mapping[str, str],
    names: Sequence[str],
    known: Sequence[str],
    caption: str,
    scale: float = 100.0,
) -> list[str]:
    """One table of metrics (with their headings) per keep ratio, the smallest open."""
    grids = {metric: grid(rows, metric) for metric in heads}
    labels = [escape(head.replace("_", " ")) for head in heads.values()]
    columns = sorted(
        {r for cells in grids.values() for name, row in cells.items() if name != FULL for r in row},
        key=lambda r: (r is None, r or 0),
    )
    tables = [_metrics_table(grids, labels, names, known, ratio, caption, scale) for ratio in columns]
    return [
        f"<details{'' if i else ' open'}><summary>Visual tokens kept: {ratio_label(ratio)}</summary>{text}</details>"
        for i, (ratio, text) in enumerate(zip(columns, tables, strict=True))
    ]


def _metrics_table(
    grids: Mapping[str, dict[str, dict[float | None, Cell]]],
    heads: Sequence[str],
    names: Sequence[str],
    known: Sequence[str],
    ratio: float | None,
    caption: str,
    scale: float,
) -> str:
    metrics = list(grids)

    def look(name: str, column: int) -> Cell | None:
        own = grids[metrics[column]].get(name, {})
        return own.get(1.0) if name == FULL else own.get(ratio)  # the reference appears in every table

    shown = [name for name in names if any(look(name, i) for i in range(len(metrics)))]
    rivals = [name for name in shown if name not in BOUNDS]
    best = [max((c.value for n in rivals if (c := look(n, i))), default=None) for i in range(len(metrics))]

    def cell(name: str, column: int) -> str:
        found = look(name, column)
        bold = found is not None and name in rivals and found.value == best[column]
        return number(found.value, found.low, found.high, bold, scale) if found else ""

    return table(caption, heads, shown, known, cell)


def _paired_section(paired: Sequence[Paired], names: Sequence[str], known: Sequence[str]) -> str:
    groups = ((ours, [p for p in paired if p.pruner == ours]) for ours in _unique(paired, "pruner"))
    parts = [_paired_table(ours, group, names, known) for ours, group in groups]
    note = (
        "Same questions, same images: positive numbers favour the method named in the heading. Bold where the 95 % "
        "interval excludes zero; p is two-sided and not corrected for the number of comparisons."
    )
    return section("Paired differences", f"<p>{escape(note)}</p>", *parts) if parts else ""


def _paired_table(ours: str, paired: Sequence[Paired], names: Sequence[str], known: Sequence[str]) -> str:
    columns = sorted(_unique(paired, "keep_ratio"), key=lambda r: -math.inf if r is None else r, reverse=True)
    found = {(p.other, p.keep_ratio): p for p in paired}

    def cell(name: str, column: int) -> str:
        p = found.get((name, columns[column]))
        if p is None:
            return ""
        sure = p.low > 0 or p.high < 0
        value = f"{100 * p.difference:+.1f}"
        head = f"<strong>{value}</strong>" if sure else value
        bounds = "" if math.isnan(p.low) else f"{100 * p.low:+.1f} to {100 * p.high:+.1f}, p {_p_text(p.p_value)}"
        return f"{head}<small>{bounds}</small>"

    caption = f"{ours} minus each other pruner, in percentage points"
    named = _unique(paired, "other")
    others = [*(n for n in names if n in named), *(n for n in named if n not in names)]
    heads = [escape(ratio_label(ratio)) for ratio in columns]
    shown = table(caption, heads, others, known, cell)
    return f"<h3>{escape(ours)}</h3>{shown}"


def _unique(items: Sequence[Paired], name: str) -> list:
    return list(dict.fromkeys(getattr(item, name) for item in items))


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _curves_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return ""
    plot = f'<div class="scroll" tabindex="0" role="region" aria-label="Plots">{figures.curves(drawn)}</div>'
    return section("Training", f'<figure class="plot">{plot}</figure>')


def _origin_section(commands: Sequence[str], config_yaml: str) -> str:
    shell = f"<pre><code>{escape(chr(10).join(commands))}</code></pre>" if commands else ""
    config = (
        f"<details><summary>Resolved config</summary><pre><code>{escape(config_yaml)}</code></pre></details>"
        if config_yaml
        else ""
    )
    return section("How this was made", shell, config) if shell or config else ""
