"""`screens`: pages drawn by a real browser; an instruction names one element, or a question asks
what is shown.

Validation, test, final and real pages ship with TPRL, one zip per split of WebP pictures and JSON
lines: the core reads these without the extra `data`, which parquet would need. Training pages come
from experiments/screens/render.mjs.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tprl.data.benchmark import scaled, text_of
from tprl.data.boxes import inside
from tprl.data.grounding import Grounding
from tprl.data.tables import Table
from tprl.data.taking import BadRow
from tprl.errors import UserError
from tprl.types import Box, Sample

POINTING = ("text", "icon", "field", "relation")  # families whose answer is a box
# families whose answer is a word or two, or a number
READING = ("value", "state", "count", "neighbor")
FAMILIES = POINTING + READING
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "screens"
RENDERED = Path("runs/cache/screens")
RENDER = "cd experiments/screens && npm install && node render.mjs --split {split} --seed {seed}"
POINT = "Find the element of this screen that the instruction is about.\nInstruction: {instruction}"
READ = "{instruction}\nAnswer with one or two words from the screen, a number, yes or no."


class Screens(Grounding):
    """Accuracy over all questions, per family, of clicks and of reading; and mean IoU of the boxes;
    percent.

    A click is right if the point of an answer, or the center of its box, is in the true box, edges
    included (as in ScreenSpot). A read answer is right if it is the true one, up to case, outer
    spaces, quotes and a final period. Pictures are 320 x 320 pixels; questions about one share the
    image part of their uid.

    Args:
        split: "train", "val", "test", "final" (read it once, for claims), or "real" (pages that
            people published, of frameworks that no other split has).
        source: a folder with `<split>.zip` or rendered pages `<split>-<seed>`; None is what ships,
            for training `runs/cache/screens`.
        seed: of the rendered training pages.
        families: which families to ask.
        bare: ask with the instruction alone, and write boxes as four whole numbers of pixels
            without brackets, as an LVLM does that was trained on these questions. Then one
            teacher-forced forward scores read answers.
        limit, max_bad_rows, coordinates: see `Grounding`.

    Raises:
        UserError: no such split or family, no pages there, damaged files, coordinates that
            contradict `bare`, or `Grounding`'s reasons.
    """

    name = "screens"
    hub = ""
    splits: ClassVar = {name: name for name in ("train", "val", "test", "final", "real")}
    protocol = (
        "screens: clicks (the center of the box, or the point, must be in the true box) "
        "and exact short answers (case, outer spaces, quotes and a final period ignored)"
    )
    answer_tokens = 64

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        source: str | None = None,
        max_bad_rows: float = 0.01,
        coordinates: str | None = None,
        seed: int = 0,
        families: Sequence[str] = FAMILIES,
        bare: bool = False,
    ) -> None:
        unknown = sorted(set(families) - set(FAMILIES))
        if unknown or not families or len(set(families)) < len(families):
            raise UserError(
                f"dataset.families={list(families)} is not valid for screens: "
                f"choose each at most once from {', '.join(FAMILIES)}."
            )
        if split not in self.splits:
            raise UserError(
                f"dataset split '{split}' does not exist in "
                f"screens: choose one of {', '.join(self.splits)}."
            )
        if bare and coordinates not in (None, "absolute"):
            raise UserError(
                "dataset.bare=true writes pixels, not "
                f"coordinates={coordinates}: leave one of them out."
            )
        self.seed, self.families, self.bare = seed, tuple(families), bare
        self._pictures: dict[str, bytes] = {}
        place = Path(source) if source else RENDERED if split == "train" else SHIPPED
        if bare:
            coordinates, self.answer_tokens = "absolute", 16
        super().__init__(split, limit, str(place), max_bad_rows, coordinates)

    # --- files ------------------------------------------------------------------------------------

    def read(self, source: str, split: str) -> Table:
        archive, folder = Path(source) / f"{split}.zip", Path(source) / f"{split}-{self.seed}"
        if archive.is_file():
            text, self._pictures = _unpacked(archive)
            rows = list(_parsed(text, f"{archive}/questions.jsonl"))
        elif (folder / "questions.jsonl").is_file():
            text = (folder / "questions.jsonl").read_text(encoding="utf-8")
            # The last line may be one that is being written; pages are in the order of their
            # numbers, not of rendering.
            rows = list(_parsed(text[: text.rfind("\n") + 1], f"{folder}/questions.jsonl"))
            rows.sort(key=lambda row: row.get("page", 0))
            self._pages = folder
        else:
            command = RENDER.format(split=split, seed=self.seed)
            raise UserError(
                f"there are no pages of screens for split {split} in {source} "
                f"({archive.name} or {folder.name}): render them with "
                f"`{command}`, or give dataset.source=<a folder with them>."
            )
        return [
            row
            for row in rows
            if row.get("family") in self.families or row.get("family") not in FAMILIES
        ]

    @property
    def folder(self) -> Path:
        return getattr(self, "_pages", super().folder)

    # --- questions --------------------------------------------------------------------------------

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        family, name = row["family"], row["img_filename"]
        if family not in FAMILIES:
            raise BadRow("unknown family")
        instruction = text_of(row["instruction"], "empty question")
        # Shipped pages are in a zip that is read once, rendered ones are files.
        stored = {"bytes": self._pictures[name]} if name in self._pictures else name
        image = self.image(stored, name)
        box, *others = [self._box(numbers, row, image) for numbers in (row["bbox"], *row["region"])]
        uid = self.uid(f"{row['application']}-{row['page']}", row["id"])
        if family in POINTING:
            asked = instruction if self.bare else self.asked(POINT.format(instruction=instruction))
            answer = self.written(box, image)
            return Sample(uid, (image,), asked, (answer,), family, box, tuple(others))
        question = instruction if self.bare else READ.format(instruction=instruction)
        answer = text_of(row["answer"], "no answer")
        return Sample(uid, (image,), question, (answer,), family, None, tuple(others))

    def written(self, box: Box, image: Image.Image) -> str:
        return " ".join(str(round(v)) for v in box) if self.bare else super().written(box, image)

    def score(self, sample: Sample, prediction: str) -> float:
        if sample.box is None:
            answers = {comparable_answer(answer) for answer in sample.answers}
            return float(comparable_answer(prediction) in answers)
        place = self.place_in(prediction, sample.images[0])
        return float(place is not None and inside(place, sample.box))

    def teacher_forced(self, sample: Sample) -> bool:
        """Only `bare`, where the LVLM writes nothing but the answer; a click needs the generated
        box."""
        return self.bare and sample.box is None

    def _box(self, numbers: Any, row: Mapping[str, Any], image: Image.Image) -> Box:
        if len(numbers or ()) != 4 or len(row["img_size"] or ()) != 2:
            raise BadRow("no box")
        x1, y1, x2, y2 = map(float, numbers)
        if x1 >= x2 or y1 >= y2:
            raise BadRow("no box")
        return scaled((x1, y1, x2, y2), tuple(row["img_size"]), image)

    # --- official numbers -------------------------------------------------------------------------

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each family: right, asked; then the sum of IoUs."""
        counts = [0.0] * 2 * len(FAMILIES)
        at = 2 * FAMILIES.index(sample.family)
        counts[at : at + 2] = self.score(sample, prediction), 1.0
        return (*counts, self.iou(sample, prediction))

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """Percent; nan for what was not asked. `click` is over the families of POINTING, `read`
        over those of READING, `mean_iou` over the boxes."""
        # The last number is the sum of IoUs, before it two per family.
        right, asked = total[..., :-1].unflatten(-1, (len(FAMILIES), 2)).unbind(-1)
        pointing = slice(0, len(POINTING))
        reading = slice(len(POINTING), None)
        numbers = {
            "accuracy": 100 * right.sum(-1) / asked.sum(-1),
            "click": 100 * right[..., pointing].sum(-1) / asked[..., pointing].sum(-1),
            "read": 100 * right[..., reading].sum(-1) / asked[..., reading].sum(-1),
            "mean_iou": 100 * total[..., -1] / asked[..., pointing].sum(-1),
        }
        for at, family in enumerate(FAMILIES):
            numbers[f"accuracy/{family}"] = 100 * right[..., at] / asked[..., at]
        return numbers


def comparable_answer(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().strip("\"'").rstrip(".").strip().lower()


def _unpacked(archive: Path) -> tuple[str, dict[str, bytes]]:
    """The lines and the pictures of a zip."""
    try:
        with zipfile.ZipFile(archive) as file:
            pictures = {
                name: file.read(name) for name in file.namelist() if name.startswith("images/")
            }
            return file.read("questions.jsonl").decode("utf-8"), pictures
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, EOFError, OSError) as error:
        raise UserError(
            f"{archive} is damaged ({error}): install tprl "
            "again, or pack it with experiments/screens/pack.py."
        ) from error


def _parsed(text: str, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(io.StringIO(text), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}, line {number}, is not JSON ({error.msg}): render its page again."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}, is not an object: render its page again.")
        yield row
