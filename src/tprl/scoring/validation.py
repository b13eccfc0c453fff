"""The served score: what a pruner in training would score at inference, on a small fixed validation
set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tprl.data.taking import nothing_left
from tprl.errors import UserError
from tprl.pruners.chunks import select_in_chunks
from tprl.runtime import distributed
from tprl.scoring.ahead import ahead, numbered_ready
from tprl.scoring.scorer import Agreement, Scorer
from tprl.splice import keep_all, splice
from tprl.types import LVLM, Dataset, Encoded, Pruner, Sample

LIMIT = 400  # questions, where the settings do not say


def merit(score: Mapping[str, float]) -> float:
    """What chooses checkpoints: accuracy, and log-likelihood at a hundredth of its size between
    equal counts."""
    return score["accuracy"] + 0.01 * score["log_prob"]


class ServedScore:
    """Validation questions, encoded once; each rank has a part of them, and all get the scores of
    all of them.

    Args:
        lvlm, dataset: the frozen model and the validation split.
        keep_ratios: kept fractions to serve; their mean score selects checkpoints.
        limit: questions used; None: the whole split.
        batch_size: questions per encoding.
        labels: False scores agreement with the LVLM's own answers and reads no reference answer.
        first: number of the first question, so that what one choice was made on does not judge the
            next; questions are counted on from the beginning where the split is too short.
        extras: what the pruners read of the vision tower beside the tokens.
    """

    def __init__(
        self,
        lvlm: LVLM,
        dataset: Dataset,
        keep_ratios: Sequence[float],
        limit: int | None = LIMIT,
        batch_size: int = 100,
        labels: bool = True,
        first: int = 0,
        extras: frozenset[str] = frozenset(),
    ) -> None:
        self.keep_ratios, self.extras = tuple(keep_ratios), extras
        self.scorer = Scorer(lvlm, dataset)
        self.batches: list[tuple[list[Sample], Encoded]] = []
        # Cut by number before ranks share them: every rank count judges on the same questions.
        numbers = [(first + i) % len(dataset) for i in range(_size(dataset, limit))]
        share = distributed.share(numbers)
        for batch in ahead(lvlm, numbered_ready(dataset, share, batch_size)):
            self.batches.append((batch.samples, batch.encode(lvlm, extras)))
        # All ranks raise or none does: one alone would leave the others waiting.
        if not all(distributed.gathered(bool(self.batches))):
            raise _nothing_left(dataset, limit)
        # The model's own answers become the labels, and `Agreement` their rule.
        if not labels:
            answers = [
                lvlm.answer(splice(encoded, keep_all(encoded))) for _, encoded in self.batches
            ]
            same = [
                Agreement(chunk, texts)
                for (chunk, _), texts in zip(self.batches, answers, strict=True)
            ]
            self.batches = [
                (relabelled.samples, encoded)
                for relabelled, (_, encoded) in zip(same, self.batches, strict=True)
            ]
            self.scorer = Scorer(lvlm, same[0])
        self.targets = [self.scorer.targets(samples, encoded) for samples, encoded in self.batches]

    def __call__(
        self, pruner: Pruner, keep_ratios: Sequence[float] | None = None
    ) -> dict[str, float]:
        """`accuracy` and `log_prob` (nats per token), means over questions and ratios, and
        `accuracy@<ratio>`; at other ratios than those of this score where some are named."""
        ratios = self.keep_ratios if keep_ratios is None else keep_ratios
        out: dict[str, float] = {}
        total = 0.0
        for ratio in ratios:
            # Selections at each ratio start from the encodings of `__init__`.
            right = 0.0
            for (samples, encoded), targets in zip(self.batches, self.targets, strict=True):
                prompt = splice(encoded, select_in_chunks(pruner, encoded, ratio))
                scored = self.scorer(samples, prompt, targets)
                right += float(scored.score.sum())
                total += float(scored.log_prob.sum())
            out[f"accuracy@{ratio:.3f}"] = self._mean(right)
        out["accuracy"] = sum(out.values()) / len(ratios)
        out["log_prob"] = self._mean(total) / len(ratios)
        return out

    def encode_again(self) -> None:
        """Encode the questions anew, for a model whose vision side has changed."""
        lvlm = self.scorer.lvlm
        self.batches = [(samples, lvlm.encode(samples, self.extras)) for samples, _ in self.batches]

    def log_prob(self, pruner: Pruner, keep_ratio: float) -> float:
        """Mean log-likelihood of the answers at one keep ratio, nats per token; nothing is
        generated."""
        total = 0.0
        for (_, encoded), targets in zip(self.batches, self.targets, strict=True):
            prompt = splice(encoded, select_in_chunks(pruner, encoded, keep_ratio))
            total += float(self.scorer.lvlm.score(prompt, targets)[0].sum())
        return self._mean(total)

    def _mean(self, total: float) -> float:
        """Over the questions of all ranks, of a sum over this rank's; the same number on every
        rank."""
        # float64, so that the sum over ranks is the sum over questions to the last digit shown.
        totals = torch.tensor(
            [total, sum(len(chunk) for chunk, _ in self.batches)], dtype=torch.float64
        )
        whole, count = distributed.stacked(totals).sum(0).tolist()
        return whole / count


def after_these(dataset: Dataset, limit: int | None = LIMIT, first: int = 0, **others: Any) -> int:
    """Number of the question after those that a `ServedScore` with these settings uses."""
    return first + _size(dataset, limit)


def _size(dataset: Dataset, limit: int | None) -> int:
    """How many questions there are of the split and a limit."""
    return min(limit or len(dataset), len(dataset))


def _nothing_left(dataset: Dataset, limit: int | None) -> UserError:
    """The same sentence on every rank."""
    damage = sum(
        (Counter(part) for part in distributed.gathered(getattr(dataset, "damage", {}))),
        Counter[str](),
    )
    # Either every row is damaged, or one rank has none that is whole.
    asked = _size(dataset, limit)
    if damage.total() == asked:
        return nothing_left(dataset, asked, "to validate on", damage)
    listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(damage.items()))
    remedy = (
        "use fewer ranks"
        if asked == len(dataset)
        else f"raise stage.served.limit={limit}, or use fewer ranks"
    )
    return UserError(
        f"one of {distributed.count()} ranks has no undamaged row of {dataset.name} to validate on "
        f"(damaged: {listed or 0}): {remedy}."
    )
