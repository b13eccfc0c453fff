"""Dense reward: what a pruning step does to the reference answer's likelihood."""

from jaxtyping import Float
from torch import Tensor

from tprl.rewards import Term, change
from tprl.types import Outcome


class LogLikelihood(Term):
    """Change of the teacher-forced mean log-probability of the reference answer, nats per token.

    Not in the paper. Dense where the task score is 0 or 1. Each state's value is clamped at `floor`
    nats, so that one hopeless token does not drown the rest of the batch.
    """

    name = "log_likelihood"
    needs = frozenset({"log_prob"})

    def __init__(self, weight: float = 1.0, floor: float = -4.0) -> None:
        self.weight, self.floor = weight, floor

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        # Clamped per state, not per change: rewards still add up to the change over the episode.
        measured = outcome.log_prob
        bounded = None if measured is None else measured.clamp(min=self.floor)
        return change(bounded, "log_prob")
