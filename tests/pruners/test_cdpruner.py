"""Against a plain reading of docs/baselines.md#cdpruner, one image and one token at a time."""

import math
from dataclasses import replace
from operator import mul

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.sizes import GRIDS
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import budget
from tprl.errors import UserError
from tprl.policy.dpp import greedy_map
from tprl.pruners.cdpruner import CDPruner
from tprl.types import Encoded

RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]


def _by_hand(
    relevance: list[float], tokens: Tensor, k: int, theta: float | None = None, sign: int = -1
) -> list[int]:
    r = [sign * x for x in relevance]
    q = [(x - min(r) + 1e-6) / (max(r) - min(r)) for x in r]
    if theta is not None:
        q = [math.exp(theta / (2 * (1 - theta)) * x) for x in q]
    x = tokens.double() / tokens.double().square().sum(1, keepdim=True).sqrt()
    s = (x @ x.T).tolist()
    kernel = [
        [q[i] * (s[i][j] if i != j else 1.0) * q[j] for j in range(len(q))] for i in range(len(q))
    ]
    return _greedy(kernel, k, rank=tokens.shape[1])


def _greedy(kernel: list[list[float]], k: int, rank: int) -> list[int]:
    stock = [kernel[i][i] for i in range(len(kernel))]
    gain, factors, chosen = list(stock), [[] for _ in stock], []
    for step in range(k):
        free = [i for i in range(len(stock)) if i not in chosen]
        useful = [i for i in free if gain[i] > 1e-10 * stock[i] and step < rank]
        if not useful:  # the rank is exhausted: most relevant first
            chosen.append(max(free, key=lambda i: (stock[i], -i)))
            continue
        j = max(useful, key=lambda i: (gain[i], -i))
        chosen.append(j)
        row = [
            (kernel[j][i] - sum(map(mul, factors[j], factors[i]))) / math.sqrt(gain[j])
            for i in range(len(stock))
        ]
        for i, e in enumerate(row):
            factors[i].append(e)
            gain[i] -= e * e
    return sorted(chosen)


def _encoded(grids=RAGGED, width: int = 16, **options) -> Encoded:
    return toy_encoded(grids, width=width, extras=["clip_relevance"], **options)


def _check(
    encoded: Encoded, ratio: float, theta: float | None = None, negative: bool = True
) -> None:
    keep = CDPruner(negative, theta).select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            relevance = encoded.extras["clip_relevance"][b, members].tolist()
            k = budget(ratio, rows * columns)
            expected = _by_hand(
                relevance, encoded.visual[b, members], k, theta, -1 if negative else 1
            )
            assert keep[b, members].nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_equals_the_naive_loop(side, k):
    _check(_encoded([((side, side),)] * 2, width=256), k / side**2)


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_greedy_equals_the_naive_loop_on_the_same_float64_kernel(side, k):
    draw, n = torch.Generator().manual_seed(k), side * side
    x = normalize(torch.randn(2, n, 256, generator=draw, dtype=torch.float64), dim=2)
    q = torch.rand(2, n, 1, generator=draw, dtype=torch.float64)
    kernel, budgets = q * (x @ x.mT) * q.mT, [k, k // 2]
    keep = greedy_map(kernel, torch.ones(2, n, dtype=torch.bool), torch.tensor(budgets))
    for b in range(2):
        assert keep[b].nonzero().squeeze(1).tolist() == _greedy(
            kernel[b].tolist(), budgets[b], rank=256
        )


@pytest.mark.parametrize(
    ("side", "k"), [(12, 48), (12, 144), pytest.param(24, 192, marks=pytest.mark.slow)]
)
def test_a_width_below_the_budget_is_filled_up_with_relevant_tokens(side, k):
    encoded = _encoded([((side, side),)] * 2, width=16)
    _check(encoded, k / side**2)
    assert CDPruner().select(encoded, k / side**2).count.tolist() == [k, k]


@pytest.mark.parametrize("seed", [0, 4, 9, 11, 20])
def test_rounding_errors_are_not_a_dimension(seed):
    # 17 of 18 tokens of width 16: what is left of each token then is about 1e-14 of it.
    _check(_encoded([((3, 6),)], seed=seed), 17 / 18)


@pytest.mark.parametrize(
    "options", [{"theta": 0.0}, {"theta": 0.5}, {"theta": 0.99}, {"negative": False}]
)
def test_options(options):
    _check(_encoded([((12, 12),)], width=64), 1 / 3, **options)


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_image_of_a_ragged_batch(ratio):
    _check(_encoded(), ratio)


def test_the_lowest_cosine_is_the_first_choice():
    encoded = _encoded([((1, 3),)], width=3)
    embeds = encoded.embeds.clone()
    embeds[0, encoded.visual_at[0]] = torch.eye(3)
    encoded = replace(encoded, embeds=embeds)
    encoded.extras["clip_relevance"][0] = torch.tensor([0.2, 0.1, 0.3])
    assert CDPruner().select(encoded, 1 / 3).keep[0].int().tolist() == [0, 1, 0]
    assert CDPruner(negative_relevance=False).select(encoded, 1 / 3).keep[0].int().tolist() == [
        0,
        0,
        1,
    ]
    assert CDPruner().reads_question


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("theta", [None, 0.5])
def test_relevance_is_scaled_within_each_image(theta, negative):
    pruner = CDPruner(negative, theta)
    encoded = _encoded([((12, 12),), ((4, 4), (5, 7))])
    before = pruner.select(encoded, 1 / 9).keep
    scale = torch.where(encoded.image_of[1] == 0, 64.0, 0.25)  # powers of two: exact
    encoded.extras["clip_relevance"][1] *= scale
    assert torch.equal(pruner.select(encoded, 1 / 9).keep, before)
    encoded.extras["clip_relevance"][1] *= -1
    assert not torch.equal(pruner.select(encoded, 1 / 9).keep, before)


def test_a_question_that_fits_all_tokens_alike_leaves_diversity():
    encoded = _encoded([((12, 12),)], width=64)
    diverse = CDPruner(theta=0.0).select(encoded, 1 / 3).keep
    encoded.extras["clip_relevance"].fill_(0.3)
    assert torch.equal(CDPruner().select(encoded, 1 / 3).keep, diverse)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens_fill_the_budget_in_order(value):
    encoded = _encoded([((4, 4),)])
    encoded.extras["clip_relevance"].fill_(0.3)
    keep = (
        CDPruner()
        .select(replace(encoded, embeds=torch.full_like(encoded.embeds, value)), 0.25)
        .keep[0]
    )
    assert keep.nonzero().squeeze(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan])
def test_bad_theta(bad):
    with pytest.raises(UserError, match=r"theta must be .*got"):
        CDPruner(theta=bad)
