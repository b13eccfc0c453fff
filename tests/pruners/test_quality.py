"""Relevance x diversity against plain loops in double precision; also the pruners that are nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.test_cdpruner import _greedy

from tprl.budget import budget, image_rows
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.quality import diverse, log_attention, standardise
from tprl.pruners.question_dpp import QuestionDPPPruner
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
    kernel = [[math.exp(log_q[i] + log_q[j]) * (cosine[i][j] if i != j else 1.01) for j in range(n)] for i in range(n)]
    return _greedy(kernel, k, rank=n)


def check(pruner, encoded: Encoded, ratio: float, log_q_of) -> None:
    """`log_q_of(row, tokens of the image)` is the plain reading of the pruner's quality."""
    keep = pruner.select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            mine = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            tokens = encoded.visual[b, mine].double().tolist()
            expected = chosen_by_hand(log_q_of(b, mine), tokens, budget(ratio, rows * columns))
            assert keep[b, mine].nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_attention_dpp_is_the_naive_loop(ratio, alpha):
    encoded = toy_encoded(RAGGED, width=64, extras=["cls_attention"])

    def log_q(b, mine):
        return [alpha * z for z in scores_by_hand([math.log(a) for a in encoded.extras["cls_attention"][b, mine]])]

    check(AttentionDPPPruner(alpha), encoded, ratio, log_q)


@pytest.mark.parametrize("ratio", RATIOS)
def test_question_dpp_is_the_naive_loop(ratio):
    encoded, pruner = toy_encoded(RAGGED, width=64), QuestionDPPPruner(0.5)

    def log_q(b, mine):
        words, tokens = (x.double().tolist() for x in (encoded.embeds[b, encoded.question[b]], encoded.visual[b, mine]))
        assert words

        def cosine(x, y):
            return sum(i * j for i, j in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

        means = [sum(cosine(token, word) for word in words) / len(words) for token in tokens]
        return [0.5 * z for z in scores_by_hand(means)]

    check(pruner, encoded, ratio, log_q)
    assert pruner.reads_question


def test_other_words_choose_other_tokens_and_none_leave_diversity():
    encoded = toy_encoded([((12, 12),)], width=64)
    kept = QuestionDPPPruner(1.0).select(encoded, 1 / 9).keep
    other = encoded.embeds.clone()
    other[encoded.question] *= -1
    assert not torch.equal(QuestionDPPPruner(1.0).select(replace(encoded, embeds=other), 1 / 9).keep, kept)
    silent = replace(encoded, question=torch.zeros_like(encoded.question))
    diversity = QuestionDPPPruner(alpha=0.0).select(encoded, 1 / 9).keep
    assert torch.equal(QuestionDPPPruner().select(silent, 1 / 9).keep, diversity)


@pytest.mark.parametrize("ratio", RATIOS)
def test_oracle_with_diversity_takes_the_region_first(ratio):
    encoded, pruner = toy_encoded(RAGGED, width=64, extras=["region"]), OraclePruner(diversity=True)
    check(pruner, encoded, ratio, lambda b, mine: (4.0 * (encoded.extras["region"][b, mine] > 0)).tolist())
    keep = pruner.select(encoded, ratio).keep
    for b, grids in enumerate(RAGGED):
        for i in range(len(grids)):
            mine = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            on = encoded.extras["region"][b, mine] > 0
            assert (keep[b, mine] & on).sum() == min(int(keep[b, mine].sum()), int(on.sum()))


def test_copies_of_the_region_still_come_before_anything_else():
    # Eight equal tokens on the region: after the first, what a second adds is the kernel's jitter alone.
    encoded = toy_encoded([((6, 6),)], width=64, extras=["region"])
    embeds, region = encoded.embeds.clone(), torch.zeros_like(encoded.extras["region"])
    embeds[0, encoded.visual_at[0, 10:18]] = embeds[0, encoded.visual_at[0, 10]].clone()
    region[0, 10:18] = 0.5
    keep = OraclePruner(diversity=True).select(replace(encoded, embeds=embeds, extras={"region": region}), 10 / 36).keep
    assert keep[0, 10:18].all()
    assert keep.sum() == 10


def test_scores_of_rows_with_padding():
    x = torch.tensor([[1.0, 2.0, 3.0, 99.0], [5.0, 5.0, 5.0, 5.0], [7.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True, False, False, False]])
    found = standardise(x, mask)
    assert found[0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5, 0.0])
    assert found[1:].tolist() == [[0.0] * 4] * 2
    assert standardise(torch.full((1, 3), 0.1).double(), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0.0] * 3]


def test_no_attention_is_little_attention():
    assert log_attention(torch.tensor([[0.0, 1.0]])).tolist() == [[pytest.approx(math.log(1e-8)), 0.0]]
    encoded = toy_encoded([((4, 4),)], extras=["cls_attention"])
    encoded.extras["cls_attention"][0, 3:] = 0.0
    assert AttentionDPPPruner().select(encoded, 3 / 16).keep[0].nonzero().squeeze(1).tolist() == [0, 1, 2]


def test_quality_far_below_the_best_still_fills_the_budget():
    encoded = toy_encoded([((4, 4),)])
    images = image_rows(encoded.visual_mask, encoded.image_of)
    log_q = torch.zeros(1, 16).double()
    log_q[0, 1:] = -1e4  # its exponential is 0
    assert diverse(log_q, images, encoded, torch.tensor([5]))[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]
