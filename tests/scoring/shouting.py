"""Questions whose references are spelled as no model writes them."""

from typing import Any

from tprl.types import Sample


class Shouting:
    """Put before a dataset, it writes references in capitals; the official score does not mind the
    case."""

    def __getitem__(self, index: int) -> Sample:
        dataset: Any = super()
        sample = dataset.__getitem__(index)
        return sample._replace(answers=(sample.answers[0].upper(),))

    def score(self, sample: Sample, prediction: str) -> float:
        return float(prediction.upper() == sample.answers[0])

    def teacher_forced(self, sample: Sample) -> bool:
        return False
