"""Label-free reward: does the LVLM still answer as it does with all tokens?"""

from jaxtyping import Float
from torch import Tensor

from tprl.rewards import Term, change
from tprl.types import Outcome


class Fidelity(Term):
    """Change of `agreement` * [same answer] - min(KL, `ceiling`), against the unpruned model's own
    greedy answer.

    Not in the paper. KL(all tokens || kept tokens) is the mean over that answer's tokens, in nats;
    its ceiling does for it what the floor does for `LogLikelihood`. No reference answer is read, so
    any images and questions will do.
    """

    name = "fidelity"
    needs = frozenset({"answer_kl", "agreement"})

    def __init__(self, weight: float = 1.0, agreement: float = 0.0, ceiling: float = 4.0) -> None:
        self.weight, self.agreement, self.ceiling = weight, agreement, ceiling

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        same = change(outcome.agreement, "agreement")
        # Clamped per state, not per change: one ruined answer must not drown the batch.
        kl = outcome.answer_kl
        bounded = None if kl is None else kl.clamp(max=self.ceiling)
        return self.agreement * same - change(bounded, "answer_kl")
