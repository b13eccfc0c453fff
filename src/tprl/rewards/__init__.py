"""Reward terms, one file each, and their weighted composition."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Outcome


@runtime_checkable
class Term(Protocol):
    """One term of a reward. `needs` names the fields of Outcome that it reads: "score", "log_prob".

    A term that charges for tokens says so by an attribute `limits_tokens`; without one, a free
    budget keeps everything.
    """

    name: str
    weight: float
    needs: frozenset[str]

    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]: ...


class WeightedReward:
    """Named terms, each times its weight; their sum is the reward r_t (docs/method.md#mdp).

    Args:
        terms: by any names, so that yamls of several terms merge
            (`reward=[log_likelihood,tokens_saved]`); or a list.

    Raises:
        UserError: no term, or two terms of one name.
    """

    def __init__(self, terms: Mapping[str, Term] | Sequence[Term]) -> None:
        terms = list(terms.values()) if isinstance(terms, Mapping) else terms
        # Terms are logged by name, so two of one name would hide each other.
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"a reward needs at least one term, each named once, got {names}; use e.g. "
                "reward=log_likelihood."
            )
        self.terms = tuple(terms)
        self.needs = frozenset().union(*(term.needs for term in terms))
        # A charge of weight 0 charges nothing: a free budget would keep every token.
        charges = [term for term in terms if getattr(term, "limits_tokens", False)]
        self.limits_tokens = any(term.weight > 0 for term in charges)

    def __call__(self, outcome: Outcome) -> dict[str, Float[Tensor, "T B"]]:
        return {term.name: term.weight * term(outcome) for term in self.terms}


def change(series: Float[Tensor, "T1 B"] | None, name: str) -> Float[Tensor, "T B"]:
    """Difference of consecutive rows; row 0 is the prompt with all tokens.

    Raises:
        ValueError: the measurement that the reward needs was not made; it must never become a
            reward of 0.
    """
    if series is None:
        raise ValueError(f"the reward needs outcome.{name}, which was not measured.")
    # [T+1 B] -> [T B]: the reward of a step is what the step changed.
    return series[1:] - series[:-1]
