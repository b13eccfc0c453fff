"""Against a plain reading of maximal marginal relevance, one token at a time."""

import math

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.test_quality import cosines_by_hand, scores_by_hand

from tprl.budget import budget
from tprl.pruners.mmr_attention import MMRAttentionPruner, marginal_relevance


def _by_hand(
    attention: list[float], tokens: list[list[float]], k: int, redundancy: float
) -> list[int]:
    relevance, cosine = scores_by_hand([math.log(a) for a in attention]), cosines_by_hand(tokens)
    chosen: list[int] = []
    while len(chosen) < k:
        free = [i for i in range(len(tokens)) if i not in chosen]
        cost = {i: max((cosine[i][j] for j in chosen), default=0.0) for i in free}
        chosen.append(max(free, key=lambda i, cost=cost: (relevance[i] - redundancy * cost[i], -i)))
    return sorted(chosen)


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("ratio", [1.0, 1 / 3, 1 / 9, 1 / 18])
def test_every_image_of_a_ragged_batch(ratio, redundancy):
    encoded = toy_encoded(RAGGED, width=32, extras=["cls_attention"])
    keep = MMRAttentionPruner(redundancy).select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            attention, tokens = (
                encoded.extras["cls_attention"][b, members].tolist(),
                encoded.visual[b, members].tolist(),
            )
            expected = _by_hand(attention, tokens, budget(ratio, rows * columns), redundancy)
            assert keep[b, members].nonzero().squeeze(1).tolist() == expected


def test_a_copy_waits_until_it_is_worth_its_price():
    relevance = torch.tensor([[3.0, 2.9, 1.0, 0.0]]).double()
    cost = (
        2.0
        * torch.tensor(
            [[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]]
        ).double()
    )
    mask = torch.ones(1, 4, dtype=torch.bool)
    for k, kept in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        assert (
            marginal_relevance(relevance, cost, mask, torch.tensor([k]))[0]
            .nonzero()
            .squeeze(1)
            .tolist()
            == kept
        )


def test_ties_go_to_the_lower_index():
    relevance, mask = torch.zeros(1, 5).double(), torch.ones(1, 5, dtype=torch.bool)
    keep = marginal_relevance(relevance, torch.zeros(1, 5, 5).double(), mask, torch.tensor([2]))
    assert keep[0].tolist() == [True, True, False, False, False]
