"""VQAv2: open questions about photographs, each answered by ten people."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import Benchmark, text_of, texts_of
from tprl.data.taking import BadRow
from tprl.data.values import several
from tprl.data.vqa_accuracy import by_frequency, normalized, soft_accuracy
from tprl.types import Sample

PROMPT = "{question}\nAnswer the question using a single word or phrase."
TYPES = {"yes/no": "yes_no", "number": "number", "other": "other"}


class VQAv2(Benchmark):
    """VQA accuracy, percent, over all questions and per type of answer.

    Source: "Making the V in VQA Matter" (Goyal et al., arXiv 1612.00837) and its released
    evaluation. That script compares unchanged text where all ten people agree, and where they do
    not it takes only punctuation from their answers (numbers and articles from the given one
    alone). Here both sides are normalized in full always, so an answer "the cat" that people gave
    with its article counts here and not there. Answers of the test sets are not
    public: "test" is the validation split, and the numbers of papers on test-dev are others.
    """

    name = "vqav2"
    hub = "lmms-lab/VQAv2"
    splits: ClassVar = {"test": "validation"}
    answer_columns = ("answers",)
    protocol = (
        "VQAv2 accuracy on validation: min(1, matches/3) over "
        "10 leave-one-out subsets, official normalization"
    )

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        if row["answer_type"] not in TYPES:
            raise BadRow("unknown type of answer")
        answers = tuple(self.answers_in(row))
        question = PROMPT.format(question=text_of(row["question"], "empty question"))
        image = self.image(row["image"], row["image_id"])
        uid = self.uid(row["image_id"], row["question_id"])
        return Sample(uid, (image,), question, answers, TYPES[row["answer_type"]])

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        """As the repository stores them, {"answer": ...} of each of ten people, or as texts; most
        frequent first."""
        texts: list[str] = []
        for person in several(row["answers"]):
            answer = person.get("answer") if isinstance(person, Mapping) else person
            # A gap is an empty answer of one of the ten, and counts among them.
            texts += texts_of("" if answer is None else answer)
        return by_frequency(texts)

    def score(self, sample: Sample, prediction: str) -> float:
        answers = [normalized(answer) for answer in sample.answers]
        return soft_accuracy(normalized(prediction), answers)

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each type of answer: score, asked."""
        counts = [0.0] * 2 * len(TYPES)
        place = 2 * list(TYPES.values()).index(sample.family)
        counts[place : place + 2] = self.score(sample, prediction), 1.0
        return counts

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """Percent; nan for a type that was not asked."""
        score, asked = total.unflatten(-1, (len(TYPES), 2)).unbind(-1)
        numbers = {"accuracy": 100 * score.sum(-1) / asked.sum(-1)}
        names = enumerate(TYPES.values())
        return numbers | {
            f"accuracy/{name}": 100 * score[..., i] / asked[..., i] for i, name in names
        }
