"""Task reward of the paper: what a pruning step does to the task's own score."""

from jaxtyping import Float
from torch import Tensor

from tprl.rewards import Term, change
from tprl.types import Outcome


class ScoreChange(Term):
    """alpha * (Score(Z_{t+1}, q) - Score(Z_t, q)), Score in [0, 1]; step 0 compares with the
    full-token score.

    Source: TPRL (arXiv 2603.13394), reward; alpha is `weight`.
    """

    name = "score_change"
    needs = frozenset({"score"})

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        return change(outcome.score, "score")
