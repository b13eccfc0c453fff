"""Against a plain reading of docs/baselines.md#divprune, one token at a time."""

import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import toy_encoded
from tests.pruners.sizes import GRIDS
from torch import Tensor

from tprl.pruners.divprune import DivPrunePruner, max_min
from tprl.types import Encoded


def _by_hand(distance: list[list[float]], k: int) -> list[int]:
    n = len(distance)
    if n == 1:
        return [0]
    second = [sorted(distance[i][j] for i in range(n))[1] for j in range(n)]
    chosen = [second.index(max(second))]
    gap = [math.inf] * n
    while len(chosen) < k:
        gap = [min(gap[j], distance[chosen[-1]][j]) for j in range(n)]
        gap[chosen[-1]] = -1.0
        chosen.append(gap.index(max(gap)))
    return sorted(chosen)


def _distances(side: int, seed: int) -> Tensor:
    x = torch.randn(
        side * side, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = x / x.norm(dim=1, keepdim=True)
    return (1 - x @ x.T).fill_diagonal_(0)


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_greedy_equals_the_naive_loop_in_float64(side, k):
    distance = torch.stack([_distances(side, seed) for seed in (0, 1)])
    mask = torch.ones(2, side * side, dtype=torch.bool)
    keep = max_min(distance, mask, torch.tensor([k, k // 2]))
    assert keep[0].nonzero().squeeze(1).tolist() == _by_hand(distance[0].tolist(), k)
    assert keep[1].nonzero().squeeze(1).tolist() == _by_hand(distance[1].tolist(), k // 2)


def _signs(side: int) -> Encoded:
    """Tokens of +-1 in 64 dimensions: unit vectors and cosines are exact in float32, and ties are
    many."""
    encoded = toy_encoded([((side, side),)] * 2, width=64)
    return replace(encoded, embeds=encoded.embeds.sign())


@pytest.mark.parametrize(("side", "k"), GRIDS)
@pytest.mark.parametrize("exact", [True, False])
def test_selector_equals_the_naive_loop(side, k, exact):
    # With seed 5 no choice is nearer than 9e-6, thirty times what float32 can err.
    encoded = _signs(side) if exact else toy_encoded([((side, side),)] * 2, width=32, seed=5)
    keep = DivPrunePruner().select(encoded, k / side**2).keep
    for b in range(2):
        x = encoded.visual[b].double()
        x = x / x.norm(dim=1, keepdim=True)
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand((1 - x @ x.T).tolist(), k)


def test_corners_before_the_middle():
    # Unit vectors at angles 0, 10, 90, 100, 180 degrees; the third has the farthest nearest
    # neighbor of all but 180.
    angle = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 100.0, 180.0]))
    encoded = toy_encoded([((1, 5),)], width=2)
    embeds = encoded.embeds.clone()
    embeds[0, encoded.visual_at[0]] = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor(
        [[1], [5], [2], [3], [9]]
    )
    keep = [
        DivPrunePruner().select(replace(encoded, embeds=embeds), k / 5).keep[0].int().tolist()
        for k in (1, 2, 3)
    ]
    assert keep == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1]]


def test_equal_tokens_still_fill_the_budget():
    encoded = toy_encoded([((4, 4),)])
    same = replace(encoded, embeds=torch.ones_like(encoded.embeds))
    assert DivPrunePruner().select(same, 0.5).count.item() == 8
    zero = replace(encoded, embeds=torch.zeros_like(encoded.embeds))
    assert DivPrunePruner().select(zero, 0.5).count.item() == 8


def test_half_precision_overlaps_with_float32():
    encoded = toy_encoded([((24, 24),)], width=64)
    rounded = replace(encoded, embeds=encoded.embeds.half())
    a, b = (DivPrunePruner().select(x, 1 / 3).keep for x in (encoded, rounded))
    assert (a & b).sum() >= 0.6 * 192
