"""`report.html`: one self-contained page about one evaluation. No network, no scripts, light and
dark."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from tprl.cost import CONVENTION
from tprl.evaluation.analysis import Paired
from tprl.evaluation.pictures import GalleryItem, Guided
from tprl.evaluation.results import (
    BOUNDS,
    FULL,
    Cell,
    Row,
    grid,
    pruner_order,
    ratio_label,
    ratios,
    span,
    write_atomic,
)
from tprl.report import figures, rasters
from tprl.report.gallery import count_pictures, gallery_section, guided_section, pruners_shown
from tprl.report.page import PageTable, Section, TableEntry, number, page_table, render_page
from tprl.report.spread import TokenSpread, spread_section

HIGHEST = "highest of each column in bold, also where others are level"
NOTES = {  # part of a name: what it says
    "_adaptive": (
        "“_adaptive”: each question has its own number of tokens, the ratio is their mean."
    ),
    "_lfd": "“_lfd” is the policy before PPO.",
    "oracle": "The oracle knows where the answer is and does not compete.",
}


def write_report(
    path: Path,
    *,
    title: str,
    headline: str,
    rows: Sequence[Row],
    paired: Sequence[Paired] = (),
    gallery: Sequence[GalleryItem] = (),
    guided: Guided | None = None,
    spreads: Sequence[TokenSpread] = (),
    learning_curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    facts: Mapping[str, object] | None = None,
    commands: Sequence[str] = (),
    config_yaml: str = "",
    protocol: str = "",
) -> None:
    """Write the page, and its first plot beside it as `pareto.svg`. Sections without material are
    left out; the page stays under 3 MB whatever the number of pictures.

    Args:
        path: `report.html`.
        title: of the page.
        headline: what was found, in one sentence.
        rows: of one model on one dataset.
        paired: differences, shown per `Paired.pruner`.
        gallery: pictures of what was kept.
        guided: the answer to "does it listen to the question?".
        spreads: how many tokens adaptive pruners give to which questions.
        learning_curves: name -> (samples seen, value); `score: sampled` and `score: served` share
            one plot.
        facts: what the numbers are about and where they were made, in words.
        commands: shell lines that made the run and this page.
        config_yaml: the resolved config.
        protocol: how the benchmark counts, where rows hold its own numbers.

    Raises:
        UserError: the folder cannot be written.
        ValueError: rows of several models or datasets.
    """
    cells = grid(rows)
    # Every name of the page gets a color, also names that only pictures or differences show.
    known = sorted(
        {*cells, *chain.from_iterable((p.pruner, p.other) for p in paired), *pruners_shown(gallery)}
    )
    # Pictures share a fixed number of bytes, so their side depends on their number.
    side = rasters.picture_side(count_pictures(gallery, guided))
    # From the result to its reasons: numbers first, then pictures, breakdowns and origin.
    sections = [
        _pareto_section(cells, known),
        _accuracy_section(cells),
        _published_section(rows, pruner_order(cells), protocol),
        gallery_section(gallery, side),
        guided_section(guided, side),
        _families_section(rows, pruner_order(cells)),
        _paired_section(paired, pruner_order(cells)),
        spread_section(spreads, known),
        _curves_section(learning_curves or {}),
        origin_section(facts or {}, commands, config_yaml),
    ]
    write_atomic(path, render_page(title, headline, summary(facts or {}), known, sections))
    write_atomic(
        path.with_name("pareto.svg"), figures.standalone(figures.pareto(cells, known), known)
    )


def summary(facts: Mapping[str, object]) -> str:
    """The line under a headline: how many questions, which split, code and day."""
    parts = [f"{facts['questions']} questions"] if "questions" in facts else []
    parts += [f"{name} {facts[name]}" for name in ("split", "commit", "date") if name in facts]
    return " · ".join(parts)


def _pareto_section(cells: dict[str, dict[float | None, Cell]], known: Sequence[str]) -> Section:
    note = (
        "Every line is one pruner, every point one keep ratio; bars are 95 % intervals "
        "(bootstrap over images; over images and seeds where an arm has several; "
        "Wilson's bound where all answers are right, or all are wrong). The broad pale "
        "line is the frontier: points that are better than every cheaper one."
    )
    figure = {"drawings": [figures.pareto(cells, known)], "note": note}
    fold = {"summary": "What the FLOPs count", "text": CONVENTION}
    return Section("Accuracy against compute", "plots.html", {"figures": [figure], "fold": fold})


def _accuracy_section(cells: dict[str, dict[float | None, Cell]]) -> Section:
    """What is retained of the full accuracy, and the accuracies with their intervals."""
    # The reference is a sentence instead of a row; without it, nothing can be called retained.
    full = next(iter(cells.get(FULL, {}).values()), None)
    others = {name: row for name, row in cells.items() if name != FULL or full is None}
    sentence, tables, notes = "", [], []
    if full is not None:
        bounds = "" if math.isnan(full.low) else f" ({100 * full.low:.1f} to {100 * full.high:.1f})"
        sentence = (
            f"With all {full.kept_tokens:.0f} visual tokens: {100 * full.value:.1f} %{bounds}."
        )
    # Shares of an accuracy of 0 do not exist.
    if others and full is not None and full.value > 0:
        tables.append(_retained_table(others, full.value))
    if others:
        tables.append(_accuracy_table(others))
        # A note appears only if a name in the table needs it.
        notes = [text for mark, text in NOTES.items() if _marked(others, mark)]
        seeds = max(cell.seeds for row in others.values() for cell in row.values())
        if seeds > 1:
            notes.append(
                f"Means over up to {seeds} seeds; their intervals are over images and seeds."
            )
    values = {"full": sentence, "tables": tables, "note": " ".join(notes)}
    return Section("Accuracy by keep ratio", "accuracy.html", values)


def _marked(names: Iterable[str], mark: str) -> bool:
    return any(mark in name for name in names)


def _retained_table(cells: dict[str, dict[float | None, Cell]], full: float) -> PageTable:
    columns, best = ratios(cells), _best(cells)

    def share(name: str, column: int) -> TableEntry:
        cell = cells[name].get(columns[column])
        if cell is None:
            return TableEntry(lost=0.0)
        # Shading follows the loss; bounds are never bold, since they do not compete.
        percent = 100 * cell.value / full
        bold = name not in BOUNDS and cell.value == best[columns[column]]
        return TableEntry(f"{percent:.1f}", bold=bold, lost=100 - percent)

    caption = (
        "Retained: percent of the accuracy with all tokens, by "
        "share of visual tokens kept; shaded where much is lost."
    )
    headings = [ratio_label(ratio) for ratio in columns]
    return page_table(caption, headings, pruner_order(cells), share, shaded=True)


def _accuracy_table(cells: dict[str, dict[float | None, Cell]]) -> PageTable:
    columns, best = ratios(cells), _best(cells)

    def accuracy(name: str, column: int) -> TableEntry:
        ratio = columns[column]
        cell = cells[name].get(ratio)
        if cell is None:
            return TableEntry()
        return number(
            cell.value, cell.low, cell.high, name not in BOUNDS and cell.value == best[ratio]
        )

    caption = f"Accuracy in percent with 95 % intervals; {HIGHEST}."
    headings = []
    for ratio in columns:
        column = [row[ratio] for row in cells.values() if ratio in row]
        headings.append(_ratio_heading(ratio, column))
    return page_table(caption, headings, pruner_order(cells), accuracy)


def _best(cells: dict[str, dict[float | None, Cell]]) -> dict[float | None, float | None]:
    """The best accuracy of each column; bounds do not compete."""
    best: dict[float | None, float | None] = dict.fromkeys(ratios(cells))
    for name, row in cells.items():
        if name in BOUNDS:
            continue
        for ratio, cell in row.items():
            rival = best[ratio]
            best[ratio] = cell.value if rival is None else max(rival, cell.value)
    return best


def _ratio_heading(ratio: float | None, column: Sequence[Cell]) -> TableEntry:
    """A column's heading: the ratio, and what it comes to in tokens and FLOPs."""
    kept = span([cell.kept_tokens for cell in column], ".0f")
    flops = span([cell.flops_ratio for cell in column], ".2f")
    return TableEntry(ratio_label(ratio), (f"{kept} tokens", "FLOPs", f"× {flops}"))


def _families_section(rows: Sequence[Row], names: Sequence[str]) -> Section | None:
    """Families and the overlap of boxes."""
    # Published numbers have another unit and a section of their own.
    published = {row.metric for row in rows if row.metric.startswith(f"{row.dataset}/")}
    metrics = {row.metric for row in rows} - {"accuracy"} - published
    # Families first, then what else is measured.
    ordered = sorted(metrics, key=lambda metric: (not metric.startswith("accuracy/"), metric))
    headings = {metric: metric.removeprefix("accuracy/") for metric in ordered}
    if not headings:
        return None
    caption = f"Percent, with 95 % intervals; {HIGHEST}."
    tables = _tables_by_ratio(rows, headings, names, caption)
    return Section("By kind of question", "tables.html", {"intro": "", "tables": tables})


def _published_section(rows: Sequence[Row], names: Sequence[str], protocol: str) -> Section | None:
    """The benchmark's own numbers in their own unit; its breakdowns are left to results.csv."""
    # A name with two slashes is a breakdown, e.g. mme/score/count.
    published = dict.fromkeys(
        row.metric for row in rows if row.metric.startswith(f"{row.dataset}/")
    )
    headings = {metric: metric.partition("/")[2] for metric in published if metric.count("/") == 1}
    if not headings:
        return None
    caption = f"With 95 % intervals; {HIGHEST}. Breakdowns are in results.csv."
    tables = _tables_by_ratio(rows, headings, names, caption, scale=1.0)
    return Section(
        "As the benchmark counts", "tables.html", {"intro": f"{protocol}.", "tables": tables}
    )


def _tables_by_ratio(
    rows: Sequence[Row],
    headings: Mapping[str, str],
    names: Sequence[str],
    caption: str,
    scale: float = 100.0,
) -> list[PageTable]:
    """One table of metrics (with their headings) per keep ratio, from the smallest."""
    # The ratio of the reference makes no table; what pruners chose by themselves comes last.
    grids = {metric: grid(rows, metric) for metric in headings}
    labels = [heading.replace("_", " ") for heading in headings.values()]
    kept: set[float | None] = set()
    for cells in grids.values():
        for name, row in cells.items():
            kept |= set() if name == FULL else set(row)
    ordered = sorted(kept, key=lambda ratio: (ratio is None, ratio or 0))
    return [_metrics_table(grids, labels, names, ratio, caption, scale) for ratio in ordered]


def _metrics_table(
    grids: Mapping[str, dict[str, dict[float | None, Cell]]],
    headings: Sequence[str],
    names: Sequence[str],
    ratio: float | None,
    caption: str,
    scale: float,
) -> PageTable:
    # The reference appears in every table.
    table: dict[str, dict[str, Cell | None]] = {}
    measured: set[str] = set()
    for metric, rows in grids.items():
        table[metric] = {
            name: row.get(1.0 if name == FULL else ratio) for name, row in rows.items()
        }
        measured |= {name for name, cell in table[metric].items() if cell is not None}
    # Rows without a number in this table are left out, and so is their claim to be best.
    metrics = list(table)
    visible = [name for name in names if name in measured]
    best = {}
    for metric, cells in table.items():
        rivals = [
            cell.value for name, cell in cells.items() if cell is not None and name not in BOUNDS
        ]
        best[metric] = max(rivals, default=None)

    def value(name: str, column: int) -> TableEntry:
        cell = table[metrics[column]].get(name)
        if cell is None:
            return TableEntry()
        bold = name not in BOUNDS and cell.value == best[metrics[column]]
        return number(cell.value, cell.low, cell.high, bold, scale)

    return page_table(
        caption, headings, visible, value, label=f"Visual tokens kept: {ratio_label(ratio)}"
    )


def _paired_section(paired: Sequence[Paired], names: Sequence[str]) -> Section | None:
    if not paired:
        return None
    # A table per pruner of interest: the main arm and its adaptive mode.
    tables = []
    for ours in dict.fromkeys(pair.pruner for pair in paired):
        tables.append(_paired_table(ours, [pair for pair in paired if pair.pruner == ours], names))
    note = (
        "Same questions, same images: positive numbers favor the method "
        "named in the heading. Bold where the 95 % interval excludes zero; "
        "p is two-sided and not corrected for the number of comparisons."
    )
    if any(pair.identical for pair in paired):
        note += (
            " Level: the same score on every image, which leaves nothing to draw an interval from."
        )
    return Section("Paired differences", "paired.html", {"note": note, "tables": tables})


def _paired_table(ours: str, paired: Sequence[Paired], names: Sequence[str]) -> PageTable:
    ratios = {pair.keep_ratio for pair in paired}
    columns = sorted(ratios, key=lambda ratio: -math.inf if ratio is None else ratio, reverse=True)
    pairs = {(pair.other, pair.keep_ratio): pair for pair in paired}

    def difference(name: str, column: int) -> TableEntry:
        pair = pairs.get((name, columns[column]))
        if pair is None:
            return TableEntry()
        if pair.identical:
            return TableEntry("level")
        # Bounds are nan where images are too few for an interval: then only the difference is
        # shown.
        bounds = ""
        if not math.isnan(pair.low):
            p = "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
            bounds = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}, p {p}"
        return TableEntry(
            f"{100 * pair.difference:+.1f}", (bounds,), bold=pair.low > 0 or pair.high < 0
        )

    caption = f"{ours} minus each other pruner, in percentage points"
    compared = dict.fromkeys(pair.other for pair in paired)
    # The order of the other tables first, then names that have no accuracy there.
    others = [name for name in names if name in compared]
    others += [name for name in compared if name not in others]
    headings = [ratio_label(ratio) for ratio in columns]
    return page_table(caption, headings, others, difference, label=ours)


def _curves_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Section | None:
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return None
    note = (
        "Accuracies are those of validation questions, served as in inference, "
        "unless they are called sampled. A sample is a visual token "
        "(autoencoder), a question (lfd, distill, adapt) or an episode (ppo)."
    )
    figure = {"drawings": figures.curves(drawn), "note": note}
    return Section("Training", "plots.html", {"figures": [figure], "fold": None})


def origin_section(
    facts: Mapping[str, object], commands: Sequence[str], config_yaml: str
) -> Section | None:
    """The shell lines, facts and config behind a page; nothing without them."""
    if not (facts or commands or config_yaml):
        return None
    values = {"facts": facts, "commands": commands, "config_yaml": config_yaml}
    return Section("How this was made", "origin.html", values)
