"""Selector: tokens are scored by the attention they receive from each other, learned end to end."""

import math
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tprl import cost
from tprl.policy.networks import PolicyInput
from tprl.pruners.learned import LearnedPruner

OFF = -1e9  # instead of -inf: a row without any key must stay finite, with finite gradients


class ReceivedAttention(nn.Module):
    """One head of self-attention over the tokens of each image, whose only output is where it
    looks.

    logit_j = log sum_i a_ij, where a_i is the softmax of q_i k_j / sqrt(width) over the image's
    tokens: 0 for a token that receives as much as it would if all were alike. The value is always 0
    (it is not for RL).

    Args:
        code_width: Z, width of the tokens (or codes) that it reads.
        width: of queries and keys.
    """

    def __init__(self, code_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(code_width)
        self.query, self.key = nn.Linear(code_width, width), nn.Linear(code_width, width)

    def forward(
        self, x: PolicyInput, alive: Bool[Tensor, "B V"], step: int, keep_ratio: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
        # Padding is erased, not only masked: a NaN in it would survive.
        tokens = self.norm(x.codes.masked_fill(~alive.unsqueeze(2), 0.0))
        score = self.query(tokens) @ self.key(tokens).mT / math.sqrt(self.query.out_features)
        # [B V V] who may look at whom: alive tokens of one image.
        seen = alive.unsqueeze(1) & alive.unsqueeze(2)
        if x.image is not None:
            seen = seen & (x.image.unsqueeze(1) == x.image.unsqueeze(2))
        log_attention = score.masked_fill(~seen, OFF).log_softmax(2)
        received = log_attention.masked_fill(~seen, OFF).logsumexp(1)
        logits = received.masked_fill(~alive, 0.0).float()
        return logits, logits.new_zeros(len(logits))


class SelectorPruner(LearnedPruner):
    """VisionSelector's scheme (Zhu et al., arXiv 2510.16598): a small scorer of projected tokens,
    decoupled from the model, is trained end to end through a differentiable top-k against the
    frozen language model, and top-k serves it. It never reads the question.

    `stage=distill policy=selector` trains it. Ours, from the paper's abstract and its published
    sizes (12.85 M parameters at width 3584, which is D^2): two projections to D / 2, of which the
    scores are the attention received. What differs: gates weigh the language model's attention
    instead of the embeddings; they sum to the budget exactly, so no loss holds them to it; the
    temperature hardens geometrically; one scorer is trained at several ratios. Complexity
    O(n D^2 + n^2 D) per image.

    Args:
        token_width, code_width, hidden, common: see `LearnedPruner`; a code_width of 0 reads the
            tokens themselves, as published.
        width: of queries and keys; null: half of what it reads.
    """

    name = "selector"
    reads_question = False

    def __init__(
        self,
        token_width: int,
        code_width: int = 0,
        hidden: int = 512,
        width: int | None = None,
        select: str = "topk",
        **common: Any,
    ) -> None:
        super().__init__(token_width, code_width, hidden, select=select, **common)
        read = code_width or token_width
        width = width or read // 2
        sizes = {"token_width": token_width, "code_width": code_width}
        self.config = {**sizes, "hidden": hidden, "width": width}
        self.net = ReceivedAttention(read, width)

    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        c = self.config
        read = c["code_width"] or c["token_width"]
        projections = 2 * cost.mlp_flops((read, c["width"]), tokens)
        return {"selector": projections + cost.similarity_flops(tokens, c["width"])}
