"""A rule of thumb for budgets: words of the question say how many tokens it gets."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from tprl.budget import check_keep_ratio, need_ratio
from tprl.cost import LVLMShape
from tprl.errors import UserError
from tprl.pruners.base import BasePruner, named_pruner
from tprl.types import Encoded, Pruner, TokenSelection


class KeywordBudget(BasePruner):
    """Gives a question `multiple * keep_ratio` of the tokens, and lets another pruner choose them:
    the control of `tprl_adaptive`.

    The multiple is that of the first entry of a table whose words stand in the question, whole
    words in any case, else `otherwise`. Source: ours. keep_ratio is kept on average only where
    questions are mixed as the table assumes; what was kept is what results say (kept_tokens), as
    for `tprl_adaptive`.

    Args:
        base: what chooses the tokens.
        multiples: words of a question -> multiple of keep_ratio.
        otherwise: the multiple of all other questions.

    Raises:
        UserError: a multiple that is not above 0.
    """

    reads_question = True

    def __init__(self, base: Any, multiples: Mapping[str, float], otherwise: float) -> None:
        self.table = tuple((str(words), float(multiple)) for words, multiple in multiples.items())
        self.otherwise = float(otherwise)
        for words, multiple in (*self.table, ("otherwise", self.otherwise)):
            if not multiple > 0:
                raise UserError(
                    f"the multiple of {words!r} must be above 0, got {multiple}; use e.g. 0.5."
                )
        self.base = base
        self.name, self.extras = f"{base.name}_keyword", base.extras
        # Where it was trained, and what it costs, is what the base says.
        self.trained_on = base.trained_on

    def check_reach(self, keep_ratio: float | None, shape: LVLMShape | None = None) -> None:
        """Refuse a mean at which a question would need more tokens than there are.

        Raises:
            UserError: it is, or it is no ratio.
        """
        ratio = need_ratio(self.name, keep_ratio)
        most = max([self.otherwise, *(multiple for _, multiple in self.table)])
        if ratio * most > 1.001:  # ratios are written with 4 digits
            raise UserError(
                f"{self.name} gives some questions {most:g} times keep_ratio={ratio:g}, more "
                f"than all tokens: use keep_ratio={1 / most:.4g} or less, or smaller multiples."
            )

    def multiple(self, question: str) -> float:
        """What this question gets, as a multiple of keep_ratio."""
        for words, multiple in self.table:
            if re.search(rf"\b{re.escape(words)}\b", question, re.IGNORECASE):
                return multiple
        return self.otherwise

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(multiple * keep_ratio, n)` tokens of each image.

        Raises:
            UserError: no ratio, one out of reach, prompts without the text of their question, or a
                base that merges.
        """
        self.check_reach(keep_ratio)
        ratio = need_ratio(self.name, keep_ratio)
        if len(encoded.questions) != len(encoded):
            raise UserError(
                f"{self.name} looks for words in the question, and "
                f"this model gives no text: use {self.base.name}."
            )
        # Questions of one multiple are one selection of the base.
        multiples = [self.multiple(question) for question in encoded.questions]
        keep = torch.zeros_like(encoded.visual_mask)
        for each in sorted(set(multiples)):  # a loop over budgets, of which there are few
            rows = [row for row, multiple in enumerate(multiples) if multiple == each]
            each_ratio = check_keep_ratio(min(each * ratio, 1.0))
            selection = self.base.select(encoded.rows(rows), each_ratio)
            # Masks of several selections are joined here, not the tokens that a base may make.
            if selection.merged is not None or selection.extra is not None:
                raise UserError(
                    f"{self.base.name} merges tokens, which "
                    f"{self.name} cannot: use e.g. base=attention_dpp."
                )
            keep[rows] = selection.keep
        return TokenSelection(keep=keep)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """What the base costs: looking for words is nothing."""
        return self.base.flops(shape, tokens, kept)

    def flops_by_part(self, tokens: int, words: int, kept: int) -> dict[str, int] | None:
        return self.base.flops_by_part(tokens, words, kept)


def load_keyword_budget(
    base: str = "attention_dpp",
    multiples: Mapping[str, float] | None = None,
    otherwise: float = 0.5,
) -> KeywordBudget:
    """The rule on top of a pruner of conf/pruner, by its name.

    Raises:
        UserError: no such pruner, one that works inside the model, or a bad multiple.
    """
    chooser = named_pruner(base)
    if not isinstance(chooser, Pruner):
        raise UserError(
            f"base={base} drops tokens inside the language model: use one that selects before it."
        )
    return KeywordBudget(chooser, {"how many": 3.0} if multiples is None else multiples, otherwise)
