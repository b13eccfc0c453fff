"""Where an early layer of the language model looks: attention from the question's words to the
visual tokens, before anything is pruned."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.cost import LMShape
from tprl.lvlm.batching import micro_batches, retry_smaller
from tprl.lvlm.layer_drop import LayerPlan, LayerStage, Look
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, columns_of

WORD_ATTENTION = "word_attention"  # the extra
DEPTH = 0.4  # of the layers: the 3rd of 5, the 14th of 32, counted from 1


def listening_layer(layers: int) -> int:
    """The layer, counted from 0, whose attention is read; those before it run on all tokens."""
    return round(DEPTH * layers)


class Listening:
    """The half of `FrozenLVLM` that reads its own early layers."""

    micro_batch: int
    prefill: Any

    @property
    @abstractmethod
    def layers(self) -> int:
        """Decoder layers of the language model."""

    def word_attention(self, encoded: Encoded) -> Float[Tensor, "B V"]:
        """Softmax attention of layer `listening_layer` from the question's words to every visual
        token, mean over words and heads; 0 without words, and on padding. Layers after it do not
        run."""
        scores = self._hear(splice(encoded, keep_all(encoded)), encoded.question)
        return scores.gather(1, encoded.visual_at) * encoded.visual_mask

    @retry_smaller
    def _hear(self, prompt: Prompt, question: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        first = listening_layer(self.layers)
        # Deepstack has to be added before columns may be looked at one by one.
        if prompt.deep is not None:
            first = max(first, prompt.deep.shape[-1] // prompt.embeds.shape[-1])
        scores = torch.zeros(question.shape, device=prompt.embeds.device)
        for rows, _, part in micro_batches(prompt, self.micro_batch):
            # A micro-batch is as long as its longest prompt, which ends in the last column.
            width = part.attention.shape[1]
            ear = _Ear(question[rows, -width:])
            plan = LayerPlan(ear, (LayerStage(first, first, 0.5),), self.layers)
            try:
                self.prefill(part, plan)
            except _HeardError as heard:
                scores[rows, -width:] = heard.scores.to(scores.device)
        return scores


class _HeardError(Exception):
    """Ends a forward pass: what was asked for is known."""

    def __init__(self, scores: Float[Tensor, "B S"]) -> None:
        super().__init__()
        self.scores = scores


class _Ear:
    """A `LayerPruner` that drops nothing: where it is asked to rank, reading ends."""

    name = WORD_ATTENTION
    extras: frozenset[str] = frozenset()

    def __init__(self, question: Bool[Tensor, "B S"]) -> None:
        self.question = question

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        return ()

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        at, real = columns_of(self.question.to(look.real.device))
        # [B R S] mean over heads of each word's row, then over the words that are real.
        attention = look.attention(at).mean(1) * real.unsqueeze(2)
        raise _HeardError(attention.sum(1) / real.sum(1, keepdim=True).clamp(min=1))

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return 0
