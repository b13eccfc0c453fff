"""Several scores of the tokens as one quality of TPRL's DPP: what stands out, and what the question
names."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from tprl.budget import Rows
from tprl.cost import LVLMShape, dpp_flops
from tprl.errors import UserError
from tprl.lvlm.listening import WORD_ATTENTION
from tprl.pruners.keyword_color import likeness
from tprl.pruners.quality import QualityDPP, log_attention, standardize
from tprl.pruners.word_attention import listening_flops
from tprl.types import Encoded

Score = Callable[[Rows, Encoded], Tensor]
# Each score [I W], and the extra that it reads.
SCORES: dict[str, tuple[str, Score]] = {
    "cls": ("cls_attention", lambda i, e: log_attention(i.split(e.extras["cls_attention"]))),
    "words": (WORD_ATTENTION, lambda i, e: log_attention(i.split(e.extras[WORD_ATTENTION]))),
    "color": ("rgb", lambda i, e: i.split(likeness(e))),
}


def scores_of(names: Iterable[str], images: Rows, encoded: Encoded) -> Float64[Tensor, "I W S"]:
    """The scores of these names, each as z-scores within the image."""
    return torch.stack(
        [standardize(SCORES[name][1](images, encoded), images.mask) for name in names], -1
    )


class JoinedPruner(QualityDPP):
    """Greedy MAP of a DPP whose quality joins scores of several rules: the strongest controls.

    log q = sum of weight * z over the scores, where z is the z-score within the image: `cls` is
    `attention_dpp`'s, `words` is `word_attention`'s, `color` is `keyword_color`'s; kernel and
    greedy MAP are TPRL's (`quality.diverse`). Not trained. Source: ours; one score finds what
    stands out, another what is asked, and together they are better than each over all budgets.

    Args:
        name: what tables call this choice of weights.
        weights: of `cls`, `words` and `color`; those of 0 are not computed.

    Raises:
        UserError: a score is unknown, or no weight differs from 0.
    """

    def __init__(self, name: str, weights: Mapping[str, float]) -> None:
        unknown = sorted(set(weights) - set(SCORES))
        if unknown:
            raise UserError(
                f"weights holds {unknown[0]}, which is no score: use {', '.join(SCORES)}."
            )
        super().__init__()
        self.name = name
        self.weights = {score: weight for score, weight in weights.items() if weight}
        if not self.weights:
            raise UserError(
                f"every weight of {name} is 0: give one, e.g. pruner.weights.{next(iter(SCORES))}=1"
            )
        self.extras = frozenset(SCORES[score][0] for score in self.weights)
        self.reads_question = bool(self.weights.keys() - {"cls"})

    def log_quality(self, images: Rows, encoded: Encoded) -> Float64[Tensor, "I W"]:
        """The weighted sum of z-scores."""
        scores = scores_of(self.weights, images, encoded)
        return scores @ scores.new_tensor(list(self.weights.values()))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The kernel and greedy MAP on it, and with `words` the early layers that listen."""
        early = listening_flops(shape, tokens) if "words" in self.weights else 0
        return early + dpp_flops(tokens, shape.lm.width, kept)
