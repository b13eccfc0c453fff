"""Core and focus: the core is that of every question, and the focus is chosen beside it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget, core_budget
from tprl.build import load_component
from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.errors import UserError
from tprl.policy.dpp import cosine_kernel
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.core_focus import CoreFocus, load_core_focus
from tprl.pruners.divprune import DivPrunePruner
from tprl.pruners.learned import load_pruner
from tprl.pruners.random import RandomPruner
from tprl.pruners.word_attention import WordAttentionPruner
from tprl.scoring.flops import choosing
from tprl.types import Encoded

EXTRAS = ("cls_attention", "word_attention")


def two_questions(width: int = 16) -> Encoded:
    """One image, asked twice: everything but the question is the same."""
    encoded = toy_encoded([((6, 6),)], extras=EXTRAS, width=width).rows([0, 0])
    first = encoded.extras["word_attention"][:1]
    encoded.extras["word_attention"] = torch.cat([first, first.flip(1)])
    embeds = encoded.embeds.clone()
    embeds[1, encoded.question[1]] *= -9
    return replace(encoded, embeds=embeds, uids=("a", "b"))


@pytest.mark.parametrize("names", [("attention_dpp", "word_attention"), ("tprl", "tprl")])
def test_the_core_is_that_of_every_question_and_the_focus_is_not(names: tuple[str, str]) -> None:
    encoded, pruner = two_questions(192), load_core_focus(*names, share=0.4)
    selection = pruner.select(encoded, 1 / 3)
    assert selection.core is not None
    assert selection.keep.sum(1).tolist() == [12, 12]
    assert selection.core.sum(1).tolist() == [core_budget(pruner.core_share, 12)] * 2
    assert torch.equal(selection.core[0], selection.core[1])
    assert bool((selection.core <= selection.keep).all())
    if names[0] != "tprl":  # random tokens mean nothing to a trained policy
        assert not torch.equal(selection.keep[0], selection.keep[1])
    alone = pruner.select(encoded.rows([1]), 1 / 3)
    assert torch.equal(alone.keep[0], selection.keep[1])


def test_the_focus_has_the_largest_gains_given_the_core() -> None:
    encoded, focus = two_questions(), WordAttentionPruner()
    selection = CoreFocus(DivPrunePruner(), focus, 0.5).select(encoded, 1 / 6)
    assert selection.core is not None
    kernel = cosine_kernel(encoded.visual, encoded.visual_mask).double()
    score = encoded.extras["word_attention"].double().clamp(min=1e-8).log()
    z = (score - score.mean(1, keepdim=True)) / score.std(1, correction=0, keepdim=True)
    for row in range(2):
        chosen = selection.core[row].nonzero().squeeze(1).tolist()
        # One determinant per candidate: the slow way to the same set.
        while len(chosen) < 6:
            gains = torch.full((36,), -torch.inf, dtype=torch.float64)
            for item in set(range(36)) - set(chosen):
                at = torch.tensor([*chosen, item])
                block = kernel[row][at][:, at]
                gains[item] = torch.logdet(block) + 2 * z[row, item]
            chosen.append(int(gains.argmax()))
        assert sorted(chosen) == selection.keep[row].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_0_is_the_focus_and_of_1_the_core(share: float) -> None:
    encoded = toy_encoded(RAGGED, extras=EXTRAS)
    core, focus = AttentionDPPPruner(), WordAttentionPruner()
    for ratio in (1.0, 1 / 3, 1 / 9):
        keep = CoreFocus(core, focus, share).select(encoded, ratio).keep
        assert torch.equal(keep, (core if share else focus).select(encoded, ratio).keep)


def test_every_image_keeps_its_budget_and_its_core() -> None:
    encoded = toy_encoded(RAGGED, extras=EXTRAS)
    pruner = load_component("pruner", "core_focus")
    assert pruner.name == "attention_dpp+word_attention"
    for ratio in (1.0, 1 / 3, 1 / 9):
        selection = pruner.select(encoded, ratio)
        for row, images in enumerate(encoded.counts):
            for image, n in enumerate(images.images):
                at = (encoded.image_of[row] == image) & encoded.visual_mask[row]
                assert int(selection.keep[row, at].sum()) == budget(ratio, n)
                core = core_budget(0.5, budget(ratio, n))
                assert int(selection.core[row, at].sum()) == core


def test_a_policy_named_twice_is_loaded_once() -> None:
    pruner = load_core_focus("tprl", "tprl", core_first=False)
    assert pruner.core is pruner.focus
    assert pruner.trained_on["model"] == "tiny_llava"


@pytest.mark.parametrize(
    ("core", "focus", "share", "message"),
    [
        ("word_attention", "word_attention", 0.5, "core=word_attention reads the question"),
        ("oracle", "word_attention", 0.5, "core=oracle reads the question"),
        ("fastv", "word_attention", 0.5, "core=fastv drops tokens inside the language model"),
        ("attention_dpp", "divprune", 0.5, "focus=divprune cannot choose beside a core: use word"),
        ("attention_dpp", "word_attention", 1.5, r"share must be in \[0, 1\], got 1.5; use"),
        ("nothing_there", "word_attention", 0.5, "nothing_there does not exist"),
    ],
)
def test_refusals(core: str, focus: str, share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_core_focus(core, focus, share)


def test_cores_that_draw_or_merge_are_refused() -> None:
    with pytest.raises(UserError, match="core=random draws other tokens for every question"):
        CoreFocus(RandomPruner(), WordAttentionPruner())
    pooling: Any = load_component("pruner", "pooling")
    with pytest.raises(UserError, match="pooling merges tokens, so it is no core"):
        CoreFocus(pooling, WordAttentionPruner()).select(two_questions(), 1 / 4)


def test_choosing_costs_what_both_parts_cost() -> None:
    vision = VisionShape(7, 24, 96, 3, patches=64, patch_size=8)
    shape = LVLMShape(vision, (24, 16), LMShape(2, 16, 32, 2, 2, 8, 100))
    core, focus, policy = (
        AttentionDPPPruner(),
        WordAttentionPruner(),
        load_pruner("tprl_tiny_llava"),
    )
    rules = choosing(CoreFocus(core, focus, 0.25), shape, [36], 5, [12])
    assert rules == core.flops(shape, 36, 3) + focus.flops(shape, 36, 12)
    mixed = choosing(CoreFocus(core, policy, 0.25), shape, [36], 5, [12])
    by_policy = sum(policy.flops_by_part(36, 5, 12).values())
    assert mixed == core.flops(shape, 36, 3) + by_policy
