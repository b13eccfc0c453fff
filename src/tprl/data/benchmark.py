"""What every public benchmark shares: rows become samples, damaged rows are counted, images are
bounded."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tprl.data.base import BaseDataset
from tprl.data.images import MAX_PIXELS, TOO_MANY, BadImage, Picture, read_picture
from tprl.data.tables import Table, read_table
from tprl.data.taking import BadRow
from tprl.data.values import several, shortened
from tprl.errors import UserError
from tprl.types import Box, Sample

# the reason of rows with a list, a dict or a truth value in place of a text
NOT_A_TEXT = "value is not a text"


class Benchmark(BaseDataset, ABC):
    """Questions of one split, with the score that the benchmark publishes.

    A subclass names its `hub` repository, `splits` and `protocol`, makes a `Sample` of a row
    (`sample`), scores an answer (`score`), and says how the official numbers come from it (`facts`,
    `per_image`, `official`). The uid of a sample is `<name>/<split>/<image>/<question>`: questions
    about one image share all but the last part.

    A row with a broken image, no answer, no box, an empty question, or texts or an image that the
    LVLM in use cannot read (`read_by`) raises `BadRow` and is counted in `damage`; the last one
    that `max_bad_rows` allows for is passed over, the next is an error. Read rows by `taking.take`.

    Args:
        split: "train", "val" or "test", or a split of the repository by its own name.
        limit: rows, from the first on.
        source: a local copy instead of the hub, see `tables.read_table`.
        max_bad_rows: share of rows that may be damaged.
        max_pixels: larger images are scaled down to so many pixels.

    Raises:
        UserError: no such split, no rows, a bound that bounds nothing, or `tables.read_table`'s
            reasons.
    """

    name: str
    hub: str
    subset: str | None = None
    splits: ClassVar[Mapping[str, str]] = {}
    protocol: str  # one line: prompt, normalization, and what the headline number is
    headline: str = "accuracy"  # the official number that tables show
    answer_tokens: int = 16  # that an answer usually needs, see `scoring.lengths`
    # where rows have free text as answers, for `answers_in`
    answer_columns: ClassVar[tuple[str, ...]] = ()
    labelled: bool = True  # whether rows must have answers
    divides_files: bool = False  # whether one file can hold several splits

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        source: str | None = None,
        max_bad_rows: float = 0.01,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(
                f"limit must be at least 1 or null, got {limit}; "
                f"null reads all questions of {self.name}."
            )
        if not 0 <= max_bad_rows <= 1:
            raise UserError(
                f"max_bad_rows must be a share in [0, 1], got {max_bad_rows}; use e.g. 0.01."
            )
        if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
            raise UserError(
                f"dataset.max_pixels={max_pixels} is not a number of pixels: "
                f"use a whole number from 1 on, e.g. {MAX_PIXELS}."
            )
        self.split, self.max_bad_rows, self.max_pixels = split, max_bad_rows, max_pixels
        self.source = source or self.hub
        # One file for all splits would train on what is tested.
        path = Path(self.source)
        if (
            path.is_file()
            and not self.divides_files
            and split in ("train", "val")
            and len(self.splits) > 1
        ):
            raise UserError(
                f"{path} is one file, which {self.name} would read as {split} "
                "and as every other split: give dataset.source=<a folder with "
                f"{self.split_name(split)}{path.suffix} and the like>."
            )
        # Rows are listed at once, images are opened when a question is taken.
        self.rows = self.read(self.source, self.split_name(split))
        self._length = self.count() if limit is None else min(limit, self.count())
        if not self._length:
            raise UserError(
                f"{self.name} has no rows in split {split} of {self.source}: choose another split."
            )
        self._bad: dict[int, str] = {}
        self._latest: tuple[str, Picture] | None = None
        self._reader: Any = None

    # --- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        """The question that a row asks.

        Raises:
            BadRow: it asks none.
        """

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> float:
        """What the benchmark gives for one answer, in [0, 1]."""

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """Numbers that the official ones are made of; summed over all questions."""
        return (self.score(sample, prediction), 1.0)

    def per_image(self, facts: Float[Tensor, "N F"]) -> Float[Tensor, " G"]:
        """The facts of an image, from those of its questions; a sum unless the benchmark counts
        whole images."""
        return facts.sum(0)

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """The published numbers in their published unit (percent, points), from facts summed over
        images."""
        return {"accuracy": 100 * total[..., 0] / total[..., 1]}

    def teacher_forced(self, sample: Sample) -> bool:
        """No: the score reads a free answer."""
        return False

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The reference answers in `answer_columns` of a row, the one that teaches first.

        Raises:
            BadRow: it has none.
        """
        return ()

    def references(self, limit: int | None = None) -> Iterator[tuple[str, ...]]:
        """The reference answers of each of the first `limit` questions, from `answer_columns`
        alone: no image is opened. Rows without an answer, and datasets whose answers are a word or
        a letter, have none."""
        # Columns of answers alone: a table of `datasets` then opens no image.
        rows: Any = self.rows
        table: Any = rows if isinstance(rows, list) else []
        if not isinstance(rows, list):
            names = [name for name in self.answer_columns if name in rows.column_names]
            table = rows.select_columns(names) if names else []
        count = min(limit or len(self), len(self)) if self.answer_columns and len(table) else 0
        for index in range(count):
            try:
                answers = tuple(
                    text for text in self.answers_in(table[self.at(index)]) if text.strip()
                )
            except (BadRow, KeyError):  # counted when the row is taken
                continue
            if answers:
                yield answers

    # --- rows -------------------------------------------------------------------------------------

    def read(self, source: str, split: str) -> Table:
        """The rows of a split."""
        return read_table(source, self.subset, split)

    def count(self) -> int:
        """Questions in `rows`."""
        return len(self.rows)

    def at(self, index: int) -> int:
        """The number of the row that question `index` comes from."""
        return index

    def where(self, index: int) -> str:
        """The same in words, for errors."""
        return f"row {self.at(index)}"

    def row(self, index: int) -> Mapping[str, Any]:
        """The row of question `index`."""
        return self.rows[self.at(index)]

    def split_name(self, split: str) -> str:
        """The repository's name of a split.

        Raises:
            UserError: "train", "val" or "test" where the benchmark has none.
        """
        if split in self.splits:
            return self.splits[split]
        if split in ("train", "val", "test"):
            there = ", ".join(self.splits)
            raise UserError(
                f"{self.name} has no labelled split '{split}', "
                f"only {there}: train on another dataset."
            )
        return split

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        try:
            # Faults of the row first, then what only this LVLM cannot read.
            sample = self._sampled(index)
            if not sample.question.strip():
                raise BadRow("empty question")
            if self.labelled and not any(answer.strip() for answer in sample.answers):
                raise BadRow("no answer")
            refusal = None if self._reader is None else self._reader.refusal(sample)
            if refusal is not None:
                raise BadRow(*refusal)
        except BadRow as bad:
            self._count(index, bad)
            raise
        return sample

    def read_by(self, lvlm: Any) -> None:
        """Count rows as damaged that this LVLM cannot read (see its `refusal`); call it before a
        question is taken."""
        reader = lvlm if hasattr(lvlm, "refusal") else None
        # Where threads draw questions, the tokenizer of the model is busy with others.
        self._reader = lvlm.twin() if lvlm.workers and reader else reader

    def _count(self, index: int, bad: BadRow) -> None:
        self._bad[index] = bad.reason
        if len(self._bad) > self.max_bad_rows * len(self):
            raise UserError(
                f"{self.name}: {self.where(index)} has a fault ({bad}), and with "
                f"it {len(self._bad)} of {len(self)} rows ({self._listed()}), "
                f"more than max_bad_rows={self.max_bad_rows:g} allows: mend "
                f"{self.source}, or raise dataset.max_bad_rows."
            ) from bad

    def _sampled(self, index: int) -> Sample:
        try:
            return self.sample(self.row(index), index)
        except KeyError as error:
            raise BadRow(f"no column {error}") from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise BadRow("malformed row", repr(error)) from error

    @property
    def damage(self) -> dict[str, int]:  # type: ignore[override] (rows are still being read)
        """Rows passed over so far, by reason."""
        return dict(Counter(self._bad.values()))

    def _listed(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.damage.items())

    # --- helpers for subclasses -------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where relative paths of images start: at the source."""
        path = Path(self.source)
        return path.parent if path.is_file() else path if path.is_dir() else Path()

    def uid(self, image: object, question: object) -> str:
        return writable(f"{self.name}/{self.split}/{image}/{question}")

    def image(self, value: Any, key: object, folder: Path | None = None) -> Image.Image:
        """A picture as `images.read_picture` reads it; questions in a row about the image `key`
        share one object.

        Args:
            value: {"bytes", "path"} as stored by `datasets`, bytes, base64 text, a path (within
                `folder`), a picture, or a list of one of these.
            key: names the image.
            folder: of relative paths; None is that of the source.

        Raises:
            BadRow: no image, or one that cannot be read.
        """
        # Rows about one image follow each other: the latest picture is enough to share it.
        if self._latest is None or self._latest[0] != str(key):
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            try:
                picture = read_picture(value, folder or self.folder, self.max_pixels)
            except BadImage as bad:
                more = ", or raise dataset.max_pixels" if bad.reason == TOO_MANY else ""
                raise BadRow(bad.reason, bad.detail + more) from bad
            self._latest = (str(key), picture)
        return self._latest[1].image

    @property
    def original_size(self) -> tuple[int, int]:
        """(width, height) of the latest `image`, upright, before it was scaled down; see
        `scaled`."""
        assert self._latest is not None
        return self._latest[1].size


def writable(name: str) -> str:
    """A name that fits into a file: halves of characters (lone surrogates) as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def text_of(value: Any, reason: str) -> str:
    """A text or a number as text, without surrounding white space; a list of one stands for that
    one.

    Raises:
        BadRow: nothing is left, and the row has a fault for `reason`; or several values, or one
            that is no text.
    """
    values = texts_of(value)
    if len(values) > 1:
        raise BadRow(NOT_A_TEXT, f"got {shortened(value)}, write one text")
    if not values or not values[0].strip():
        raise BadRow(reason)
    return values[0].strip()


def texts_of(value: Any) -> list[str]:
    """A list of texts; one text is a list of one. White space stays, and so do empty texts and
    gaps, as "".

    Raises:
        BadRow: a value that is neither text nor number.
    """
    values = several(value)
    for item in values:
        # A truth value is an int for Python, and no answer.
        if isinstance(item, bool | bytes) or not isinstance(item, str | int | float | None):
            raise BadRow(NOT_A_TEXT, f"got {shortened(value)}, write a text or a list of texts")
    return [plain_text(item) for item in values]


def plain_text(value: Any) -> str:
    """A text, or a number as text; "" for anything else."""
    return (
        str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    )


def scaled(box: Sequence[float], size: tuple[int, int], image: Image.Image) -> Box:
    """A box of an image that was `size` (width, height) large, on `image`, which may have been
    scaled down."""
    # Each side has its own factor, since sides are whole pixels.
    fx, fy = image.width / size[0], image.height / size[1]
    x1, y1, x2, y2 = box
    return (x1 * fx, y1 * fy, x2 * fx, y2 * fy)
