"""`report.html`: one self-contained page about one evaluation. No network, no scripts, light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tprl.cost import CONVENTION
from tprl.evaluation.results import BOUNDS, FULL, Cell, Row, grid, pruner_order, ratio_label, ratios, span, write_atomic
from tprl.evaluation.statistics import identical
from tprl.report import figures
from tprl.report.gallery import GalleryItem, Guided, gallery_section, guided_section, pictures, pruners_shown
from tprl.report.page import number, page, plot, section, table
from tprl.report.spread import Spread, spread_section

NOTES = {  # how a name ends: what it says
    "_adaptive": "“_adaptive” gives every question its own number of tokens; the ratio is their mean.",
    "_lfd": "“_lfd” is the policy before PPO.",
    "oracle": "The oracle knows where the answer is and does not compete.",
}


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

    @property
    def identical(self) -> bool:
        """Whether the two score the same on every image, which says nothing of an interval."""
        return identical(self.difference, self.low, self.high)


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
    facts: Mapping[str, object] | None = None,
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
        facts: what the numbers are about and where they were made, in words.
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
        gallery_section(gallery, known, side),
        guided_section(guided, side),
        _families_section(rows, pruner_order(cells), known),
        _paired_section(paired, pruner_order(cells), known),
        spread_section(spreads, known),
        _curves_section(learning_curves or {}),
        origin_section(facts or {}, commands, config_yaml),
    ]
    write_atomic(path, page(title, headline, summary(facts or {}), known, sections))
    write_atomic(path.with_name("pareto.svg"), figures.standalone(figures.pareto(cells, known), known))


def summary(facts: Mapping[str, object]) -> str:
    """The line under a headline: how many questions, which split, code and day."""
    shown = [f"{facts['questions']} questions"] if "questions" in facts else []
    return " · ".join(shown + [f"{name} {facts[name]}" for name in ("split", "commit", "date") if name in facts])


def _pareto_section(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> str:
    note = (
        "Every line is one pruner, every point one keep ratio; bars are 95 % intervals (bootstrap over images; "
        "over images and seeds where an arm has several; Wilson's bound where all answers are right, or all are "
        "wrong). The broad pale line is the frontier: points that are better than every cheaper one."
    )
    drawn = plot(lambda narrow: figures.pareto(cells, known, narrow), note)
    count = f'<details class="note"><summary>What the FLOPs count</summary><p>{escape(CONVENTION)}</p></details>'
    return section("Accuracy against compute", drawn, count)


def _accuracy_section(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> str:
    """What is retained of the full accuracy, and the accuracies with their intervals."""
    full = next(iter(cells.get(FULL, {}).values()), None)
    others = {name: row for name, row in cells.items() if name != FULL or full is None}
    parts = []
    if full is not None:
        bounds = "" if math.isnan(full.low) else f" ({100 * full.low:.1f} to {100 * full.high:.1f})"
        parts.append(f"<p>With all {full.kept_tokens:.0f} visual tokens: {100 * full.value:.1f} %{bounds}.</p>")
    if others:
        parts.append(_retained_table(others, full.value, known) if full is not None and full.value > 0 else "")
        parts.append(_accuracy_table(others, known))
        notes = [text for mark, text in NOTES.items() if any(name.endswith(mark) for name in others)]
        seeds = max(cell.seeds for row in others.values() for cell in row.values())
        notes += [f"Means over up to {seeds} seeds; their intervals are over images and seeds."] if seeds > 1 else []
        parts.append(f'<p class="note">{" ".join(notes)}</p>' if notes else "")
    return section("Accuracy by keep ratio", *parts)


def _retained_table(cells: dict[str, dict[float | None, Cell]], full: float, known: Sequence[str]) -> str:
    columns = ratios(cells)
    best = _best(cells)

    def share(name: str, column: int) -> float | None:
        found = cells[name].get(columns[column])
        return None if found is None else 100 * found.value / full

    def cell(name: str, column: int) -> str:
        found = share(name, column)
        if found is None:
            return ""
        bold = name not in BOUNDS and cells[name][columns[column]].value == best[columns[column]]
        return f"<strong>{found:.1f}</strong>" if bold else f"{found:.1f}"

    def lost(name: str, column: int) -> float:
        found = share(name, column)
        return 0.0 if found is None else 100 - found

    caption = (
        "Retained: percent of the accuracy with all tokens, by share of visual tokens kept; shaded where much is lost."
    )
    return table(caption, [escape(ratio_label(r)) for r in columns], pruner_order(cells), known, cell, lost)


def _accuracy_table(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> str:
    columns, best = ratios(cells), _best(cells)

    def cell(name: str, column: int) -> str:
        ratio = columns[column]
        found = cells[name].get(ratio)
        if found is None:
            return ""
        return number(found.value, found.low, found.high, name not in BOUNDS and found.value == best[ratio])

    caption = "Accuracy in percent with 95 % intervals; best of each column in bold."
    heads = [_ratio_head(ratio, [row[ratio] for row in cells.values() if ratio in row]) for ratio in columns]
    return table(caption, heads, pruner_order(cells), known, cell)


def _best(cells: dict[str, dict[float | None, Cell]]) -> dict[float | None, float | None]:
    """The best accuracy of each column; bounds do not compete."""
    rivals = [row for name, row in cells.items() if name not in BOUNDS]
    return {ratio: max((row[ratio].value for row in rivals if ratio in row), default=None) for ratio in ratios(cells)}


def _ratio_head(ratio: float | None, column: Sequence[Cell]) -> str:
    """A column's heading: the ratio, and what it comes to in tokens and FLOPs."""
    kept, flops = span([c.kept_tokens for c in column], ".0f"), span([c.flops_ratio for c in column], ".2f")
    return f"{ratio_label(ratio)}<small>{kept} tokens</small><small>FLOPs</small><small>× {flops}</small>"


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
    if any(p.identical for p in paired):
        note += " Level: the same score on every image, which leaves nothing to draw an interval from."
    return section("Paired differences", f"<p>{escape(note)}</p>", *parts) if parts else ""


def _paired_table(ours: str, paired: Sequence[Paired], names: Sequence[str], known: Sequence[str]) -> str:
    columns = sorted(_unique(paired, "keep_ratio"), key=lambda r: -math.inf if r is None else r, reverse=True)
    found = {(p.other, p.keep_ratio): p for p in paired}

    def cell(name: str, column: int) -> str:
        p = found.get((name, columns[column]))
        if p is None:
            return ""
        if p.identical:
            return "<em>level</em>"
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
    note = (
        "Accuracies are those of validation questions, served as in inference, unless they are called sampled. A "
        "sample is a visual token (autoencoder), a question (lfd, distill, adapt) or an episode (ppo)."
    )
    return section("Training", plot(lambda narrow: figures.curves(drawn, narrow), note))


def origin_section(facts: Mapping[str, object], commands: Sequence[str], config_yaml: str) -> str:
    """The shell lines, facts and config behind a page; nothing without them."""
    shell = f'<pre class="commands"><code>{escape(chr(10).join(commands))}</code></pre>' if commands else ""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    text = f'<pre tabindex="0"><code>{escape(config_yaml)}</code></pre>'
    config = f"<details><summary>Resolved config</summary>{text}</details>" if config_yaml else ""
    about = f"<dl>{terms}</dl>" if terms else ""
    return section("How this was made", shell, about, config) if shell or about or config else ""
