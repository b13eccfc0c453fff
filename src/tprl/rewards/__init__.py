"""Reward terms, one file each, and their weighted composition."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Outcome


class Term(ABC):
    """One term of a reward; every term derives from it."""

    name: str
    weight: float
    needs: frozenset[str]  # fields of Outcome that it reads, such as "score" or "log_prob"
    # whether it charges for tokens; without such a term, a free budget keeps everything
    limits_tokens: bool = False

    @abstractmethod
    def __call__(self, outcome: Outcome) -> Float[Tensor, "T B"]:
        """The reward of every pruning step, before its weight."""


class WeightedReward:
    """Named terms, each times its weight; their sum is the reward r_t (docs/method.md#mdp).

    Args:
        terms: by any names, so that yamls of several terms merge
            (`reward=[log_likelihood,tokens_saved]`); or a list.

    Raises:
        UserError: no term, two terms of one name, or one that does not derive from `Term`.
    """

    def __init__(self, terms: Mapping[str, Any] | Sequence[Any]) -> None:
        terms = list(terms.values()) if isinstance(terms, Mapping) else terms
        for term in terms:
            if not isinstance(term, Term):
                raise UserError(
                    f"the reward term {type(term).__name__} does not derive from "
                    "tprl.rewards.Term: derive it, as docs/howto-reward.md shows."
                )
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
        self.limits_tokens = any(term.limits_tokens and term.weight > 0 for term in terms)

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
