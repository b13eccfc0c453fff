"""Relevance x diversity; `check` compares a pruner with plain loops in double precision."""

import math

import pytest
import torch
from tests.helpers import toy_encoded
from tests.pruners.test_cdpruner import _greedy

from tprl.budget import budget, image_rows
from tprl.pruners.quality import diverse, log_attention, standardize
from tprl.types import Encoded

RATIOS = [1.0, 1 / 3, 1 / 9, 1 / 18]


def scores_by_hand(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / spread if spread > 1e-12 else 0.0 for x in values]


def cosines_by_hand(tokens: list[list[float]]) -> list[list[float]]:
    """Cosines of what is left of the tokens without their mean."""
    middle = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    away = [[x - m for x, m in zip(row, middle, strict=True)] for row in tokens]
    unit = [[x / max(math.hypot(*row), 1e-12) for x in row] for row in away]
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in unit] for a in unit]


def chosen_by_hand(log_q: list[float], tokens: list[list[float]], k: int) -> list[int]:
    cosine, n = cosines_by_hand(tokens), len(tokens)
    kernel = [
        [math.exp(log_q[i] + log_q[j]) * (cosine[i][j] if i != j else 1.01) for j in range(n)]
        for i in range(n)
    ]
    return _greedy(kernel, k, rank=n)


def check(pruner, encoded: Encoded, ratio: float, log_q_of) -> None:
    """`log_q_of(row, tokens of the image)` is the plain reading of the pruner's quality."""
    keep = pruner.select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            tokens = encoded.visual[b, members].double().tolist()
            expected = chosen_by_hand(log_q_of(b, members), tokens, budget(ratio, rows * columns))
            assert keep[b, members].nonzero().squeeze(1).tolist() == expected


def test_scores_of_rows_with_padding():
    x = torch.tensor([[1.0, 2.0, 3.0, 99.0], [5.0, 5.0, 5.0, 5.0], [7.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True, False, False, False]])
    result = standardize(x, mask)
    assert result[0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5, 0.0])
    assert result[1:].tolist() == [[0.0] * 4] * 2
    assert standardize(
        torch.full((1, 3), 0.1).double(), torch.ones(1, 3, dtype=torch.bool)
    ).tolist() == [[0.0] * 3]


def test_quality_far_below_the_best_still_fills_the_budget():
    encoded = toy_encoded([((4, 4),)])
    images = image_rows(encoded.visual_mask, encoded.image_of)
    log_q = torch.zeros(1, 16).double()
    log_q[0, 1:] = -1e4  # its exponential is 0
    assert diverse(log_q, images, encoded, torch.tensor([5]))[0].nonzero().squeeze(1).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_no_attention_is_little_attention():
    assert log_attention(torch.tensor([[0.0, 1.0]])).tolist() == [
        [pytest.approx(math.log(1e-8)), 0.0]
    ]
