"""Core and focus: a part of the budget that is the same for every question about an image, and a
part that each question chooses beside it."""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from tprl.budget import budget, check_keep_ratio, core_budget, need_ratio, rows_of
from tprl.build import choices
from tprl.errors import UserError
from tprl.pruners.base import BasePruner, named_pruner
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.types import Encoded, Pruner, TokenSelection

# What a policy's `trained_on` holds after stage=turns: the other arguments of `CoreFocus`.
CORE = "core"


@runtime_checkable
class Completes(Protocol):
    """A pruner that can choose beside tokens that are kept already."""

    name: str
    extras: frozenset[str]

    def complete(
        self, encoded: Encoded, keep_ratio: float | None, core: Bool[Tensor, "B V"]
    ) -> TokenSelection:
        """Keep `core`, and fill up to `budget(keep_ratio, n)` tokens of each image."""
        ...


class CoreFocus(BasePruner):
    """A question-blind core that stays for every turn about an image, and a focus that each
    question chooses given the core; one budget for both.

    The core is what `core` keeps of `core_budget` tokens. The focus is what `focus` adds to it by
    the rule that it serves by, for DPPs the conditional gains of det L. With `core_first` the core
    stands at the front of its image, at its own positions: its keys and values are then those of
    every turn, so that a KV cache holds them. The core then does not attend to the focus, which
    the unpruned order would let it do. Source: ours.

    Args:
        core: blind to the question; of a policy, its choice with the question masked.
        focus: reads the question; a rule whose quality a DPP serves, or a policy.
        share: of the budget, in [0, 1]; 0 is the focus alone, 1 the core alone.
        core_first: False leaves all tokens in raster order.

    Raises:
        UserError: a core that depends on the question or draws, a focus that cannot choose beside
            a core, or a share outside [0, 1].
    """

    reads_question = True

    def __init__(
        self,
        core: Any,
        focus: Any,
        share: float = 0.5,
        core_first: bool = True,
    ) -> None:
        # Either may be anything that a name stands for; what cannot be is refused in a sentence.
        self.core, self.focus = _checked_core(core), _checked_focus(focus)
        if not 0 <= share <= 1:
            raise UserError(f"share must be in [0, 1], got {share}; use e.g. 0.5.")
        self.core_share, self.core_first = float(share), core_first
        self.name = f"{core.name}+{focus.name}{'' if core_first else '_raster'}"
        self.extras = self.core.extras | self.focus.extras
        # Where it was trained is what a policy in it says; of two, the focus.
        about = [part.trained_on for part in (self.focus, self.core)]
        self.trained_on = next(filter(None, about), {})
        self.choosers = ((self.core, self.core_share), (self.focus, 1.0))

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image, its core among them.

        Raises:
            UserError: no ratio, one outside (0, 1], a core that merges, or a part's reasons.
        """
        ratio = need_ratio(self.name, keep_ratio)
        core = core_of(self.core, encoded, ratio, self.core_share)
        # The focus sees the core and fills the budget beside it, so both share one count.
        keep = self.focus.complete(encoded, ratio, core).keep
        return TokenSelection(keep, core=core if self.core_first else None)


def core_of(
    pruner: Pruner, encoded: Encoded, keep_ratio: float, share: float
) -> Bool[Tensor, "B V"]:
    """The core that `pruner` chooses of each image, whatever the question is.

    Raises:
        UserError: it merges tokens.
    """
    images = rows_of(encoded)
    counts = [core_budget(share, budget(keep_ratio, n)) for n in images.sizes]
    keep = torch.zeros_like(encoded.visual_mask)
    if not any(counts):
        return keep
    # Images of other sizes have other shares after rounding: once per count, of which few differ.
    k = torch.tensor(counts, device=keep.device)
    for count, size in sorted(set(zip(counts, images.sizes, strict=True))):
        if not count:
            continue
        # A ratio that rounds to `count` at this size; rows of other sizes are dropped below.
        selection = pruner.select(blind(encoded), check_keep_ratio(count / size))
        if selection.merged is not None or selection.extra is not None:
            raise UserError(
                f"{pruner.name} merges tokens, so it is no core: use e.g. core=attention_dpp."
            )
        of_size = (k == count) & (torch.tensor(images.sizes, device=k.device) == size)
        rows = images.split(selection.keep) & images.mask & of_size.unsqueeze(1)
        keep |= images.join(rows, keep)
    return keep


def blind(encoded: Encoded) -> Encoded:
    """The same prompts without a question that a policy could read."""
    # Tokens stay where they are: only the marks go, by which a policy finds the words.
    empty = replace(encoded, question=torch.zeros_like(encoded.question), questions=())
    # All counts but that of words stay known.
    vars(empty)["counts"] = tuple(counts._replace(words=0) for counts in encoded.counts)
    return empty


def _checked_core(core: BasePruner) -> Any:
    if not isinstance(core, Pruner):
        raise UserError(
            f"core={core.name} drops tokens inside the language model: use one that selects "
            "before it, e.g. core=attention_dpp."
        )
    # A policy reads the words alone, which `blind` takes away; rules read them in other ways, too.
    reads = core.reads_question and not isinstance(core, LearnedPruner)
    if reads or "region" in core.extras:
        raise UserError(
            f"core={core.name} reads the question, so it is another one in every turn: use one "
            "that does not, e.g. core=attention_dpp, or a trained policy."
        )
    # Drawn by the question's uid, a core would change from turn to turn.
    if core.seed is not None:
        raise UserError(
            f"core={core.name} draws other tokens for every question: use one that does not, "
            "e.g. core=attention_dpp."
        )
    return core


def _checked_focus(focus: Any) -> Any:
    # A threshold has no count, so nothing is left to be completed.
    free = focus.serving is not None and focus.serving.select == "threshold"
    if not isinstance(focus, Completes) or free:
        raise UserError(
            f"focus={focus.name} cannot choose beside a core: use word_attention, keyword_color, "
            "question_dpp, attention_dpp, or a policy that serves by dpp, topk or gumbel."
        )
    return focus


def load_core_focus(
    core: str = "attention_dpp",
    focus: str = "word_attention",
    share: float = 0.5,
    core_first: bool = True,
) -> CoreFocus:
    """Core and focus by name: a pruner of conf/pruner, or a trained one by its folder, run or hub
    id. One policy named twice is loaded once.

    Raises:
        UserError: no such pruner, or `CoreFocus`'s reasons.
    """
    first = _named(core)
    return CoreFocus(first, first if focus == core else _named(focus), share, core_first)


def _named(name: str) -> Any:
    return named_pruner(name) if name in choices("pruner") else load_pruner(name)
