"""Pictures of the report: what each pruner kept of an image, and whether the question mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tprl.evaluation.results import FULL, ratio_label
from tprl.evaluation.statistics import Interval
from tprl.report import figures
from tprl.report.figures import Mask
from tprl.report.page import section, swatch


@dataclass(frozen=True)
class Panel:
    """What one pruner kept of one image: `keep` and `probability` are [rows, columns] over the whole image.

    `keep` is None for methods whose tokens are no longer patches (pooling). `right` is None where unknown.
    """

    pruner: str
    keep: Mask | None
    answer: str
    right: bool | None = None
    probability: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class GalleryItem:
    """One question, the reference answer, the answer with all tokens, and what each pruner made of it."""

    image: Image.Image
    question: str
    reference: str
    full_answer: str
    panels: Sequence[Panel]
    full_right: bool | None = None


@dataclass(frozen=True)
class GuidedPair:
    """One image, two questions, and what the same pruner kept for each; `overlap` as in `Guided`."""

    image: Image.Image
    questions: tuple[str, str]
    keeps: tuple[Mask, Mask]
    answers: tuple[str, str]
    overlap: float


@dataclass(frozen=True)
class Guided:
    """Evidence that a pruner listens to the question.

    `overlap` is the mean share of kept tokens that two questions about one image have in common (1: the question
    changes nothing), `chance` the same for two random choices (the keep ratio). `shuffled` is the accuracy when the
    pruner reads another sample's question while the model answers the right one. All of it over `questions` about
    `images`.
    """

    pruner: str
    keep_ratio: float
    overlap: float
    chance: float
    accuracy: Interval
    shuffled: Interval
    pairs: Sequence[GuidedPair]
    questions: int
    images: int


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Share of kept tokens that two selections have in common: |A and B| over the mean of |A| and |B|."""
    return float((a & b).sum() / (0.5 * (a.sum() + b.sum())))


def pictures(gallery: Sequence[GalleryItem], guided: Guided | None) -> int:
    """How many pictures the sections below will hold."""
    panels = [panel for item in gallery for panel in item.panels]
    maps = sum(panel.probability is not None for panel in panels)
    return len(gallery) + len(panels) + maps + 3 * len(guided.pairs if guided else ())


def pruners_shown(gallery: Sequence[GalleryItem]) -> set[str]:
    """Names of the pruners in the pictures."""
    return {panel.pruner for item in gallery for panel in item.panels}


def _picture(picture: Image.Image, alt: str, caption: str) -> str:
    width, height = picture.size
    image = f'<img src="{figures.data_uri(picture)}" width="{width}" height="{height}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _answer(text: str, right: bool | None) -> str:
    """An answer in quotes, and whether it is right, to eyes and to screen readers."""
    if right is None:
        return f'<span class="answer">“{escape(text)}”</span>'
    kind, mark, word = ("answer", "✓", "right") if right else ("wrong", "✗", "wrong")
    sign = f'<span aria-hidden="true">{mark}</span><span class="hidden">({word})</span>'
    return f'<span class="{kind}">“{escape(text)}” {sign}</span>'


def gallery_section(gallery: Sequence[GalleryItem], known: Sequence[str], side: int) -> str:
    """One article per question; nothing without items."""
    if not gallery:
        return ""
    first = next((item.panels[0].pruner for item in gallery if item.panels), FULL)
    note = (
        "Patches that were pruned are darkened; the language model saw only what is bright. No random sample: the "
        f"kinds of question take turns, and every third picture is a failure of {first}, as long as there are some."
    )
    return section("What was kept", f"<p>{escape(note)}</p>", *(_gallery_item(item, known, side) for item in gallery))


def _gallery_item(item: GalleryItem, known: Sequence[str], side: int) -> str:
    caption = f"<b>all tokens</b><br>{_answer(item.full_answer, item.full_right)}"
    shown = [_picture(figures.plain_picture(item.image, side), "The whole image", caption)]
    for panel in item.panels:
        shown.extend(_panel(item.image, panel, known, side))
    return (
        f'<article class="item"><h3>{escape(item.question)}</h3>{_badge(item)}'
        f'<p class="note">Reference answer: <span class="answer">“{escape(item.reference)}”</span></p>'
        f'<div class="panels">{"".join(shown)}</div></article>\n'
    )


def _badge(item: GalleryItem) -> str:
    """Says so where the first pruner is wrong."""
    if not item.panels or item.panels[0].right is not False:
        return ""
    cause = {True: ", all tokens are right", False: ", and so are all tokens", None: ""}[item.full_right]
    return f'<p class="badge">Failure: {escape(item.panels[0].pruner)} is wrong{cause}</p>'


def _panel(image: Image.Image, panel: Panel, known: Sequence[str], side: int) -> list[str]:
    dot = swatch(known, panel.pruner)
    if panel.keep is None:
        count, picture, alt = "tokens merged", figures.plain_picture(image, side), "merged tokens, the image is whole"
    else:
        kept, size = int(panel.keep.sum()), panel.keep.size
        count, picture = f"{kept}/{size}", figures.mask_picture(image, panel.keep, side)
        alt = f"{kept} of {size} patches kept"
    caption = f"{dot}<b>{escape(panel.pruner)}</b> {count}<br>{_answer(panel.answer, panel.right)}"
    parts = [_picture(picture, f"{panel.pruner}: {alt}", caption)]
    if panel.probability is not None:
        heat = figures.probability_picture(image, panel.probability, side)
        span = f"{panel.probability.min():.2g} (dark) to {panel.probability.max():.2g} (bright)"
        caption = f"{dot}<b>{escape(panel.pruner)}</b> probability<br>{span}"
        parts.append(_picture(heat, f"{panel.pruner}: keep probability per patch", caption))
    return parts


def guided_section(guided: Guided | None, side: int) -> str:
    """The figures and pictures of language guidance; nothing without them."""
    if guided is None:
        return ""
    ratio = ratio_label(guided.keep_ratio)
    figures_of = [
        (
            "Kept tokens shared by two questions about one image",
            f"{100 * guided.overlap:.1f} % (two random choices share {100 * guided.chance:.1f} %)",
        ),
        ("Accuracy, the pruner reads the right question", _percent_text(guided.accuracy)),
        ("Accuracy, the pruner reads another sample's question", _percent_text(guided.shuffled)),
    ]
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in figures_of)
    count = f"the first {guided.images} images ({guided.questions} questions)"
    intro = f"<p>{escape(guided.pruner)} at {escape(ratio)} of the visual tokens, on {count}.</p>"
    pairs = (_guided_pair(pair, guided.pruner, side) for pair in guided.pairs)
    return section("Is it language guided?", intro, f"<dl>{terms}</dl>", *pairs)


def _percent_text(value: Interval) -> str:
    bounds = "" if math.isnan(value.low) else f" ({100 * value.low:.1f} to {100 * value.high:.1f})"
    return f"{100 * value.mean:.1f} %{bounds}"


def _guided_pair(pair: GuidedPair, pruner: str, side: int) -> str:
    shown = [_picture(figures.plain_picture(pair.image, side), "The whole image", "<b>the image</b>")]
    for question, keep, answer in zip(pair.questions, pair.keeps, pair.answers, strict=True):
        alt = f"{pruner} kept {int(keep.sum())} of {keep.size} patches for the question: {question}"
        caption = f"<b>{escape(question)}</b><br>{_answer(answer, None)}"
        shown.append(_picture(figures.mask_picture(pair.image, keep, side), alt, caption))
    note = f'<p class="note">{100 * pair.overlap:.0f} % of the kept tokens are the same.</p>'
    return f'<div class="item"><div class="panels">{"".join(shown)}</div>{note}</div>\n'
