"""TextVQA: questions that need the text in a photograph, each answered by ten people."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tprl.data.benchmark import Benchmark, text_of, texts_of
from tprl.data.tables import Table, column
from tprl.data.vqa_accuracy import by_frequency, normalized_text, soft_accuracy
from tprl.seeding import stable_seed
from tprl.types import Sample

HINT = "\nReference OCR token: {tokens}"
INSTRUCTION = "\nAnswer the question using a single word or phrase."
HELD_OUT = 20  # one in so many training images is for validation


class TextVQA(Benchmark):
    """VQA accuracy, percent, with or without the words that an OCR system has read in the prompt.

    Source: "Towards VQA Models That Can Read" (Singh et al., arXiv 1904.08920), normalized as LLaVA
    does (see `vqa_accuracy.normalized_text`). LLaVA-1.5's published number is with hints, most
    later papers' without: the two differ by ten points. "test" is the validation split, as usual;
    "val" is one in twenty training images.

    Args:
        ocr_hints: put the OCR words into the prompt, in LLaVA's form.
        options: of `Benchmark`.
    """

    name = "textvqa"
    hub = "lmms-lab/textvqa"
    splits: ClassVar = {"train": "train", "val": "train", "test": "validation"}

    answer_columns = ("answers",)

    def __init__(self, split: str = "test", ocr_hints: bool = False, **options: Any) -> None:
        self.ocr_hints = ocr_hints
        hints = "with OCR words in the prompt" if ocr_hints else "without OCR words"
        self.protocol = (
            f"TextVQA accuracy on validation, {hints}: "
            "min(1, matches/3) over 10 leave-one-out subsets"
        )
        super().__init__(split, **options)

    def read(self, source: str, split: str) -> Table:
        rows = super().read(source, split)
        self._places = list(range(len(rows)))
        # Held out by image, by a hash of its id: the same on every machine, whatever the order.
        if self.split in ("train", "val"):
            held = [stable_seed(str(key), 0) % HELD_OUT == 0 for key in column(rows, "image_id")]
            self._places = [place for place in self._places if held[place] == (self.split == "val")]
        return rows

    def count(self) -> int:
        return len(self._places)

    def at(self, index: int) -> int:
        return self._places[index]

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        question = text_of(row["question"], "empty question")
        if self.ocr_hints:
            question += HINT.format(tokens=", ".join(texts_of(row["ocr_tokens"])))
        answers = tuple(self.answers_in(row))
        image = self.image(row["image"], row["image_id"])
        return Sample(
            self.uid(row["image_id"], row["question_id"]), (image,), question + INSTRUCTION, answers
        )

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        return by_frequency(texts_of(row["answers"]))

    def score(self, sample: Sample, prediction: str) -> float:
        answers = [normalized_text(answer) for answer in sample.answers]
        return soft_accuracy(normalized_text(prediction), answers)
