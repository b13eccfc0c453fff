"""The building blocks of the report's HTML: style, sections, tables, numbers. Every function returns HTML."""

import math
import re
from collections.abc import Callable, Sequence
from html import escape, unescape
from pathlib import Path

from tprl.evaluation.results import FULL
from tprl.report import figures

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
SHADED = ' class="shaded"'
PHONE = 358  # pixels of a phone's 390 that a table has
HINT = '<p class="hint" aria-hidden="true">Scroll sideways for more columns →</p>'


def page(title: str, headline: str, note: str, known: Sequence[str], sections: Sequence[str]) -> str:
    """The whole document; `known` are all pruners that appear in it, which decides their colours."""
    light, dark = (figures.colour_variables(known, dark) for dark in (False, True))
    colours = f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    finding = escape(headline).replace(" %", "&nbsp;%")  # a number and its sign stay on one line
    under = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{colours}{STYLE}</style></head>
<body><a class="skip" href="#content">Skip to the results</a>
<main><header><h1>{escape(title)}</h1><p class="headline">{finding}</p>{under}{_contents(sections)}</header>
<div id="content" tabindex="-1">
{"".join(sections)}</div></main></body></html>
"""


def _contents(sections: Sequence[str]) -> str:
    """Links to the sections that are there."""
    found = [match for text in sections if (match := re.match(r'<section id="(.*?)".*?><h2.*?>(.*?)</h2>', text))]
    links = "".join(f'<li><a href="#{match[1]}">{match[2]}</a></li>' for match in found)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def section(heading: str, *parts: str) -> str:
    """A section under a heading of second level; `parts` are HTML."""
    name = re.sub(r"[^a-z]+", "-", heading.lower()).strip("-")
    head = f'<h2 id="{name}-heading">{escape(heading)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-heading">{head}\n{"".join(parts)}</section>\n'


def plot(draw: Callable[[bool], str], note: str) -> str:
    """A plot in two shapes, one of which is shown: `draw(narrow)` gives the `<svg>`."""
    shapes = "".join(f'<div class="{("wide", "narrow")[narrow]}">{draw(narrow)}</div>' for narrow in (False, True))
    return f'<figure class="plot">{shapes}<figcaption>{escape(note)}</figcaption></figure>\n'


def table(
    caption: str,
    columns: Sequence[str],
    names: Sequence[str],
    known: Sequence[str],
    cell: Callable[[str, int], str],
    lost: Callable[[str, int], float] | None = None,
) -> str:
    """A scrolling table. `columns` and what `cell(name, column)` returns are HTML; `known` decides the colours, and
    `lost(name, column)`, in percent, how dark a cell is shaded."""
    head = "".join(f'<th scope="col">{column}</th>' for column in ["pruner", *columns])
    cells = {name: [cell(name, i) for i in range(len(columns))] for name in names}
    body = "".join(
        f"<tr{_ours(name)}><th scope='row'>{swatch(known, name)}{escape(name)}</th>"
        + "".join(f"<td{_shade(lost, name, i)}>{text}</td>" for i, text in enumerate(cells[name]))
        + "</tr>\n"
        for name in names
    )
    texts = [[*names], *([columns[i], *(row[i] for row in cells.values())] for i in range(len(columns)))]
    scrolls = sum(max(map(_width, column), default=0.0) for column in texts) * (0.84 if lost else 1.0) > PHONE
    return (  # the caption stays outside of what scrolls: on a phone it would be cut off
        f"<figure><figcaption>{escape(caption)}</figcaption>{HINT if scrolls else ''}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table{SHADED if lost else ''}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div></figure>\n"
    )


def _width(text: str) -> float:
    """About how many pixels of a phone the HTML of a cell takes, its padding included."""
    sizes = {False: 8.4, True: 6.9}  # of a character, and a small one
    parts = [part.partition("</small>")[::2] if i else ("", part) for i, part in enumerate(text.split("<small>"))]
    lines = [
        (len(unescape(re.sub("<.*?>", "", line))), small)
        for part in parts
        for line, small in zip(part, (True, False), strict=True)
    ]
    return 11 + max(count * sizes[small] for count, small in lines)


def _shade(lost: Callable[[str, int], float] | None, name: str, column: int) -> str:
    return f' style="--lost: {min(max(lost(name, column), 0), 60):.0f}"' if lost else ""


def _ours(name: str) -> str:
    return ' class="ours"' if name == figures.OURS else ""


def swatch(known: Sequence[str], name: str) -> str:
    """A dot in the pruner's colour."""
    colour = "var(--muted)" if name == FULL else figures.series_colour(known, name)
    return f'<span class="swatch" style="background: {colour}"></span>'


def number(value: float, low: float, high: float, best: bool = False, scale: float = 100.0) -> str:
    """A number times `scale` (percent), with its interval in small type."""
    text = f"<strong>{scale * value:.1f}</strong>" if best else f"{scale * value:.1f}"
    return text if math.isnan(low) else f"{text}<small>{scale * low:.1f} to {scale * high:.1f}</small>"
