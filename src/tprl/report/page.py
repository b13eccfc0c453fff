"""The pages of the report: Jinja2 templates in `templates/`, and the plain values that they
show."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tprl.evaluation.results import FULL
from tprl.report import figures

TEMPLATES = Path(__file__).with_name("templates")
PHONE = 358  # pixels of a phone's 390 that a table has
SIZES = (8.4, 6.9)  # pixels of a character on a phone, and of a small one


class TableEntry(NamedTuple):
    """What stands in one place of a table: a text, and lines in small type below it."""

    text: str = ""
    small: tuple[str, ...] = ()
    bold: bool = False
    # percent of the full accuracy that is lost: how dark the place is shaded
    lost: float | None = None

    @property
    def width(self) -> float:
        """About how many pixels of a phone it takes, its padding included."""
        lines = [len(self.text) * SIZES[0], *(len(line) * SIZES[1] for line in self.small)]
        return 11 + max(lines)


@dataclass(frozen=True)
class PageTable:
    """A table of pruners: a heading per column, a name per row."""

    caption: str
    columns: Sequence[TableEntry]
    rows: Sequence[tuple[str, Sequence[TableEntry]]]
    shaded: bool = False
    label: str = ""  # of the fold that holds it, where several tables follow each other

    @property
    def scrolls(self) -> bool:
        """Whether a phone is too narrow for it."""
        width = max((TableEntry(name).width for name, _ in self.rows), default=0.0)
        for i, column in enumerate(self.columns):
            width += max(column.width, *(entries[i].width for _, entries in self.rows))
        return width * (0.84 if self.shaded else 1.0) > PHONE


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own: a template, and the values that it reads."""

    heading: str
    template: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return re.sub(r"[^a-z]+", "-", self.heading.lower()).strip("-")


def page_table(
    caption: str,
    columns: Sequence[str | TableEntry],
    names: Sequence[str],
    entry: Callable[[str, int], TableEntry],
    shaded: bool = False,
    label: str = "",
) -> PageTable:
    """A table whose entry of row `name` and column `i` is `entry(name, i)`."""
    headings = [
        column if isinstance(column, TableEntry) else TableEntry(column) for column in columns
    ]
    rows = []
    for name in names:
        rows.append((name, [entry(name, i) for i in range(len(headings))]))
    return PageTable(caption, headings, rows, shaded, label)


def render_page(
    title: str, headline: str, note: str, known: Sequence[str], sections: Sequence[Section | None]
) -> str:
    """The whole document.

    Args:
        title: of the page.
        headline: what was found, in one sentence.
        note: a line under it; none if empty.
        known: all pruners that appear on the page, which decides their colors.
        sections: from top to bottom; None is left out.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        # a number and its sign stay on one line
        headline=headline.replace(" %", "\N{NO-BREAK SPACE}%"),
        note=note,
        sections=[section for section in sections if section is not None],
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        colors=[figures.color_variables(known, dark) for dark in (False, True)],
        color=lambda name: "var(--muted)" if name == FULL else figures.series_color(known, name),
        ours=figures.OURS,
    )


def number(
    value: float, low: float, high: float, bold: bool = False, scale: float = 100.0
) -> TableEntry:
    """A number times `scale` (percent), with its interval in small type; `low` is nan where there
    is none."""
    bounds = () if low != low else (f"{scale * low:.1f} to {scale * high:.1f}",)
    return TableEntry(f"{scale * value:.1f}", bounds, bold)
