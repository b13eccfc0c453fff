"""The served score: what a pruner in training would score at inference, on a small fixed validation
set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from tprl.data.base import BaseDataset
from tprl.data.taking import nothing_left
from tprl.errors import UserError
from tprl.pruners.chunks import select_in_chunks
from tprl.runtime import distributed, memory
from tprl.scoring.ahead import Ready, ahead, in_parts, numbered_ready, questions_at_once
from tprl.scoring.scorer import Agreement, Reader, Scorer
from tprl.splice import keep_all, splice
from tprl.types import LVLM, Encoded, Pruner, Sample

LIMIT = 400  # questions, where the settings do not say
AT_ONCE = 100  # of them that are encoded together, where memory holds as many


def merit(score: Mapping[str, float]) -> float:
    """What chooses checkpoints: accuracy, and log-likelihood at a hundredth of its size between
    equal counts."""
    return score["accuracy"] + 0.01 * score["log_prob"]


class Held(Sequence[tuple[list[Sample], Encoded]]):
    """Batches of encoded questions that stay: on the device as long as the budget of bytes holds
    them, else all of them on the host, from where each comes when it is read."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget, self.bytes = device, budget, 0
        self.samples: list[list[Sample]] = []
        self.encodings: list[Encoded] = []

    def add(self, samples: list[Sample], encoded: Encoded) -> None:
        """A further batch."""
        self.samples.append(samples)
        self.bytes += sum(tensor.nbytes for tensor in _tensors(encoded).values())
        self.encodings.append(encoded)
        if self.bytes > self.budget and self.device.type != "cpu":
            host = torch.device("cpu")
            self.encodings = [moved(part, host) for part in self.encodings]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: Any) -> Any:
        return self.samples[number], moved(self.encodings[number], self.device)


def moved(encoded: Encoded, device: torch.device) -> Encoded:
    """The same on another device; itself where it is there."""
    tensors = _tensors(encoded)
    if all(tensor.device == device for tensor in tensors.values()):
        return encoded
    copy = replace(
        encoded,
        extras={name: value.to(device) for name, value in encoded.extras.items()},
        **{name: tensors[name].to(device) for name in tensors if name not in encoded.extras},
    )
    # What the host knows of it stays known.
    vars(copy)["counts"] = encoded.counts
    return copy


def _tensors(encoded: Encoded) -> dict[str, Tensor]:
    """Fields and extras."""
    named = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return {k: v for k, v in (named | encoded.extras).items() if isinstance(v, Tensor)}


class ServedScore:
    """Validation questions, encoded once; each rank has a part of them, and all get the scores of
    all of them.

    Args:
        lvlm, dataset: the frozen model and the validation split.
        keep_ratios: kept fractions to serve; their mean score selects checkpoints.
        limit: questions used; None: the whole split.
        batch_size: questions per encoding; None: `AT_ONCE`, or what memory holds.
        labels: False scores agreement with the LVLM's own answers and reads no reference answer.
        first: number of the first question, so that what one choice was made on does not judge the
            next; questions are counted on from the beginning where the split is too short.
        extras: what the pruners read of the vision tower beside the tokens.
        reader: see `Scorer`.
    """

    def __init__(
        self,
        lvlm: LVLM,
        dataset: BaseDataset,
        keep_ratios: Sequence[float],
        limit: int | None = LIMIT,
        batch_size: int | None = None,
        labels: bool = True,
        first: int = 0,
        extras: frozenset[str] = frozenset(),
        reader: Reader | None = None,
    ) -> None:
        self.keep_ratios, self.extras = tuple(keep_ratios), extras
        self.scorer = Scorer(lvlm, dataset, reader=reader)
        self.budget = memory.working_bytes(lvlm)
        self.batches: Sequence[tuple[list[Sample], Encoded]] = []
        # Cut by number before ranks share them: every rank count judges on the same questions.
        numbers = [(first + i) % len(dataset) for i in range(_size(dataset, limit))]
        share = distributed.share(numbers)
        size = questions_at_once(lvlm, dataset, AT_ONCE) if batch_size is None else batch_size
        held = Held(lvlm.device, memory.working_bytes(lvlm))

        def work(batch: Ready) -> tuple[list[Sample], Encoded]:
            return batch.samples, batch.encode(lvlm, extras)

        for batch in ahead(lvlm, numbered_ready(dataset, share, size)):
            for part in in_parts(work, batch, lvlm.name):
                held.add(*part)
        self.batches = held
        # All ranks raise or none does: one alone would leave the others waiting.
        if not all(distributed.gathered(bool(self.batches))):
            raise _nothing_left(dataset, limit)
        # The model's own answers become the labels, and `Agreement` their rule.
        if not labels:
            answers = [
                self.scorer.reader.answer(splice(encoded, keep_all(encoded)))
                for _, encoded in self.batches
            ]
            same = [
                Agreement(chunk, texts)
                for (chunk, _), texts in zip(self.batches, answers, strict=True)
            ]
            held.samples = [relabelled.samples for relabelled in same]
            self.scorer = Scorer(lvlm, same[0], reader=reader)
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
                prompt = splice(encoded, select_in_chunks(pruner, encoded, ratio, self.budget))
                scored = self.scorer(samples, prompt, targets)
                right += float(scored.score.sum())
                total += float(scored.log_prob.sum())
            out[f"accuracy@{ratio:.3f}"] = self._mean(right)
        out["accuracy"] = sum(out.values()) / len(ratios)
        out["log_prob"] = self._mean(total) / len(ratios)
        return out

    def encode_again(self) -> None:
        """Encode the questions anew, for a model whose vision side has changed."""
        lvlm, again = self.scorer.lvlm, []
        for samples, _ in self.batches:
            again.append((samples, Ready(samples).encode_in_parts(lvlm, self.extras)))
        self.batches = again

    def log_prob(self, pruner: Pruner, keep_ratio: float) -> float:
        """Mean log-likelihood of the answers at one keep ratio, nats per token; nothing is
        generated."""
        total = 0.0
        for (_, encoded), targets in zip(self.batches, self.targets, strict=True):
            prompt = splice(encoded, select_in_chunks(pruner, encoded, keep_ratio, self.budget))
            total += float(self.scorer.reader.score(prompt, targets)[0].sum())
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


def after_these(
    dataset: BaseDataset, limit: int | None = LIMIT, first: int = 0, **others: Any
) -> int:
    """Number of the question after those that a `ServedScore` with these settings uses."""
    return first + _size(dataset, limit)


def _size(dataset: BaseDataset, limit: int | None) -> int:
    """How many questions there are of the split and a limit."""
    return min(limit or len(dataset), len(dataset))


def _nothing_left(dataset: BaseDataset, limit: int | None) -> UserError:
    """The same sentence on every rank."""
    damage = sum(map(Counter, distributed.gathered(dict(dataset.damage))), Counter[str]())
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
