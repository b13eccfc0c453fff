"""Against a plain reading of docs/baselines.md#vispruner, one image and one token at a time."""

import math

import pytest
import torch
from tests.helpers import toy_encoded
from tests.pruners.sizes import GRIDS

from tprl.pruners.vispruner import VisPruner


def _cosine(features: torch.Tensor) -> list[list[float]]:
    unit = torch.tensor(
        [[x / math.hypot(*row) for x in row] for row in features.tolist()], dtype=torch.float64
    )
    return (unit @ unit.T).tolist()


def _by_hand(
    attention: list[float], cosine: list[list[float]], k: int, important: float = 0.5, drop: int = 8
):
    order = sorted(range(len(attention)), key=lambda v: (-attention[v], v))
    first = int(k * important)
    chosen, remainder, goal = order[:first], order[first:], k - first
    while goal > 0:
        r = min(drop, len(remainder) - goal)
        if r <= 0:
            break
        evens, odds = remainder[0::2], remainder[1::2]
        similar = {i: max((cosine[i][j] for j in odds), default=-math.inf) for i in evens}
        evens = sorted(evens, key=lambda i: -similar[i])  # Python's sort is stable
        remainder = evens[min(r, len(evens)) :] + odds
    return sorted(chosen + (remainder if goal > 0 else []))


def _inputs(encoded, b: int) -> tuple[list[float], list[list[float]]]:
    n = int(encoded.visual_mask[b].sum())
    attention, features = (
        encoded.extras[name][b, :n] for name in ("cls_attention", "vision_features")
    )
    return attention.tolist(), _cosine(features)


def _check(encoded, ratio, k, **options):
    keep = VisPruner(**options).select(encoded, ratio).keep
    for b in range(len(encoded)):
        attention, cosine = _inputs(encoded, b)
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand(attention, cosine, k, **options)


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_equals_the_naive_loop(side, k):
    encoded = toy_encoded([((side, side),)] * 2, extras=["cls_attention", "vision_features"])
    _check(encoded, k / side**2, k)


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_rounds_equal_the_naive_loop_on_the_same_float64_matrix(side, k):
    draw, n = torch.Generator().manual_seed(k), side * side
    attention = torch.rand(2, n, generator=draw, dtype=torch.float64)
    cosine = torch.rand(2, n, n, generator=draw, dtype=torch.float64)
    order, budgets = attention.argsort(dim=1, descending=True), torch.tensor([k, k // 2 + 1])
    keep = VisPruner()._choose(order, cosine, torch.tensor([n, n]), budgets)
    for b in range(2):
        expected = _by_hand(attention[b].tolist(), cosine[b].tolist(), int(budgets[b]))
        assert keep[b].nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 3, 7, 25, 49, 54, 55, 71, 143, 144])
def test_odd_rest_and_small_budgets(k):
    encoded = toy_encoded([((12, 12),)] * 2, extras=["cls_attention", "vision_features"])
    _check(encoded, k / 144, k)


def test_the_published_budget_that_breaks_the_reference():
    # T = 194 leaves 479 tokens, an odd number: IndexError in the reference
    # (docs/baselines.md#vispruner).
    encoded = toy_encoded([((24, 24),)], extras=["cls_attention", "vision_features"])
    _check(encoded, 194 / 576, 194)


@pytest.mark.parametrize(
    "options",
    [{"important": 0.0}, {"important": 0.7}, {"important": 1.0}, {"drop": 1}, {"drop": 50}],
)
def test_options(options):
    encoded = toy_encoded([((12, 12),)], extras=["cls_attention", "vision_features"])
    _check(encoded, 41 / 144, 41, **options)


def test_images_of_different_sizes_in_one_batch_finish_in_different_rounds():
    grids = [((12, 12),), ((3, 5),), ((7, 9),), ((1, 1),)]
    encoded = toy_encoded(grids, extras=["cls_attention", "vision_features"])
    keep = VisPruner().select(encoded, 1 / 3).keep
    for b, k in enumerate([48, 5, 21, 1]):
        attention, cosine = _inputs(encoded, b)
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand(attention, cosine, k)


def test_redundant_tokens_go_first():
    # Two tokens point the same way as the two most attended of the rest; they are what diversity
    # drops.
    encoded = toy_encoded([((2, 3),)], extras=["cls_attention", "vision_features"])
    encoded.extras["cls_attention"][0] = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    axes = torch.eye(24)
    encoded.extras["vision_features"][0] = axes[[0, 1, 1, 2, 3, 4]]
    keep = VisPruner(important=0.2, drop=1).select(encoded, 5 / 6).keep[0]
    assert keep.int().tolist() == [1, 0, 1, 1, 1, 1]
