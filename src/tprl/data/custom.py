"""One's own questions: rows of images, a question, and answers or a box."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tprl.data.benchmark import Benchmark, scaled, texts_of, writable
from tprl.data.grounding import Grounding
from tprl.data.image_files import embedded
from tprl.data.images import shown_size
from tprl.data.tables import FILES, Table, read_table
from tprl.data.taking import BadRow
from tprl.data.text_tables import TextRows
from tprl.data.values import several, shortened
from tprl.errors import UserError
from tprl.seeding import stable_seed
from tprl.types import Sample

log = logging.getLogger(__name__)
LOOKED_AT = 200  # rows whose boxes are compared with the size of their image before anything runs
PARTS = ("train",) * 8 + ("val", "test")  # of a file without a column `split`


class Custom(Grounding):
    """Accuracy, percent: exact match with one of the answers, case and outer spaces ignored, or an
    IoU of at least 0.5 with the box; and the mean IoU where there are boxes. Questions reach the
    model as they are.

    Rows are JSON lines, a JSON list, CSV, TSV, parquet or arrow, with these columns:

        image     a path, an image as `datasets` stores it, or a list of either
        question  text
        answers   text or a list of texts; the first is the one that rewards teach; or
        box       [x1, y1, x2, y2] in pixels of the image, x2 and y2 exclusive; `box_unit` and
                  `box_form` name others
        id        optional, different in every row
        split     optional; without it 8 of 10 images are for training and one each for validation
                  and test, drawn from the image's name, and split=all is all of them

    Args:
        images: folder that relative paths start from; None is the folder of the file.
        labelled: False reads images and questions alone, which is all that reward=fidelity needs.
        split, source, options: see `Grounding`; `source` is the file.

    Raises:
        UserError: no file, columns that are not there, an id twice, no rows in the split, or
            `Grounding`'s reasons.
    """

    name = "custom"
    hub = ""
    divides_files = True
    answer_columns = ("answers", "box")
    splits: ClassVar = {"train": "train", "val": "val", "test": "test"}
    protocol = "own data: exact match but for case and outer spaces; boxes count from an IoU of 0.5"

    def __init__(
        self,
        split: str = "test",
        source: str | None = None,
        images: str | None = None,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        self.labelled = labelled
        if not source or not Path(source).is_file():
            problem = f"{source} is no file" if source else "dataset=custom needs your data"
            raise UserError(
                f"{problem}: set dataset.source=<a {', '.join(FILES[:-1])} or {FILES[-1]} file>."
            )
        self.file, self._images_from = Path(source), images
        if not self.folder.is_dir():
            raise UserError(
                f"dataset.images must be a folder, got {images}; use "
                f"the one that the paths in {source} start from."
            )
        super().__init__(split, source=source, **options)

    @property
    def folder(self) -> Path:
        return Path(self._images_from or self.file.parent)

    # --- rows -------------------------------------------------------------------------------------

    def read(self, source: str, split: str) -> Table:
        rows = read_table(source, None, split)
        self._lines = rows.lines if isinstance(rows, TextRows) else None
        # All rows are looked at before any image is opened: a fault is said at once.
        entries = [_entry(rows[place], place, self.folder) for place in range(len(rows))]
        self._check(entries)
        self._check_boxes(rows, entries)
        # Without the column an image's name decides: its questions stay in one part.
        parts = [entry.part for entry in entries]
        if all(part is None for part in parts):
            parts = [PARTS[stable_seed(entry.image, 0) % len(PARTS)] for entry in entries]
            log.info(
                "%s has no column split: %s, by the names of the images", source, _counted(parts)
            )
        elif None in parts:
            raise UserError(
                f"{self._line(parts.index(None))}: split is missing; give every row one, or none."
            )
        self._keys = [entry.key for entry in entries]
        self._places = [place for place, part in enumerate(parts) if split in ("all", part)]
        if entries and not self._places:
            raise UserError(
                f"{source} has no rows in split {split} "
                f"({_counted(parts)}): use split=all or another one."
            )
        return rows

    def count(self) -> int:
        return len(self._places)

    def at(self, index: int) -> int:
        return self._places[index]

    def where(self, index: int) -> str:
        return self._line(self.at(index))

    def _line(self, place: int) -> str:
        """Where a row is, for errors."""
        where = f"row {place + 1}" if self._lines is None else f"line {self._lines[place]}"
        return f"{self.file}, {where}"

    def _check(self, entries: Sequence["_Entry"]) -> None:
        """Refuse a file without the columns, and an id that two rows have."""
        # A column counts if any row fills it.
        filled = frozenset().union(*(entry.filled for entry in entries))
        self._boxes = "box" in filled
        self.answer_tokens = Grounding.answer_tokens if self._boxes else Benchmark.answer_tokens
        wanted = {"image": {"image"}, "question": {"question"}}
        if self.labelled:
            wanted["answers (or box)"] = {"answers", "box"}
        missing = [name for name, either in wanted.items() if not either & filled]
        if entries and missing:
            there = ", ".join(sorted(filled))
            raise UserError(
                f"{self.file} has no column {', '.join(missing)}, only {there}: rename or add it."
            )
        # Scores are kept by uid, of which the id is a part.
        first: dict[str, int] = {}
        for place, entry in enumerate(entries):
            if first.setdefault(entry.key, place) != place:
                other = self._line(first[entry.key])
                raise UserError(
                    f"{self._line(place)}: id={entry.key} is also "
                    f"that of {other}; give each row its own."
                )

    def _check_boxes(self, rows: Table, entries: Sequence["_Entry"]) -> None:
        """Refuse a file whose boxes cannot be in the unit or the form that they are read in."""
        # Evenly spaced rows, since opening every image would take minutes.
        places = [place for place, entry in enumerate(entries) if "box" in entry.filled]
        places = places[:: max(1, len(places) // LOOKED_AT)]
        boxes, sizes = [], []
        for place in places:
            row = rows[place]
            image = several(row.get("image"))
            size = shown_size(image[0], self.folder) if len(image) == 1 else None
            if size is not None:
                boxes.append(row["box"])
                sizes.append(size)
        reason = self.reader.wrong_for_all(boxes, sizes)
        if reason and self.max_bad_rows < 1:
            raise UserError(f"{self.file}: {reason}.")

    # --- samples ----------------------------------------------------------------------------------

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        question, name = row.get("question"), _image_name(row.get("image"), self.folder)
        if not isinstance(question, str) or not question.strip():
            raise BadRow("empty question", f"question={question!r}; write a text")
        images = self._images(row.get("image"))
        uid = self.uid(name, self._keys[self.at(index)])
        if not self.labelled:
            return Sample(uid, images, question, ("",))
        if row.get("box") is None:
            return Sample(uid, images, question, tuple(self.answers_in(row)))
        if row.get("answers"):
            raise BadRow(
                "answers and a box",
                f"answers={row['answers']!r}, box={row['box']!r}; leave one of them out",
            )
        if len(images) != 1:
            raise BadRow("no box", f"box={row['box']!r} with {len(images)} images; give one image")
        # The box is of the original picture, the answer of the one that may have been scaled down.
        true_box = self.true_box(row["box"], self.original_size, index)
        box = scaled(true_box, self.original_size, images[0])
        answer = self.written(box, images[0])
        return Sample(uid, images, question, (answer,), box=box, region=(box,))

    def _images(self, value: Any) -> tuple[Image.Image, ...]:
        # The file's name belongs to the reason: a list of images may have one that is broken.
        images = []
        for entry in value if isinstance(value, list) and value else [value]:
            name = _image_name(entry, self.folder)
            try:
                images.append(self.image(entry, name, self.folder))
            except BadRow as bad:
                where = f"image={name!r} in {self.folder}; mend it, or dataset.images"
                raise BadRow(bad.reason, f"{bad.detail}; {where}" if bad.detail else where) from bad
        return tuple(images)

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        if row.get("box") is None:
            return _answers(row.get("answers"))
        return (self.longest_box(),) if self.longest_box() else ()

    def references(self, limit: int | None = None) -> Iterator[tuple[str, ...]]:
        return Benchmark.references(self, limit) if self.labelled else iter(())

    # --- score ------------------------------------------------------------------------------------

    def score(self, sample: Sample, prediction: str) -> float:
        if sample.box is not None:
            return float(self.iou(sample, prediction) >= 0.5)
        return float(
            prediction.strip().lower() in {answer.strip().lower() for answer in sample.answers}
        )

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """Right, asked; IoU, boxes asked for."""
        boxes = float(sample.box is not None)
        overlap = self.iou(sample, prediction) if boxes else 0.0
        return (self.score(sample, prediction), 1.0, overlap, boxes)

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        right, asked, overlap, boxes = total.unbind(-1)
        numbers = {"accuracy": 100 * right / asked}
        return numbers | {"mean_iou": 100 * overlap / boxes} if self._boxes else numbers


class _Entry(NamedTuple):
    """What is known of a row before its image is opened."""

    image: str
    key: str  # in uids
    part: Any
    filled: frozenset[str]  # columns


def _entry(row: Mapping[str, Any], place: int, folder: Path) -> _Entry:
    filled = frozenset(name for name, value in row.items() if value is not None)
    key = writable(str(row["id"])).replace("/", "_") if "id" in filled else f"row{place + 1}"
    return _Entry(_image_name(row.get("image"), folder), key, row.get("split"), filled)


def _image_name(value: Any, folder: Path) -> str:
    """What an image is called in uids, and what decides its part: the same for every spelling of
    its path; several images go by the first."""
    if isinstance(value, list):
        return _image_name(value[0], folder) if value else ""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    # the image itself, not its name
    if isinstance(value, bytes) or (isinstance(value, str) and embedded(value)):
        content = value if isinstance(value, bytes) else value.encode("utf-8", "backslashreplace")
        return hashlib.blake2b(content, digest_size=8).hexdigest()
    if value is None or not str(value):
        return ""
    return writable(os.path.relpath(folder / str(value), folder))


def _counted(parts: Sequence[Any]) -> str:
    counts = Counter(map(str, parts))
    return ", ".join(f"{part} {counts[part]}" for part in sorted(counts))


def _answers(value: Any) -> tuple[str, ...]:
    kept = tuple(text for text in texts_of(value) if text.strip())
    if not kept:
        raise BadRow(
            "no answer", f"answers={shortened(value)}; give a text or a list of texts, or a box"
        )
    return kept
