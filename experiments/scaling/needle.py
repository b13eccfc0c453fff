"""A world in which one of N visual tokens answers: the question names a kind, and one token is of
it.

Nothing but the match between the question's word and a token's content decides, and a rule that
does not read the question is right as often as its keep ratio.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.data.base import BaseDataset
from tprl.types import Encoded, Prompt, Sample

KINDS, WIDTH, WORDS = 3, 64, 4  # words of a question: the kind and three that say nothing
QUESTIONS = 100_000


class NeedleDataset(BaseDataset):
    """Question i is about a picture of its own. Splits differ by their seed."""

    name = "needle"

    def __init__(self, split: str = "train", limit: int = QUESTIONS) -> None:
        self.split, self._length = split, limit

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        kind = random.Random(f"{self.split}/{index}").randrange(KINDS)
        return Sample(f"needle/{self.split}/{index}", (), str(kind), ("yes",))

    def score(self, sample: Sample, prediction: str) -> float:
        return float(prediction == sample.answers[0])

    def teacher_forced(self, sample: Sample) -> bool:
        return True


class NeedleLVLM:
    """Answers "yes" if the one token of the named kind is in the prompt, else "no"; width 32, N
    tokens in a row."""

    def __init__(self, tokens: int, noise: float = 2 / 3) -> None:
        self.name, self.width, self.device, self.tokens, self.noise = (
            "needle",
            WIDTH,
            torch.device("cpu"),
            tokens,
            noise,
        )
        draw = torch.Generator().manual_seed(0)
        self.codes = (
            torch.nn.functional.normalize(torch.randn(KINDS + WORDS, WIDTH, generator=draw), dim=1)
            * WIDTH**0.5
        )
        vision = VisionShape(1, WIDTH, 4 * WIDTH, 1, patches=tokens, patch_size=1, cls=False)
        self.shape = LVLMShape(vision, (WIDTH, WIDTH), LMShape(1, WIDTH, 4 * WIDTH, 1, 1, WIDTH, 2))

    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        rows, kinds = [], []
        for sample in samples:
            draw = torch.Generator().manual_seed(random.Random(sample.uid).randrange(2**62))
            asked = int(sample.question)
            others = torch.randint(KINDS - 1, (self.tokens,), generator=draw)
            kind = others + (others >= asked)
            kind[torch.randint(self.tokens, (1,), generator=draw)] = asked
            unique = torch.randn(self.tokens, WIDTH, generator=draw)  # what no other token has
            visual = (1 - self.noise) ** 0.5 * self.codes[kind] + self.noise**0.5 * unique
            words = self.codes[[KINDS, KINDS + 1, asked, KINDS + 2]]
            rows.append(torch.cat([visual, words]))
            kinds.append(torch.cat([kind, torch.full((WORDS,), asked)]))
        n, size = self.tokens, (len(samples), self.tokens + WORDS)
        at = torch.arange(n).expand(len(samples), n)
        question = torch.zeros(size, dtype=torch.bool)
        question[:, n:] = True
        grids = tuple((((1, n),),) for _ in samples)
        return Encoded(
            uids=tuple(sample.uid for sample in samples),
            input_ids=torch.stack(kinds),
            embeds=torch.stack(rows),
            attention=torch.ones(size, dtype=torch.bool),
            positions=torch.arange(size[1]).expand(1, *size),
            visual_at=at,
            visual_mask=torch.ones_like(at, dtype=torch.bool),
            image_of=torch.zeros_like(at),
            grids=grids,
            tiles=grids,
            question=question,
        )

    def answer(self, prompt: Prompt) -> list[str]:
        return ["yes" if right else "no" for right in self._right(prompt).tolist()]

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        right = self._right(prompt)
        return torch.where(right, 0.0, -2.0), right

    def answer_length(self, answer: str) -> int:
        return 1

    def _right(self, prompt: Prompt) -> Bool[Tensor, " B"]:
        return ((prompt.input_ids == prompt.input_ids[:, -1:]) & prompt.visual).any(1)
