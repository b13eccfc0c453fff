"""Against a plain reading of SCOPE's coverage gain, one token at a time."""

import math

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget
from tprl.pruners.scope import ScopePruner


def _by_hand(
    attention: list[float], features: list[list[float]], k: int, alpha: float
) -> list[int]:
    unit = [[x / math.hypot(*row) for x in row] for row in features]
    cosine = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in unit] for a in unit]
    n, chosen = len(unit), []
    while len(chosen) < k:
        covered = [max([0.0, *(cosine[i][j] for j in chosen)]) for i in range(n)]
        free = [j for j in range(n) if j not in chosen]
        gain = {j: sum(max(0.0, cosine[i][j] - covered[i]) for i in range(n)) for j in free}
        useful = [j for j in free if gain[j] > 1e-9]
        if useful:
            chosen.append(
                max(useful, key=lambda j, gain=gain: (gain[j] * attention[j] ** alpha, -j))
            )
        else:
            chosen.append(max(free, key=lambda j: (attention[j], -j)))
    return sorted(chosen)


def _encoded(grids=RAGGED):
    return toy_encoded(grids, extras=["cls_attention", "vision_features"])


@pytest.mark.parametrize("alpha", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("ratio", [1.0, 1 / 3, 1 / 9, 1 / 18])
def test_every_image_of_a_ragged_batch(ratio, alpha):
    encoded = _encoded()
    keep = ScopePruner(alpha).select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            attention = encoded.extras["cls_attention"][b, members].double().tolist()
            features = encoded.extras["vision_features"][b, members].double().tolist()
            expected = _by_hand(attention, features, budget(ratio, rows * columns), alpha)
            assert keep[b, members].nonzero().squeeze(1).tolist() == expected


def test_what_is_covered_adds_nothing_and_attention_fills_up():
    # Two directions, three tokens each: one token of each covers all, then attention alone decides.
    encoded = _encoded([((2, 3),)])
    encoded.extras["vision_features"][0] = torch.eye(24)[:2].repeat(3, 1)
    encoded.extras["cls_attention"][0] = torch.tensor([0.1, 0.02, 0.2, 0.03, 0.6, 0.05])
    for k, kept in ((1, [4]), (2, [4, 5]), (3, [2, 4, 5]), (4, [0, 2, 4, 5])):
        assert ScopePruner().select(encoded, k / 6).keep[0].nonzero().squeeze(1).tolist() == kept


def test_ties_go_to_the_lower_index():
    encoded = _encoded([((2, 2),)])
    encoded.extras["vision_features"][0] = torch.eye(24)[:4]
    encoded.extras["cls_attention"][0] = 0.25
    assert ScopePruner().select(encoded, 0.5).keep[0].tolist() == [True, True, False, False]
