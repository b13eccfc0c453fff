"""The building blocks of the report's HTML: style, sections, tables, numbers. Every function returns HTML."""

import math
from collections.abc import Callable, Sequence
from html import escape

from tprl.evaluation import figures
from tprl.evaluation.results import FULL

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f6f6f4; --ink: #1c1917; --muted: #6b6760; --grid: #e4e2dd;
  --accent: #c2410c; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --panel: #201f1c; --ink: #ece9e4; --muted: #a09b92;
  --grid: #36342f; --accent: #fb923c; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem } p { max-width: 46rem; margin: .5rem 0 }
.headline { font-size: 1.15rem } .note, figcaption { color: var(--muted); font-size: .85rem }
figure { margin: 0 } .scroll { overflow-x: auto } .scroll:focus-visible { outline: 2px solid var(--accent) }
.plot svg { display: block; width: 100%%; min-width: 38rem; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid);
  vertical-align: top } th:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
thead th { font-weight: 600; vertical-align: bottom } thead small, td small { display: block; color: var(--muted);
  font-size: .78rem; font-weight: 400 } tbody th { font-weight: 400 } tr.ours th { font-weight: 700 }
td strong { font-weight: 750 } .swatch { display: inline-block; width: .65em; height: .65em; border-radius: 50%%;
  margin-right: .45em }
.item { margin: 1.25rem 0 2rem } .panels { display: grid; gap: .9rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.panels img { width: 100%%; height: auto; display: block; border-radius: 4px; background: var(--panel) }
.panels figcaption { margin-top: .25rem; line-height: 1.35; overflow-wrap: anywhere }
.panels b { color: var(--ink); font-weight: 600 } .answer { color: var(--ink) }
pre { background: var(--panel); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem }
summary { cursor: pointer; margin: .75rem 0 } dl { display: grid; grid-template-columns: auto 1fr; gap: .3rem 1.2rem }
dd { margin: 0; font-variant-numeric: tabular-nums }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr } dd { margin: 0 0 .5rem } }
"""


def page(title: str, headline: str, known: Sequence[str], sections: Sequence[str]) -> str:
    """The whole document; `known` are all pruners that appear in it, which decides their colours."""
    light, dark = (figures.colour_variables(known, dark) for dark in (False, True))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE % {"light": light, "dark": dark}}</style></head>
<body><main><header><h1>{escape(title)}</h1><p class="headline">{escape(headline)}</p></header>
{"".join(sections)}</main></body></html>
"""


def section(heading: str, *parts: str) -> str:
    """A section under a heading of second level; `parts` are HTML."""
    return f"<section><h2>{escape(heading)}</h2>\n{''.join(parts)}</section>\n"


def table(
    caption: str,
    columns: Sequence[str],
    names: Sequence[str],
    known: Sequence[str],
    cell: Callable[[str, int], str],
) -> str:
    """A scrolling table. `columns` and what `cell(name, column)` returns are HTML; `known` decides the colours."""
    head = "".join(f'<th scope="col">{column}</th>' for column in ["pruner", *columns])
    body = "".join(
        f"<tr{_ours(name)}><th scope='row'>{swatch(known, name)}{escape(name)}</th>"
        + "".join(f"<td>{cell(name, i)}</td>" for i in range(len(columns)))
        + "</tr>\n"
        for name in names
    )
    return (  # the caption stays outside of what scrolls: on a phone it would be cut off
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div></figure>\n"
    )


def _ours(name: str) -> str:
    return ' class="ours"' if name == "tprl" else ""


def swatch(known: Sequence[str], name: str) -> str:
    """A dot in the pruner's colour."""
    colour = "var(--muted)" if name == FULL else figures.series_colour(known, name)
    return f'<span class="swatch" style="background: {colour}"></span>'


def number(value: float, low: float, high: float, best: bool = False, scale: float = 100.0) -> str:
    """A number times `scale` (percent), with its interval in small type."""
    text = f"<strong>{scale * value:.1f}</strong>" if best else f"{scale * value:.1f}"
    return text if math.isnan(low) else f"{text}<small>{scale * low:.1f} to {scale * high:.1f}</small>"
