"""The KV cache of a turn, used by the next one as far as both prompts begin alike.

Keys and values of a causal model depend on the embeddings and positions up to their column, and on
nothing after it. What two prompts share from their beginning on is therefore the same to the last
digit that a matrix product of another shape leaves; from the first column that differs on, all is
computed anew.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tprl.errors import UserError
from tprl.lvlm.prefixes import shared_prefix, visual_in
from tprl.types import Prompt

# On caches that are returned: `CachedTurn`, or why they cannot be carried on.
MARK = "holds_pruned_prompt"
LEAVE_OUT = "leave past_key_values out"


@dataclass(frozen=True)
class CachedTurn:
    """What the columns of a returned cache are of.

    Attributes:
        prompt: the pruned prompt.
        written: [B A] the answers' tokens after it.
        looks: how often the vision tower had run by then.
    """

    prompt: Prompt
    written: Int[Tensor, "B A"]
    looks: int


class Carried(NamedTuple):
    """What a turn takes over."""

    cache: DynamicCache
    columns: int  # of the turn's padded prompt, that are not computed again
    tokens: list[int]  # of each prompt, padding aside
    visual: list[int]  # those of them that are visual


def check_carries(lvlm: Any) -> None:
    """Refuse a family whose cache cannot be cut where two prompts part.

    Raises:
        UserError: with the reason.
    """
    if lvlm.definition != "masked":
        raise UserError(
            f"generate got past_key_values, and {lvlm.name} has layers that do not attend to all "
            f"tokens, whose cache cannot be cut: {LEAVE_OUT}."
        )
    nothing = torch.zeros(1, 1, dtype=torch.long)
    if lvlm.inputs_beside(nothing, nothing.bool()):
        raise UserError(
            f"generate got past_key_values, and tokens of an image attend to later ones in "
            f"{lvlm.name}, so that other kept tokens change the keys of all: {LEAVE_OUT}."
        )


def carry(lvlm: Any, cache: Any, prompt: Prompt, looks: int) -> Carried:
    """The part of a cache that the prompt of this turn begins with; the cache stays as it is.

    Args:
        lvlm: the family.
        cache: what a call of this handle returned as `past_key_values`.
        prompt: pruned, of this turn.
        looks: how often the vision tower has run by now.

    Raises:
        UserError: a cache of something else, or nothing of an image that both turns share.
    """
    check_carries(lvlm)
    held = getattr(cache, MARK, None)
    if not isinstance(held, CachedTurn):
        what = held if isinstance(held, str) else "it was not returned by this pruned model"
        raise UserError(f"generate got past_key_values that cannot be used: {what}; {LEAVE_OUT}.")
    layers = getattr(cache, "layers", [])
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        raise UserError(
            f"generate got past_key_values of type {type(cache).__name__}, and only a plain "
            f"DynamicCache can be cut where the turns part: {LEAVE_OUT}."
        )
    before = _as_cached(lvlm, held, cache.get_seq_length())
    if len(before.uids) != len(prompt.uids):
        raise UserError(
            f"generate got past_key_values of {len(before.uids)} prompts for {len(prompt.uids)}: "
            f"give the turns of the same conversations in the same order, or {LEAVE_OUT}."
        )
    # At least one column is left to compute: the next token follows from it.
    real = prompt.attention.sum(1)
    prefix = shared_prefix(before, prompt).minimum(real - 1)
    visual = visual_in(prompt, prefix)
    if not bool(visual.any()):
        raise UserError(_nothing_shared(held.looks, looks))
    # Rows are padded to one width: what all of them have computed ends at one column.
    padding = prompt.attention.shape[1] - real
    columns = int((padding + prefix).min())
    tokens = (columns - padding).clamp(min=0)
    shared = _cut(cache, before, padding, columns)
    return Carried(shared, columns, tokens.tolist(), visual_in(prompt, tokens).tolist())


def _nothing_shared(looks_before: int, looks: int) -> str:
    if looks > looks_before:
        return (
            "generate got past_key_values of other images than those of this turn, so nothing of "
            f"them can be used: {LEAVE_OUT}."
        )
    return (
        "generate got past_key_values, and this turn keeps other visual tokens than the turn "
        f"before, from the first one on, so nothing of them can be used: {LEAVE_OUT}, or prune by "
        "a method that keeps a core for all turns, e.g. core_focus."
    )


def _as_cached(lvlm: Any, held: CachedTurn, length: int) -> Prompt:
    """The prompt of the turn before with what was written after it, as far as it was read again:
    `length` columns."""
    prompt = held.prompt
    more = length - prompt.embeds.shape[1]
    ids = held.written[:, :more]
    after = prompt.positions[..., -1:] + 1 + torch.arange(more, device=ids.device)
    deep = prompt.deep
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, ids], 1),
        embeds=torch.cat([prompt.embeds, lvlm.words(ids)], 1),
        attention=pad(prompt.attention, (0, more), value=True),
        positions=torch.cat([prompt.positions, after], -1),
        visual=pad(prompt.visual, (0, more)),
        image=pad(prompt.image, (0, more)),
        deep=None if deep is None else pad(deep, (0, 0, 0, more)),
    )


def _cut(
    cache: DynamicCache, before: Prompt, padding: Int[Tensor, " B"], columns: int
) -> DynamicCache:
    """The first `columns` columns of prompts with that much padding, from a cache whose prompts
    have another."""
    place = torch.arange(columns, device=padding.device)
    start = before.attention.shape[1] - before.attention.sum(1)
    # Padding takes any column: it is masked out.
    at = (start.unsqueeze(1) + place - padding.unsqueeze(1)).clamp(min=0)
    cut = DynamicCache()
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        parts = []
        for part in (layer.keys, layer.values):
            index = at.to(part.device)[:, None, :, None]
            parts.append(part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3])))
        cut.update(*parts, number)
    return cut
