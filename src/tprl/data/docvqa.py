"""DocVQA: questions about pages of documents."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from tprl.data.benchmark import Benchmark, text_of, texts_of
from tprl.types import Sample

PROMPT = "{question}\nAnswer the question using a single word or phrase."
THRESHOLD = 0.5


class DocVQA(Benchmark):
    """Average normalized Levenshtein similarity (ANLS), percent.

    Source: "Scene Text Visual Question Answering" (Biten et al., arXiv 1905.13648) defines it,
    "DocVQA" (Mathew et al., arXiv 2007.00398) uses it. Answers of the test set are not public:
    "test" is the validation split.
    """

    name = "docvqa"
    hub = "lmms-lab/DocVQA"
    subset = "DocVQA"
    splits: ClassVar = {"test": "validation"}
    protocol = "DocVQA ANLS on validation, threshold 0.5; case and runs of white space ignored"
    headline = "anls"
    answer_tokens = 32
    answer_columns = ("answers",)

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        page = f"{row['ucsf_document_id']}-{row['ucsf_document_page_no']}"
        question = PROMPT.format(question=text_of(row["question"], "empty question"))
        answers = tuple(self.answers_in(row))
        return Sample(
            self.uid(page, row["questionId"]), (self.image(row["image"], page),), question, answers
        )

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        return [text for text in texts_of(row["answers"]) if text.strip()]

    def score(self, sample: Sample, prediction: str) -> float:
        return anls(prediction, sample.answers)

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        return {"anls": 100 * total[..., 0] / total[..., 1]}


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The best answer's 1 - edits / length of the longer text, and 0 where that is below the
    threshold.

    As in the released evaluation exactly the threshold counts, and lengths are those before white
    space is merged.
    """
    reply = _plain(prediction)
    best = 0.0
    for answer in answers:
        # NL = edits / length of the longer text; ANLS takes the best answer (1905.13648, eq. 1).
        longer = max(len(answer), len(prediction))
        best = max(best, 1 - float(edit_distance(reply, _plain(answer), reduction="sum")) / longer)
    return best if best >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
