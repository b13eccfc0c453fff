"""Efficiency reward of the paper: the share of the living tokens that a step removes."""

from jaxtyping import Float
from torch import Tensor

from tprl.rewards import Term
from tprl.types import Outcome


class TokensSaved(Term):
    """beta * (1 - K_{t+1} / K_t). Constant, and so without effect, where every action holds exactly
    k tokens.

    Source: TPRL (arXiv 2603.13394), reward; beta is `weight`, 0.1 in the reference code.
    """

    name = "tokens_saved"
    needs: frozenset[str] = frozenset()
    limits_tokens = True

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        # At least 1: a prompt without visual tokens must not divide by zero.
        kept = outcome.kept.float()
        return 1 - kept[1:] / kept[:-1].clamp(min=1)
