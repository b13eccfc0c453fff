"""MMBench: multiple choice in which every rotation of the options must be answered right."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.data.benchmark import text_of
from tprl.data.choices import LETTERS, RULE, MultipleChoice, number_of
from tprl.data.tables import Table, column
from tprl.types import Sample

OPTIONS = LETTERS[:4]
CIRCULAR = 1_000_000  # rows with a larger index repeat a question with its options rotated


class MMBench(MultipleChoice):
    """Accuracy by circular evaluation, also per L2 category, and plain ("vanilla") accuracy,
    percent.

    Source: "MMBench: Is Your Multi-modal Model an All-around Player?" (Liu et al., arXiv
    2307.06281): a question with n options is asked n times, each time with the options moved on by
    one, and is right only if all n answers are. "vanilla" counts the unrotated pass alone. The
    hub's rows hold the rotations already, under an index that is larger by 1,000,000, 2,000,000,
    ...; these are left out and made here from the first pass, so that a question's passes follow
    each other, and files with the first pass alone serve as well. `limit` counts passes. A question
    of which not all passes were answered counts in "vanilla" only.

    The answers of "test" are not public: "test" is the repository's dev split here, as in most
    papers. Hints stand before the question, as in LLaVA-1.5.
    """

    name = "mmbench"
    hub = "lmms-lab/MMBench"
    subset = "en"
    splits: ClassVar = {"test": "dev"}
    protocol = f"MMBench (en, dev) accuracy by circular evaluation; {RULE}"

    def read(self, source: str, split: str) -> Table:
        rows = super().read(source, split)
        # Rotations of the hub's table are left out: passes are made here, one per option.
        options = zip(*(column(rows, letter) for letter in OPTIONS), strict=True)
        passes = enumerate(zip(column(rows, "index"), map(_present, options), strict=True))
        first = [
            (at, max(len(there), 1)) for at, (index, there) in passes if int(index or 0) < CIRCULAR
        ]
        self._passes = [(at, turn, turns) for at, turns in first for turn in range(turns)]
        self.categories = sorted({str(name) for name in column(rows, "L2-category")})
        return rows

    def count(self) -> int:
        return len(self._passes)

    def at(self, index: int) -> int:
        return self._passes[index][0]

    def sample(self, row: Mapping[str, Any], index: int) -> Sample:
        _, turn, turns = self._passes[index]
        options = _present([row.get(letter) for letter in OPTIONS])
        # With the options moved on by `turn`, the right one moves back by as many.
        right = number_of(row["answer"])
        if 0 <= right < turns:
            right = (right - turn) % turns
        key = text_of(row["index"], "no index")
        question = text_of(row["question"], "empty question")
        if _is_there(row["hint"]):
            question = "\n".join([text_of(row["hint"], "no hint"), question])
        return self.posed(
            self.uid(key, f"{turn + 1}of{turns}"),
            self.image(row["image"], key),
            question,
            options[turn:] + options[:turn],
            right,
            str(row["L2-category"]),
        )

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        """For each category: right, asked, passes that the question has, right and asked in the
        unrotated pass."""
        turn, turns = map(float, sample.uid.rpartition("/")[2].split("of"))
        right, first = self.score(sample, prediction), float(turn == 1)
        counts = [0.0] * 5 * len(self.categories)
        place = 5 * self.categories.index(sample.family)
        counts[place : place + 5] = right, 1.0, turns, right * first, first
        return counts

    def per_image(self, facts: Float[Tensor, "N F"]) -> Float[Tensor, " G"]:
        """For each category: all passes right, all passes asked, right and asked in the unrotated
        pass."""
        # [passes categories 5]: circular counts only where every pass was asked.
        blocks = facts.unflatten(-1, (len(self.categories), 5))
        right, asked, _, first_right, first = blocks.sum(0).unbind(-1)
        complete = (asked > 0) & (asked == blocks[..., 2].amax(0))
        counts = [complete & (right == asked), complete, first_right, first]
        return torch.stack(counts, -1).flatten()

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]:
        """Percent; nan where no question was asked."""
        blocks = total.unflatten(-1, (len(self.categories), 4))
        right, asked, first_right, first = blocks.sum(-2).unbind(-1)
        numbers = {"accuracy": 100 * right / asked, "vanilla": 100 * first_right / first}
        for place, name in enumerate(self.categories):
            numbers[f"accuracy/{name}"] = 100 * blocks[..., place, 0] / blocks[..., place, 1]
        return numbers


def _present(options: Sequence[Any]) -> list[Any]:
    """The options up to the first that is missing."""
    missing = [place for place, option in enumerate(options) if not _is_there(option)]
    return list(options[: missing[0]] if missing else options)


def _is_there(value: Any) -> bool:
    """The hub's table was made from one with gaps, which became the text "nan"."""
    return value is not None and str(value).strip() not in ("", "nan")
