"""Against a plain reading of BASELINES 3.7, one image and one token at a time."""

import math

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.pruners.vispruner import VisPruner


def _by_hand(attention: list[float], features: list[list[float]], k: int, important: float = 0.5, drop: int = 8):
    unit = [[x / math.hypot(*row) for x in row] for row in features]
    cosine = (torch.tensor(unit, dtype=torch.float64) @ torch.tensor(unit, dtype=torch.float64).T).tolist()
    order = sorted(range(len(attention)), key=lambda v: (-attention[v], v))
    first = int(k * important)
    chosen, rest, goal = order[:first], order[first:], k - first
    while goal > 0:
        r = min(drop, len(rest) - goal)
        if r <= 0:
            break
        evens, odds = rest[0::2], rest[1::2]
        similar = {i: max((cosine[i][j] for j in odds), default=-math.inf) for i in evens}
        evens = sorted(evens, key=lambda i: -similar[i])  # Python's sort is stable
        rest = evens[min(r, len(evens)) :] + odds
    return sorted(chosen + (rest if goal > 0 else []))


def _check(encoded, ratio, k, **options):
    keep = VisPruner(**options).select(encoded, ratio).keep
    for b in range(len(encoded)):
        n = int(encoded.visual_mask[b].sum())
        attention = encoded.extras["cls_attention"][b, :n].tolist()
        features = encoded.extras["vision_features"][b, :n].tolist()
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand(attention, features, k, **options)


@pytest.mark.parametrize(("side", "k"), [(12, 48), (12, 32), (12, 16), (24, 192), (24, 128), (24, 64)])
def test_equals_the_naive_loop(side, k):
    encoded = toy_encoded([((side, side),)] * 3, extras=["cls_attention", "vision_features"])
    _check(encoded, k / side**2, k)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 25, 49, 54, 55, 71, 143, 144])
def test_odd_rest_and_small_budgets(k):
    encoded = toy_encoded([((12, 12),)] * 2, extras=["cls_attention", "vision_features"])
    _check(encoded, k / 144, k)


def test_the_published_budget_that_breaks_the_reference():
    # T = 194 leaves 479 tokens, an odd number: IndexError in the reference (BASELINES 3.7).
    encoded = toy_encoded([((24, 24),)], extras=["cls_attention", "vision_features"])
    _check(encoded, 194 / 576, 194)


@pytest.mark.parametrize(
    "options", [{"important": 0.0}, {"important": 0.7}, {"important": 1.0}, {"drop": 1}, {"drop": 50}]
)
def test_options(options):
    encoded = toy_encoded([((12, 12),)], extras=["cls_attention", "vision_features"])
    _check(encoded, 41 / 144, 41, **options)


def test_images_of_different_sizes_in_one_batch_finish_in_different_rounds():
    grids = [((12, 12),), ((3, 5),), ((7, 9),), ((1, 1),)]
    encoded = toy_encoded(grids, extras=["cls_attention", "vision_features"])
    keep = VisPruner().select(encoded, 1 / 3).keep
    for b, k in enumerate([48, 5, 21, 1]):
        n = int(encoded.visual_mask[b].sum())
        attention = encoded.extras["cls_attention"][b, :n].tolist()
        features = encoded.extras["vision_features"][b, :n].tolist()
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand(attention, features, k)


def test_redundant_tokens_go_first():
    # Two tokens point the same way as the two most attended of the rest; they are what diversity drops.
    encoded = toy_encoded([((2, 3),)], extras=["cls_attention", "vision_features"])
    encoded.extras["cls_attention"][0] = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    axes = torch.eye(24)
    encoded.extras["vision_features"][0] = axes[[0, 1, 1, 2, 3, 4]]
    keep = VisPruner(important=0.2, drop=1).select(encoded, 5 / 6).keep[0]
    assert keep.int().tolist() == [1, 0, 1, 1, 1, 1]
