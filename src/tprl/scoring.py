"""How an LVLM does on samples when it reads a given prompt: the one measurement behind rewards and evaluation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.splice import keep_all, splice
from tprl.types import LVLM, Dataset, Encoded, Prompt, Sample


class Scored(NamedTuple):
    """Per sample: the task's own score in [0, 1], the reference answer's mean log-probability (nats per token), and
    the generated text (None where one teacher-forced forward decided)."""

    score: Float[Tensor, " B"]
    log_prob: Float[Tensor, " B"]
    predictions: list[str | None]


class Scorer:
    """Scores prompts by the dataset's own rule. Scores with all tokens are computed once per sample and kept.

    Args:
        lvlm: the frozen model.
        dataset: whose official score counts.
        needs: what to measure; without "score" nothing is generated, and scores are nan.
    """

    def __init__(self, lvlm: LVLM, dataset: Dataset, needs: frozenset[str] = frozenset({"score", "log_prob"})) -> None:
        self.lvlm, self.dataset, self.needs = lvlm, dataset, needs
        self._full: dict[str, tuple[float, float]] = {}
        self.evaluations = 0  # prompts that the LVLM has read

    def __call__(self, samples: Sequence[Sample], prompt: Prompt, **how: Any) -> Scored:
        """Measure each sample on its prompt; `how` goes to the LVLM (a plan of drops between its layers).

        One teacher-forced forward gives likelihood and, where an exact match decides, the score; the other samples'
        answers are generated.
        """
        log_prob, exact = self.lvlm.score(prompt, [sample.answers[0] for sample in samples], **how)
        self.evaluations += len(samples)
        score = exact.float()
        texts: list[str | None] = [None] * len(samples)
        if "score" not in self.needs:
            return Scored(torch.full_like(score, torch.nan), log_prob, texts)
        written = [i for i, sample in enumerate(samples) if not self.dataset.teacher_forced(sample)]
        if written:
            answers = self.lvlm.answer(prompt.rows(torch.tensor(written, device=prompt.embeds.device)), **how)
            for i, text in zip(written, answers, strict=True):
                score[i], texts[i] = self.dataset.score(samples[i], text), text
        return Scored(score, log_prob, texts)

    def full(self, samples: Sequence[Sample], encoded: Encoded) -> Scored:
        """The same with all visual tokens, from memory where this scorer has seen the sample."""
        fresh = [i for i, sample in enumerate(samples) if sample.uid not in self._full]
        if fresh:
            part = encoded.rows(fresh)
            found = self([samples[i] for i in fresh], splice(part, keep_all(part)))
            pairs = zip(found.score.tolist(), found.log_prob.tolist(), strict=True)
            self._full.update(zip((samples[i].uid for i in fresh), pairs, strict=True))
        score, log_prob = zip(*(self._full[sample.uid] for sample in samples), strict=True)
        device = encoded.embeds.device
        return Scored(torch.tensor(score, device=device), torch.tensor(log_prob, device=device), [None] * len(samples))
