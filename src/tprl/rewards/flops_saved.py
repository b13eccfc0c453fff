"""Efficiency reward: the share of the question's FLOPs that a step saves."""

from jaxtyping import Float
from torch import Tensor

from tprl.rewards import Term, change
from tprl.types import Outcome


class FlopsSaved(Term):
    """(FLOPs before the step - FLOPs after it) / FLOPs with all tokens, by the cost model of the
    LVLM in use.

    Not in the paper, whose `TokensSaved` counts tokens. Whole question: tower, selector, prefill,
    decoding (see `tprl.cost.CONVENTION`). The selector runs once per question, so the first step
    pays for it, and may be negative. Constant, and so without effect, where every action holds
    exactly k tokens.
    """

    name = "flops_saved"
    needs = frozenset({"flops"})
    limits_tokens = True

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        # Relative to all tokens: prompts of all lengths weigh the same.
        saved = -change(outcome.flops, "flops")
        assert outcome.flops is not None
        return saved / outcome.flops[:1]
