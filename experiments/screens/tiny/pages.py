"""Pages for training: pictures, what every patch shows, and questions, shifted by some pixels.

A shift gives text another place on the grid of patches, so that a page is new each time. Step `i`
of a run is a function of its seed, of `i` and of how many pages there are, which the run writes
down.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tprl.errors import UserError

from . import sheets
from .blueprint import SIDE
from .labels import Labels, labels, shifted, whole

SHIFT = 8  # pixels, each way
SHEET_STEPS = 4


class Folder:
    """Rendered pages, `train-<seed>`; reads a page from the disk when it is asked for.

    Args:
        path: where render.mjs put them; it may still be at work.
        held_every: pages whose number it divides are not for training, but in `held`.
    """

    def __init__(self, path: Path, held_every: int = 50) -> None:
        self.path, self.held_every = path, held_every
        self.places: list[tuple[int, int]] = []
        self.held: list[tuple[int, int]] = []
        self.questions: dict[int, list[dict[str, Any]]] = {}
        self._read = {"elements.jsonl": 0, "questions.jsonl": 0}
        self.grow()

    def __len__(self) -> int:
        return len(self.places)

    def grow(self) -> int:
        """Look for pages rendered since; how many there are now for training, in the order of
        rendering."""
        for _, row in self._lines("questions.jsonl"):
            self.questions.setdefault(row["page"], []).append(row)
        for start, row in self._lines("elements.jsonl"):
            asked = self.questions.get(row["page"], [])
            if not asked or len(asked) < asked[0]["of"]:  # its questions are being written
                self._read["elements.jsonl"] = start
                break
            kind = self.places if row["page"] % self.held_every else self.held
            kind.append((row["page"], start))
        return len(self.places)

    def _lines(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """New whole lines of a file, with their places."""
        file = self.path / name
        if not file.is_file():
            raise UserError(
                f"{file} is missing: render pages into {self.path} (experiments/screens)."
            )
        with file.open("rb") as stream:
            stream.seek(self._read[name])
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                start = self._read[name]
                self._read[name] += len(line)
                yield start, json.loads(line)

    def page(
        self, at: int, held: bool = False
    ) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any], list[dict[str, Any]]]:
        """Picture, elements and questions of the `at`-th page of those for training, or of those
        held out."""
        number, start = (self.held if held else self.places)[at]
        with (self.path / "elements.jsonl").open("rb") as stream:
            stream.seek(start)
            record = json.loads(stream.readline())
        with Image.open(self._picture(number)) as picture:
            return np.asarray(picture.convert("RGB")), record, self.questions.get(number, [])

    def _picture(self, number: int) -> Path:
        """As render.mjs wrote it, or as WebP where travel.py unpacked it."""
        name = f"{number:08d}"
        file = self.path / f"images/{name[:5]}/{name}.png"
        return file if file.exists() else file.with_suffix(".webp")


class Item(NamedTuple):
    """A page as it is shown."""

    picture: UInt8[np.ndarray, "H W 3"]
    labels: Labels
    questions: list[dict[str, Any]]  # with boxes as shown; those cut by the shift are left out


def item(
    picture: UInt8[np.ndarray, "H W 3"],
    record: dict[str, Any],
    asked: Sequence[dict[str, Any]],
    dx: int,
    dy: int,
) -> Item:
    """A page shifted by whole pixels; what was outside is painted as its border."""
    spread = ((max(dy, 0), max(-dy, 0)), (max(dx, 0), max(-dx, 0)), (0, 0))
    padded = np.pad(picture, spread, mode="edge")
    top, left = max(-dy, 0), max(-dx, 0)
    moved = [
        row
        | {
            "bbox": shifted(row["bbox"], dx, dy),
            "region": [shifted(box, dx, dy) for box in row["region"]],
        }
        for row in asked
    ]
    seen = [row for row in moved if all(whole(box) for box in (row["bbox"], *row["region"]))]
    return Item(padded[top : top + SIDE, left : left + SIDE], labels(record, dx, dy), seen)


def draw(
    folder: Folder | None,
    count: int,
    share: float,
    loose: float,
    seed: int,
    step: int,
    index: int,
    kind: str = "things",
) -> Item:
    """A page of the first `count` of the folder, or with probability 1 - `share` a sheet of a kind.

    Below 1, `loose` is the share of the usual shift that lines of a sheet are off the rows of
    patches.
    """
    rng = np.random.default_rng([seed, step, index])
    dx, dy = (int(at) for at in rng.integers(-SHIFT, SHIFT + 1, 2))
    if folder is not None and count and rng.random() < share:
        return item(*folder.page(int(rng.integers(count))), dx, dy)
    aligned = loose < 1 or kind == "words"
    drawn = sheet(kind, aligned, seed, step // SHEET_STEPS, index)
    return item(*drawn, [], dx, round(loose * dy))


@lru_cache(maxsize=64)
def sheet(kind: str, aligned: bool, *key: int) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
    """Drawing one takes a fifth of the time of a step, so that some steps share them, shifted."""
    rng = np.random.default_rng([1, *key])
    return sheets.draw(rng, aligned) if kind == "things" else sheets.draw_words(rng)


class Views(NamedTuple):
    """Labels of a batch; see `Labels`."""

    pictures: UInt8[Tensor, "B H W 3"]
    characters: Int[Tensor, "B N points"]
    word: Int[Tensor, "B N"]
    number: Int[Tensor, "B N digits"]
    name: Int[Tensor, "B N names"]
    key: Int[Tensor, "B N"]
    icon: Int[Tensor, "B N"]
    role: Int[Tensor, "B N"]
    checked: Int[Tensor, "B N"]
    active: Int[Tensor, "B N"]
    owner: Int[Tensor, "B N"]
    box: Float[Tensor, "B N 4"]


def views(items: Sequence[Item]) -> Views:
    """Pictures and the labels of every patch."""
    stacked = {
        name: torch.from_numpy(np.stack([getattr(item.labels, name) for item in items]))
        for name in Labels._fields
    }
    stacked["box"] = stacked["box"].float()
    return Views(torch.from_numpy(np.stack([item.picture for item in items])), **stacked)


def scaled(pictures: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels as CLIP's image processor scales them."""
    pixels = pictures.permute(0, 3, 1, 2).float()
    mean, deviation = _moments(pixels.device)
    return pixels.div_(255).sub_(mean).div_(deviation)


@cache
def _moments(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and deviation of a color, on a device once and for all."""
    mean, deviation = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return mean, deviation
