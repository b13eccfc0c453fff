"""`toy`: pictures of 24 cells in which one cell answers the question, for tests and demonstrations
in seconds.

A picture is 8 x 8 pixels per cell. A cell is an object of one kind (red channel) with one value
(green channel), or noise (red 0). Every kind occurs once, at a random place, and each picture is
asked for every kind's value.
"""

import random
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.types import Box, Sample

KINDS = ("apple", "book", "chair", "drum", "eagle", "flute")
VALUES = ("one", "two", "three", "four")
ROWS, COLUMNS, CELL = 4, 6, 8
STEP = 40  # between neighboring kinds and values in a color channel
SPLITS = {"train": 60_000, "val": 600, "test": 1_200}  # questions


class ToyCell(NamedTuple):
    """What a color says: index of the kind and of its value, -1 where the cell is noise; `shade`
    only varies."""

    kind: int
    value: int
    shade: int


class ToyDataset(BaseDataset):
    """Questions "what is the value of the <kind>", each decided by one of 24 visual tokens.

    The same (split, seed, index) is the same sample everywhere; splits share no picture.

    Args:
        split: "train", "val" or "test".
        limit: questions, from the first on.
        seed: of the training pictures; validation and test are fixed.

    Raises:
        UserError: unknown split.
    """

    name = "toy"
    questions_per_image = len(KINDS)

    def __init__(self, split: str = "train", limit: int | None = None, seed: int = 0) -> None:
        if split not in SPLITS:
            raise UserError(
                f"dataset split '{split}' does not exist in toy: choose one of {', '.join(SPLITS)}."
            )
        self.split, self._key = split, f"{split}-{seed}" if split == "train" and seed else split
        self._length = SPLITS[split] if limit is None else min(limit, SPLITS[split])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        picture, kind = divmod(index, len(KINDS))
        image, cells = _picture(f"{self._key}/{picture}")
        # Six questions about a picture, one about each kind, which stands in one cell.
        at = next(i for i, cell in enumerate(cells) if cell.kind == kind)
        # Two wordings of unequal length, so that batches are really padded.
        name, answer = KINDS[kind], VALUES[cells[at].value]
        question = f"what is the value of the {name} ?" if picture % 2 else f"value of {name} ?"
        uid = f"toy/{self._key}/{picture}/{name}"
        return Sample(uid, (image,), question, (answer,), name, region=(cell_box(at),))

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction is the value, else 0.0."""
        return float(prediction.strip() == sample.answers[0])

    def teacher_forced(self, sample: Sample) -> bool:
        """Always: an exact match of one word decides."""
        return True


def cell_box(index: int) -> Box:
    """Pixels of a cell, counted in raster order."""
    row, column = divmod(index, COLUMNS)
    x, y = float(column * CELL), float(row * CELL)
    return (x, y, x + CELL, y + CELL)


def read_cells(image: Image.Image) -> list[ToyCell]:
    """The cells of a picture in raster order, from its pixels."""
    colors = np.asarray(image)[CELL // 2 :: CELL, CELL // 2 :: CELL].reshape(-1, 3).tolist()
    return [ToyCell(r // STEP - 1, g // STEP - 1, b) for r, g, b in colors]


@lru_cache(maxsize=256)
def _picture(key: str) -> tuple[Image.Image, list[ToyCell]]:
    draw = random.Random(f"toy/{key}")
    cells = [
        ToyCell(kind, draw.randrange(len(VALUES)), draw.randrange(256))
        for kind in range(len(KINDS))
    ]
    cells += [ToyCell(-1, -1, draw.randrange(256)) for _ in range(ROWS * COLUMNS - len(KINDS))]
    draw.shuffle(cells)
    # Red says the kind, green the value, blue nothing; noise has 0 in both.
    colors = [((c.kind + 1) * STEP, (c.value + 1) * STEP, c.shade) for c in cells]
    grid = np.array(colors, dtype=np.uint8).reshape(ROWS, COLUMNS, 3)
    return Image.fromarray(grid.repeat(CELL, 0).repeat(CELL, 1)), cells
