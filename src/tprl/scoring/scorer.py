"""How an LVLM does on samples when it reads a given prompt: the one measurement behind rewards and
evaluation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.runtime import distributed, memory
from tprl.runtime.store import Record
from tprl.splice import keep_all, splice
from tprl.types import LVLM, Encoded, OpenLVLM, Prompt, Sample, TokenSelection, Utterance

LIKELIHOOD = frozenset({"log_prob"})
LABELS = frozenset({"score", "log_prob"})  # measurements that read the reference answers
FIDELITY = frozenset({"answer_kl", "agreement"})  # those that compare with the model's own answers
AT_ONCE = 256  # selections that are prompts at the same time, where memory holds as many
RIGHT = 0.5  # an answer counts as right above this official score


class Scored(NamedTuple):
    """Per sample: the task's own score in [0, 1], the reference answer's mean log-probability (nats
    per token), and the generated text (None where one teacher-forced forward decided)."""

    score: Float[Tensor, " B"]
    log_prob: Float[Tensor, " B"]
    predictions: list[str | None]


class Reference(NamedTuple):
    """The model's own greedy answers with all tokens, and its distributions at each of their
    tokens."""

    answers: list[Utterance]
    log_probs: Float[Tensor, "B A N"]  # nan where an answer is shorter


@runtime_checkable
class Reader(Protocol):
    """Who reads prompts: the LVLM itself, or an engine that has its weights."""

    def answer(self, prompt: Prompt) -> list[str]:
        """Greedy answers."""
        ...

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """See `LVLM.score`."""
        ...


class Scorer:
    """Scores prompts by the dataset's own rule. Scores with all tokens are computed once per sample
    and kept.

    Args:
        lvlm: the frozen model.
        dataset: whose official score counts.
        needs: what to measure; without "score" nothing is generated, and scores are nan, without
            "log_prob" likelihoods are nan where no score needs them.
        reader: who reads prompts in place of `lvlm`, which then only sees; None: `lvlm`.
    """

    def __init__(
        self,
        lvlm: LVLM,
        dataset: BaseDataset,
        needs: frozenset[str] = LABELS,
        reader: Reader | None = None,
    ) -> None:
        self.lvlm, self.dataset, self.needs = lvlm, dataset, needs
        self.reader: Any = lvlm if reader is None else reader
        self._full, self._said = Record(), Record()
        self.evaluations = 0  # prompts that the LVLM has read

    def remember(self, folder: Path) -> None:
        """Keep what is measured with all tokens in `folder`, and begin with what is there. Every
        rank has files of its own: with another's it would measure other batches after a kill than
        without."""
        self._full, self._said = (
            Record(folder / f"{name}.{distributed.rank()}.jsonl") for name in ("full", "own")
        )

    def __call__(
        self,
        samples: Sequence[Sample],
        prompt: Prompt,
        targets: Sequence[str] | None = None,
        **how: Any,
    ) -> Scored:
        """Measure each sample on its prompt; `how` goes to the LVLM (a plan of drops between its
        layers).

        One teacher-forced forward gives likelihood and, where an exact match decides, the score;
        the other samples' answers are generated. `targets` are the answers whose likelihood is
        measured (see the method of that name), the first reference answers if not given.
        """
        texts: list[str | None] = [None] * len(samples)
        unknown = torch.full((len(samples),), torch.nan, device=prompt.embeds.device)
        if not self.needs & LABELS:
            return Scored(unknown, unknown, texts)
        self.evaluations += len(samples)
        # One teacher-forced forward decides where an exact match counts; the others generate.
        written = [i for i, sample in enumerate(samples) if not self.dataset.teacher_forced(sample)]
        read = [i for i in range(len(samples)) if "log_prob" in self.needs or i not in set(written)]
        log_prob, score = unknown.clone(), unknown.clone()
        if read:
            part = prompt if len(read) == len(samples) else _rows(prompt, read)
            answers = [samples[i].answers[0] if targets is None else targets[i] for i in read]
            values, exact = self.reader.score(part, answers, **how)
            log_prob[read], score[read] = values, exact.float()
        if "score" not in self.needs:
            return Scored(unknown, log_prob, texts)
        if written:
            answers = self.reader.answer(_rows(prompt, written), **how)
            for i, text in zip(written, answers, strict=True):
                score[i], texts[i] = self.dataset.score(samples[i], text), text
        return Scored(score, log_prob, texts)

    def selections(
        self,
        samples: Sequence[Sample],
        encoded: Encoded,
        rows: Sequence[int],
        keep: Bool[Tensor, "N V"],
        core: Bool[Tensor, "N V"] | None = None,
    ) -> Scored:
        """Measure N selections in one pass, by the likelihood of `targets`; `keep[i]` is of
        question `rows[i]`, and `core[i]` what of it stands first."""
        # The same targets for every selection of a question, or likelihoods could not be compared.
        targets = self.targets(samples, encoded)
        score, log_prob = torch.empty(2, len(rows), device=encoded.embeds.device)
        predictions: list[str | None] = [None] * len(rows)
        for at, prompt in selected(encoded, rows, keep, memory.working_bytes(self.lvlm), core):
            questions = [rows[i] for i in at]
            asked = [samples[i] for i in questions]
            scored = self(asked, prompt, [targets[i] for i in questions])
            score[at], log_prob[at] = scored.score, scored.log_prob
            for i, text in zip(at, scored.predictions, strict=True):
                predictions[i] = text
        return Scored(score, log_prob, predictions)

    def full(self, samples: Sequence[Sample], encoded: Encoded) -> Scored:
        """The same with all visual tokens, from memory where this scorer has seen the sample."""
        # Scores with all tokens do not change while a policy learns: measured once.
        fresh = [i for i, sample in enumerate(samples) if sample.uid not in self._full.known]
        if fresh:
            part, asked = encoded.rows(fresh), [samples[i] for i in fresh]
            scored = self(asked, splice(part, keep_all(part)), self.targets(asked, part))
            pairs = torch.stack([scored.score, scored.log_prob], 1).tolist()
            self._full.add(dict(zip((samples[i].uid for i in fresh), pairs, strict=True)))
        score, log_prob = zip(*(self._full.known[sample.uid] for sample in samples), strict=True)
        device = encoded.embeds.device
        return Scored(
            torch.tensor(score, device=device),
            torch.tensor(log_prob, device=device),
            [None] * len(samples),
        )

    def targets(self, samples: Sequence[Sample], encoded: Encoded) -> list[str]:
        """The answer whose likelihood says how a prompt does: the model's own with all tokens where
        the official score calls it right, else the first reference.

        References are spelled as annotators wrote them. A model that says "Yes" gives "yes" next to
        no probability, pruned or not, and a reward on that reads noise. Where an exact match of the
        reference decides, a right answer is the reference.
        """
        targets = [sample.answers[0] for sample in samples]
        # Where an exact match decides, a right answer and the reference are one text.
        open_ended = [
            i for i, sample in enumerate(samples) if not self.dataset.teacher_forced(sample)
        ]
        if open_ended and "log_prob" in self.needs:
            for i, text in zip(open_ended, self.texts(encoded.rows(open_ended)), strict=True):
                if text and self.dataset.score(samples[i], text) > RIGHT:
                    targets[i] = text
        return targets

    def texts(self, encoded: Encoded) -> list[Utterance]:
        """What the model answers with all visual tokens, from memory where this scorer has asked
        before."""
        # Greedy answers with all tokens do not change: asked for once.
        fresh = [i for i, uid in enumerate(encoded.uids) if uid not in self._said.known]
        if fresh:
            part = encoded.rows(fresh)
            answers = self.reader.answer(splice(part, keep_all(part)))
            self._said.add(dict(zip((encoded.uids[i] for i in fresh), answers, strict=True)))
            self.evaluations += len(fresh)
        return [Utterance(self._said.known[uid]) for uid in encoded.uids]

    def reference(self, encoded: Encoded) -> Reference:
        """What the model answers with all visual tokens; texts from memory where this scorer has
        asked before.

        Raises:
            UserError: the LVLM does not show its distributions.
        """
        if not isinstance(self.lvlm, OpenLVLM):
            raise UserError(
                f"reward=fidelity needs output distributions, and {self.lvlm.name} shows none: use "
                "another reward, e.g. reward=score_change."
            )
        answers = self.texts(encoded)
        self.evaluations += len(answers)
        return Reference(
            answers, self.lvlm.distributions(splice(encoded, keep_all(encoded)), answers)
        )

    def fidelity(
        self, prompt: Prompt, reference: Reference, rows: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Against the model's own answers with all tokens: KL(all tokens || this prompt), mean over
        the answer's tokens in nats, and 1.0 where every token's arg-max is still the same.
        `rows[i]` is the place of prompt i's question in `reference`."""
        assert isinstance(self.lvlm, OpenLVLM)
        index = torch.arange(len(reference.answers)) if rows is None else torch.tensor(list(rows))
        self.evaluations += len(index)
        answers = [reference.answers[i] for i in index.tolist()]
        return self.lvlm.divergence(prompt, answers, reference.log_probs, index)

    def fidelities(
        self,
        encoded: Encoded,
        rows: Sequence[int],
        keep: Bool[Tensor, "N V"],
        core: Bool[Tensor, "N V"] | None = None,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """`fidelity` of N selections in one pass; arguments as of `selections`."""
        reference = self.reference(encoded)
        kl, same = torch.empty(2, len(rows), device=encoded.embeds.device)
        for at, prompt in selected(encoded, rows, keep, memory.working_bytes(self.lvlm), core):
            kl[at], same[at] = self.fidelity(prompt, reference, [rows[i] for i in at])
        return kl, same


def selected(
    encoded: Encoded,
    rows: Sequence[int],
    keep: Bool[Tensor, "N V"],
    budget: int,
    core: Bool[Tensor, "N V"] | None = None,
) -> Iterator[tuple[list[int], Prompt]]:
    """The prompts of N selections, and which they are: from short to long, as many at a time as the
    budget of bytes holds; where GPU memory ends, half as many.

    Raises:
        UserError: there is no memory for a single one.
    """
    # Prompts are padded to the longest: those of like length go together.
    counts, kept = encoded.counts, keep.sum(1).tolist()
    lengths = [counts[row].text + n for row, n in zip(rows, kept, strict=True)]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    size = memory.how_many(budget, prompt_bytes(encoded), AT_ONCE)
    start = 0
    while start < len(order):
        at = order[start : start + size]
        try:
            selection = TokenSelection(keep[at], core=None if core is None else core[at])
            prompt = splice(encoded.rows([rows[i] for i in at]), selection)
        except torch.OutOfMemoryError as error:
            if len(at) == 1:
                raise UserError(
                    f"there is no memory for a single prompt of {encoded.attention.shape[1]} "
                    "tokens: use fewer stage.prompts, or model.load_in=4bit."
                ) from error
            prompt = None
        if prompt is None:
            size = memory.half(len(at), "prompts that are spliced")
            continue
        yield at, prompt
        start += len(at)


def prompt_bytes(encoded: Encoded) -> int:
    """Of a question while it is spliced: a copy with all tokens, and what is left of it."""
    features = encoded.embeds.shape[2] + (0 if encoded.deep is None else encoded.deep.shape[2])
    return 2 * encoded.attention.shape[1] * features * encoded.embeds.dtype.itemsize


def _rows(prompt: Prompt, numbers: Sequence[int]) -> Prompt:
    return prompt.rows(torch.tensor(numbers, device=prompt.embeds.device), numbers=numbers)


class Agreement(BaseDataset):
    """Samples whose labels are the model's own `answers`: right is what it says with all tokens."""

    name = "agreement"

    def __init__(self, samples: Sequence[Sample], answers: Sequence[str]) -> None:
        self.samples = [
            s._replace(answers=(a,), box=None) for s, a in zip(samples, answers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 for the same text."""
        return float(prediction.strip() == sample.answers[0].strip())

    def teacher_forced(self, sample: Sample) -> bool:
        """Always: the same answer is the same tokens."""
        return True
