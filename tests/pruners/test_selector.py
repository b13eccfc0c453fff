"""The learned rivals: a scorer of received attention, and MMR over a scorer's logits."""

import math
from pathlib import Path

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget
from tprl.errors import UserError
from tprl.pruners.learned import load_pruner
from tprl.pruners.scorer_mmr import ScorerMMR, load_scorer_mmr
from tprl.pruners.selector import SelectorPruner
from tprl.stages.distill import soft_top_k
from tprl.types import Encoded

WIDTH = 16  # of `toy_encoded`


def selector(**options: int) -> SelectorPruner:
    torch.manual_seed(0)
    pruner = SelectorPruner(WIDTH, **options)
    with torch.no_grad():  # attention that differs from token to token
        pruner.net.query.weight.mul_(6)
    return pruner


def images_of(encoded: Encoded) -> list[tuple[int, torch.Tensor]]:
    """The sample and the tokens' mask of every image."""
    result = []
    for b, grids in enumerate(encoded.grids):
        for i in range(len(grids)):
            result.append((b, encoded.visual_mask[b] & (encoded.image_of[b] == i)))
    return result


def received_by_hand(pruner: SelectorPruner, tokens: torch.Tensor) -> list[float]:
    """The logarithm of the attention that each token receives, one query at a time."""
    net, total = pruner.net, [0.0] * len(tokens)
    with torch.no_grad():
        normed = net.norm(tokens)
        queries, keys = net.query(normed).double(), net.key(normed).double()
    for q in queries:
        weights = [math.exp(float(q @ k) / math.sqrt(len(q))) for k in keys]
        total = [t + w / sum(weights) for t, w in zip(total, weights, strict=True)]
    return [math.log(t) for t in total]


class TestSelector:
    def test_logits_are_the_attention_received_within_each_image(self) -> None:
        encoded, pruner = toy_encoded(), selector()
        logits = pruner.logits(pruner.observe(encoded), 0.5)
        for b, members in images_of(encoded):
            expected = torch.tensor(received_by_hand(pruner, encoded.visual[b, members]))
            assert torch.allclose(logits[b, members], expected, atol=1e-4)
        assert not logits[~encoded.visual_mask].any()

    def test_it_keeps_the_budget_alone_as_in_a_batch_and_whatever_is_asked(self) -> None:
        encoded, pruner = toy_encoded(), selector()
        keep = pruner.select(encoded, 1 / 9).keep
        sizes = [budget(1 / 9, int(members.sum())) for _, members in images_of(encoded)]
        assert [int(keep[b, members].sum()) for b, members in images_of(encoded)] == sizes
        for b, grids in enumerate(RAGGED):
            alone = pruner.select(toy_encoded([grids], uids=[f"toy-{b}"]), 1 / 9).keep[0]
            assert torch.equal(alone, keep[b, : len(alone)])
        assert not pruner.reads_question
        assert not pruner.extras

    def test_gradients_of_soft_gates_reach_both_projections(self) -> None:
        encoded, pruner = toy_encoded(), selector()
        x = pruner.observe(encoded)
        images = x.images
        logits = pruner.net(x, x.mask, 0, torch.full((len(x.mask),), 0.5))[0]
        k = torch.tensor([budget(0.25, n) for n in images.mask.sum(1).tolist()])
        gates = soft_top_k(images.split(logits), images.mask, k, 0.5)
        weights = torch.rand(gates.shape, generator=torch.Generator().manual_seed(1))
        (gates * weights).sum().backward()
        for weight in (pruner.net.query.weight, pruner.net.key.weight):
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().sum() > 0

    def test_a_round_trip_and_its_flops(self, tmp_path: Path) -> None:
        encoded, pruner = toy_encoded(), selector(width=6)
        pruner.save_pretrained(tmp_path)
        again = load_pruner(tmp_path)
        assert isinstance(again, SelectorPruner)
        assert torch.equal(again.select(encoded, 0.3).keep, pruner.select(encoded, 0.3).keep)
        # Two projections 16 -> 6 of ten tokens, and all inner products of six numbers.
        flops = 2 * (2 * 10 * 16 * 6) + 2 * 10**2 * 6
        assert pruner.flops_by_part(10, 4, 3) == {"selector": flops}


class TestScorerMMR:
    @pytest.mark.parametrize("balance", [0.5, 0.8])
    @pytest.mark.parametrize("ratio", [1 / 3, 1 / 9])
    def test_every_image_against_a_plain_loop(self, ratio: float, balance: float) -> None:
        encoded, scorer = toy_encoded(), selector()
        keep = ScorerMMR(scorer, balance).select(encoded, ratio).keep
        logits = scorer.logits(scorer.observe(encoded), ratio)
        for b, members in images_of(encoded):
            tokens, score = encoded.visual[b, members].double(), logits[b, members].double()
            unit = tokens / tokens.norm(dim=1, keepdim=True)
            importance = (score - score.min()) / (score.max() - score.min() + 1e-6)
            chosen = [int(importance.argmax())]
            while len(chosen) < budget(ratio, len(tokens)):
                value = balance * importance - (1 - balance) * (unit @ unit[chosen].T).amax(1)
                value[chosen] = -torch.inf
                chosen.append(int(value.argmax()))
            assert keep[b, members].nonzero().squeeze(1).tolist() == sorted(chosen)

    def test_importance_alone_is_top_k_of_the_scorer(self) -> None:
        encoded, scorer = toy_encoded(), selector()
        reranked = ScorerMMR(scorer, 1.0).select(encoded, 0.25).keep
        assert torch.equal(reranked, scorer.select(encoded, 0.25).keep)

    def test_a_balance_outside_its_range_is_refused(self, tmp_path: Path) -> None:
        selector().save_pretrained(tmp_path)
        assert load_scorer_mmr(tmp_path).balance == 0.5
        with pytest.raises(UserError, match=r"balance must be in \[0, 1\], got 1\.5; use e\.g\."):
            load_scorer_mmr(tmp_path, 1.5)
