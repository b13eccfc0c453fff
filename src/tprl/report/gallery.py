"""Pictures of the report: what each pruner kept of an image, and whether the question mattered."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from PIL import Image

from tprl.evaluation.pictures import GalleryItem, Guided, GuidedPair, Panel
from tprl.evaluation.results import FULL, ratio_label
from tprl.evaluation.statistics import Interval
from tprl.report import rasters
from tprl.report.page import Section
from tprl.types import Box


def count_pictures(gallery: Sequence[GalleryItem], guided: Guided | None) -> int:
    """How many pictures the sections below will hold."""
    panels = list(chain.from_iterable(item.panels for item in gallery))
    # Each item has its whole image, a panel per pruner, and maps of those that have probabilities.
    maps = sum(panel.probability is not None for panel in panels)
    return len(gallery) + len(panels) + maps + 3 * len(guided.pairs if guided else ())


def pruners_shown(gallery: Sequence[GalleryItem]) -> set[str]:
    """Names of the pruners in the pictures."""
    return {panel.pruner for item in gallery for panel in item.panels}


class CaptionedPicture(NamedTuple):
    """A picture of the page and what stands below it."""

    uri: str
    width: int
    height: int
    alt: str
    title: str
    detail: str = ""
    pruner: str = ""  # whose color marks it
    answer: str | None = None
    right: bool | None = None
    below: str = ""  # a line in place of the answer


def _picture(picture: Image.Image, alt: str, title: str, **caption: Any) -> CaptionedPicture:
    return CaptionedPicture(rasters.data_uri(picture), *picture.size, alt, title, **caption)


def gallery_section(gallery: Sequence[GalleryItem], side: int) -> Section | None:
    """One article per question; nothing without items."""
    if not gallery:
        return None
    # The first panel belongs to the main pruner, whose failures the selection looks for.
    first = next((item.panels[0].pruner for item in gallery if item.panels), FULL)
    cropped = any(item.seen is not None and not _whole(item.seen, item.image) for item in gallery)
    black = " What is black the processor crops away: no pruner could keep it." if cropped else ""
    note = (
        "Patches that were pruned are darkened; the language model saw only what is "
        f"bright.{black} No random sample: the kinds of question take turns, and "
        f"every third picture is a failure of {first}, as long as there are some."
    )
    articles = [_article(item, side) for item in gallery]
    return Section("What was kept", "gallery.html", {"note": note, "articles": articles})


def _whole(seen: Box, image: Image.Image) -> bool:
    width, height = image.size
    return seen[0] <= 0 and seen[1] <= 0 and seen[2] >= width and seen[3] >= height


def _article(item: GalleryItem, side: int) -> dict[str, Any]:
    # The unpruned answer comes first, because every other answer is judged against it.
    whole = rasters.plain_picture(item.image, side)
    answer = {"answer": item.full_answer, "right": item.full_right}
    views = [_picture(whole, "The whole image", "all tokens", **answer)]
    for panel in item.panels:
        views += _panel(item, panel, side)
    texts = {"question": item.question, "reference": item.reference, "badge": _badge(item)}
    return texts | {"pictures": views}


def _badge(item: GalleryItem) -> str:
    """Says so where the first pruner is wrong."""
    if not item.panels or item.panels[0].right is not False:
        return ""
    # Whether pruning is to blame depends on the answer with all tokens, which may be unknown.
    cause = {True: ", all tokens are right", False: ", and so are all tokens", None: ""}[
        item.full_right
    ]
    return f"Failure: {item.panels[0].pruner} is wrong{cause}"


def _panel(item: GalleryItem, panel: Panel, side: int) -> list[CaptionedPicture]:
    image, name = item.image, panel.pruner
    # Merged tokens are no patches: there is nothing to darken.
    if panel.keep is None:
        count, picture = "tokens merged", rasters.plain_picture(image, side)
        alt = "merged tokens, the image is whole"
    else:
        kept, size = int(panel.keep.sum()), panel.keep.size
        count, picture = f"{kept}/{size}", rasters.mask_picture(image, panel.keep, side, item.seen)
        alt = f"{kept} of {size} patches kept"
    caption = {"detail": count, "pruner": name, "answer": panel.answer, "right": panel.right}
    views = [_picture(picture, f"{name}: {alt}", name, **caption)]
    # The map is scaled to its own range, so the caption says which numbers its ends are.
    if panel.probability is not None:
        heat = rasters.probability_picture(image, panel.probability, side, item.seen)
        limits = f"{panel.probability.min():.2g} (dark) to {panel.probability.max():.2g} (bright)"
        caption = {"detail": "probability", "pruner": name, "below": limits}
        views.append(_picture(heat, f"{name}: keep probability per patch", name, **caption))
    return views


def guided_section(guided: Guided | None, side: int) -> Section | None:
    """The figures and pictures of language guidance; nothing without them."""
    if guided is None:
        return None
    # The overlap of random choices is the control: without it the share says nothing.
    shared = f"{100 * guided.overlap:.1f} % (two random choices share {100 * guided.chance:.1f} %)"
    numbers = [
        ("Kept tokens shared by two questions about one image", shared),
        ("Accuracy, the pruner reads the right question", _percent_text(guided.accuracy)),
        ("Accuracy, the pruner reads another sample's question", _percent_text(guided.shuffled)),
    ]
    count = f"the first {guided.images} images ({guided.questions} questions)"
    intro = f"{guided.pruner} at {ratio_label(guided.keep_ratio)} of the visual tokens, on {count}."
    pairs = [_guided_pair(pair, guided.pruner, side) for pair in guided.pairs]
    values = {"intro": intro, "numbers": numbers, "pairs": pairs}
    return Section("Is it language guided?", "guided.html", values)


def _percent_text(value: Interval) -> str:
    bounds = "" if math.isnan(value.low) else f" ({100 * value.low:.1f} to {100 * value.high:.1f})"
    return f"{100 * value.mean:.1f} %{bounds}"


def _guided_pair(pair: GuidedPair, pruner: str, side: int) -> dict[str, Any]:
    views = [_picture(rasters.plain_picture(pair.image, side), "The whole image", "the image")]
    for question, keep, answer in zip(pair.questions, pair.keeps, pair.answers, strict=True):
        alt = f"{pruner} kept {int(keep.sum())} of {keep.size} patches for the question: {question}"
        picture = rasters.mask_picture(pair.image, keep, side, pair.seen)
        views.append(_picture(picture, alt, question, answer=answer))
    return {
        "pictures": views,
        "note": f"{100 * pair.overlap:.0f} % of the kept tokens are the same.",
    }
