"""A comparison as HTML: what was kept, both answers, what they took."""

from html import escape

from PIL import Image

from tprl.bench.latency import STAGES
from tprl.cost import CONVENTION
from tprl.demo.compare import Comparison, Result
from tprl.report import rasters

SIDE = 360  # pixels of the longer side of a picture
NOTE = (
    "Bright patches are what the language model saw. Milliseconds on this machine, one "
    "question at a time, the faster of two runs: vision is preprocessing, tower and "
    "projector; selector is the pruner, with the removal of tokens; prefill goes up to "
    "the first token of the answer, and holds what a pruner between layers does; "
    "decode is the rest. FLOPs are of an answer as long as that with all tokens. "
)
STYLE = """
.answers { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent) }
.answers .cards { display: grid; gap: 1rem; align-items: start }
.answers .cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.answers .card { border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: .9rem; min-width: 0 }
.answers h2 { margin: 0 0 .8rem; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere }
.answers h3 { margin: 0 0 .6rem; font-size: 1rem; font-weight: 600 }
.answers figure { margin: 0 }
.answers img { width: 100%; max-height: 24rem; object-fit: contain;
  display: block; border-radius: 4px; margin: 0 }
.answers p { margin: .3rem 0 }
.answers .said { font-size: 1.3rem; font-weight: 600; margin: .7rem 0 0; overflow-wrap: anywhere }
.answers .same, .answers .other { font-size: .9rem; margin-bottom: .6rem }
.answers .same { color: var(--quiet) }
.answers .other { color: light-dark(#b45309, #fbbf24) }
.answers.answers table, .answers.answers tr, .answers.answers th, .answers.answers td { border: 0;
  background: none }
.answers.answers table { width: 100%; margin: 0;
  border-collapse: collapse; font-variant-numeric: tabular-nums }
.answers.answers th { text-align: left; font-weight: 400; padding: .15rem 0; white-space: nowrap }
.answers.answers td { text-align: right; padding: .15rem 0 .15rem .6rem; white-space: nowrap }
.answers.answers .part th { padding-left: .8rem }
.answers .part, .answers td + td { color: var(--quiet) }
.answers summary { cursor: pointer; padding: .3rem 0 }
.answers .fine { color: var(--quiet); font-size: .82rem; margin-top: 1rem }
"""


def cards(comparison: Comparison) -> str:
    """A sentence, the answer with all tokens, then one card per pruner."""
    # The card with all tokens comes first, because every other card is compared with it.
    panels = "".join(_card(comparison, result) for result in (comparison.full, *comparison.pruned))
    sentences = "<br>".join(escape(_sentence(comparison, result)) for result in comparison.pruned)
    return (
        f'<div class="answers"><h2>{escape(comparison.question)}</h2>'
        f'<p role="status">{sentences}</p>'
        f'<div class="cards">{panels}</div><p class="fine">{NOTE}{CONVENTION}</p></div>'
    )


def _sentence(comparison: Comparison, result: Result) -> str:
    same = (
        "gives the same answer"
        if result.answer == comparison.full.answer
        else "gives another answer"
    )
    share = f"{100 * result.flops / comparison.full.flops:.0f} % of the FLOPs"
    return (
        f"With {result.kept:.4g} of {comparison.full.kept:.0f} "
        f"visual tokens and {share}, {result.pruner} {same}."
    )


def _card(comparison: Comparison, result: Result) -> str:
    # Equality is by words, as a reader judges it; scores need a reference that the page lacks.
    full = result is comparison.full
    if full:
        verdict = '<p class="same">what pruning is compared with</p>'
    elif result.answer == comparison.full.answer:
        verdict = '<p class="same">✓ the same answer</p>'
    else:
        verdict = '<p class="other">≠ another answer</p>'
    title = "all tokens" if full else escape(result.pruner)
    answer = f"“{escape(result.answer)}”" if result.answer else "(no words)"
    return (
        f'<section class="card" aria-label="{title}"><h3>{title}</h3>{_kept(comparison, result)}'
        f'<p class="said">{answer}</p>{verdict}{_numbers(comparison, result)}'
        f"{_probability(comparison, result)}</section>"
    )


def _numbers(comparison: Comparison, result: Result) -> str:
    full, reading = comparison.full, result.reading
    # Every number stands beside its share of the unpruned one.
    rows = [
        ("visual tokens", f"{result.kept:.4g} of {full.kept:.0f}", result.kept / full.kept),
        ("FLOPs", flops_text(result.flops), result.flops / full.flops),
        ("time", f"{reading.total:.3g} ms", reading.total / full.reading.total),
    ]
    body = ""
    for name, value, ratio in rows:
        share = "" if result is full else f"{100 * ratio:.0f} %"
        body += f'<tr><th scope="row">{name}</th><td>{value}</td><td>{share}</td></tr>'
    # The parts of the time follow it; without pruning there is no selector to time.
    for stage in STAGES:
        taken = (
            "–" if result is full and stage == "selector" else f"{getattr(reading, stage):.3g} ms"
        )
        body += f'<tr class="part"><th scope="row">{stage}</th><td>{taken}</td><td></td></tr>'
    return f"<table><tbody>{body}</tbody></table>"


def _kept(comparison: Comparison, result: Result) -> str:
    # What is merged or dropped between layers has no single mask to show.
    if result.keep is None:
        alt = "The whole image: tokens are merged, or dropped between layers"
        return _figure(rasters.plain_picture(comparison.image, SIDE), alt)
    return _figure(
        rasters.mask_picture(comparison.image, result.keep, SIDE, comparison.seen),
        f"{int(result.keep.sum())} of {result.keep.size} patches kept",
    )


def _probability(comparison: Comparison, result: Result) -> str:
    if result.probability is None:
        return ""
    heat = rasters.probability_picture(comparison.image, result.probability, SIDE, comparison.seen)
    span = f"{result.probability.min():.2g} (dark) to {result.probability.max():.2g} (bright)"
    return (
        "<details><summary>keep probability: "
        f"{span}</summary>{_figure(heat, 'Keep probability per patch')}</details>"
    )


def _figure(picture: Image.Image, alt: str) -> str:
    return f'<figure><img src="{rasters.data_uri(picture, None)}" alt="{escape(alt)}"></figure>'


def flops_text(flops: float) -> str:
    """With a prefix: 12.3 GFLOPs."""
    names = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    # The largest prefix that leaves a number of at least 1; below a million it is kilo.
    size, name = next(((size, name) for size, name in names if flops >= size), (1e3, "K"))
    return f"{flops / size:.3g} {name}FLOPs"
