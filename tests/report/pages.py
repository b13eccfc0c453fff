"""A report of a made-up evaluation, and what a browser would read of it."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from tprl.evaluation.analysis import Paired
from tprl.evaluation.pictures import GalleryItem, Guided, GuidedPair, Panel
from tprl.evaluation.results import Row
from tprl.evaluation.statistics import Interval
from tprl.report.evaluation import write_report
from tprl.report.spread import TokenSpread

VOID = {"meta", "img", "br", "path", "use", "rect", "circle", "link"}
NAMES = (
    "random",
    "uniform",
    "pooling",
    "cls_attention",
    "vispruner",
    "divprune",
    "mlp",
    "tprl_lfd",
    "tprl",
    "<new>",
)
# options of `write`: without the sections that take long to draw
LEAN: dict[str, object] = {"gallery": [], "guided": None, "spreads": [], "learning_curves": None}
RATIOS = {1 / 3: 64, 2 / 9: 43, 1 / 9: 21}


class Page(HTMLParser):
    """Collects what the tests ask for and fails on unbalanced tags or repeated ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(seed: int, side: int = 128) -> Image.Image:
    """A few colored blocks on noise: about the worst that PNG meets in this project."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(128, 25, size=(side, side, 3))
    for _ in range(4):
        y, x = rng.integers(0, side - side // 4, size=2)
        pixels[y : y + side // 5, x : x + side // 5] = rng.integers(0, 255, size=3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def rows() -> Iterator[Row]:
    def row(
        pruner: str, ratio: float | None, kept: float, metric: str, value: float, flops: float
    ) -> Row:
        return Row(
            "tiny_llava",
            "scenes",
            pruner,
            0,
            ratio,
            float(kept),
            metric,
            value,
            value - 0.03,
            value + 0.028,
            1e9,
            flops,
        )

    for metric, level in (
        ("accuracy", 0.953),
        ("accuracy/count", 0.9),
        ("accuracy/spatial_relation", 0.96),
        ("mean_iou", 0.7),
    ):
        yield row("keep_all", 1.0, 192, metric, level, 1.0)
        for place, name in enumerate(NAMES):
            for ratio, kept in RATIOS.items():
                lost = (1 - ratio) ** 2 * (0.5 - 0.035 * place)
                yield row(
                    name, ratio, kept, metric, level - lost, 0.3 + 0.7 * ratio + 0.002 * place
                )
        yield row("tprl_adaptive", None, 33.4, metric, level - 0.1, 0.5)
        yield row("oracle", 1 / 9, 21, metric, level - 0.02, 0.38)


def gallery(items: int, panels: int = 4) -> list[GalleryItem]:
    rng = np.random.default_rng(0)

    def panel(name: str) -> Panel:
        probability = rng.random((12, 16))
        keep = probability > np.sort(probability.ravel())[-22]
        return Panel(
            name,
            keep,
            "a <red> square",
            right=True,
            probability=probability if name == "tprl" else None,
        )

    names = ["tprl", "vispruner", "random", "divprune", "mlp", "uniform"][:panels]
    views = [
        [*map(panel, names), Panel("pooling", None, "blue", right=False)] for _ in range(items)
    ]
    question = 'Is the <b>red</b> square left of the "big" circle?'
    return [
        GalleryItem(picture(i), question, "yes & no", "yes", views[i], True) for i in range(items)
    ]


def guided() -> Guided:
    keeps = tuple(np.random.default_rng(i).random((12, 16)) < 0.11 for i in range(2))
    pair = GuidedPair(
        picture(7), ("What color is the circle?", "How many squares?"), keeps, ("red", "2"), 0.31
    )  # type: ignore[arg-type]
    accuracy, shuffled = Interval(0.87, 0.84, 0.9), Interval(0.7, 0.66, 0.73)
    return Guided("tprl", 1 / 9, 0.35, 1 / 9, accuracy, shuffled, [pair], 523, 200)


def write(path: Path, **options: object) -> str:
    paired = [
        Paired("tprl", name, ratio, 0.03 * i, 0.03 * i - 0.02, 0.03 * i + 0.02, 0.2 / (1 + 100 * i))
        for i, name in enumerate(reversed(NAMES[:-2]))
        for ratio in RATIOS
    ]
    steps = [100.0 * i for i in range(20)]
    arguments: dict = {
        "title": "TPRL on scenes <test>",
        "headline": (
            "At 1/9 of the visual tokens TPRL keeps 87.3 % "
            "accuracy, 4.1 points above its demonstrator."
        ),
        "rows": list(rows()),
        "paired": paired,
        "gallery": gallery(3),
        "guided": guided(),
        "spreads": [
            TokenSpread("tprl_adaptive", ratio, group, 100, 20.0, (4.0, 8.0, 12.0, 24.0, 48.0))
            for ratio in RATIOS
            for group in ("count", "<relation>", "easy")
        ],
        "learning_curves": {
            "score at 1/9: sampled": [(x, 0.6 + x / 1e4) for x in steps],
            "score at 1/9: served": [(x, 0.62 + x / 9e3) for x in steps],
            "KL <nats>": [(x, 0.01) for x in steps],
        },
        "commands": ["python -m src.train stage=all", "python -m src.eval run=<dir>"],
        "config_yaml": "pruner:\n  name: tprl  # <script>alert(1)</script>\n",
    }
    write_report(path, **arguments | options)  # type: ignore[arg-type]
    return path.read_text()
