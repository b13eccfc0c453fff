from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.sizes import GRIDS
from tests.pruners.test_quality import RATIOS, check

from tprl.pruners.oracle import OraclePruner


def _toy(scores: dict[int, float], side: int = 5):
    encoded = toy_encoded([((side, side),)], extras=["region"])
    encoded.extras["region"].zero_()
    for token, score in scores.items():
        encoded.extras["region"][0, token] = score
    return encoded


def _kept(encoded, k: int) -> list[int]:
    return (
        OraclePruner()
        .select(encoded, k / encoded.visual_mask.shape[1])
        .keep[0]
        .nonzero()
        .squeeze(1)
        .tolist()
    )


def _by_hand(region: list[float], side: int, k: int) -> list[int]:
    place, gap = side // 2 * side + side // 2, [side**3] * side**2
    spread = []
    while len(spread) < side**2:
        spread.append(place)
        for v in range(side**2):
            gap[v] = min(gap[v], (v // side - place // side) ** 2 + (v % side - place % side) ** 2)
        place = gap.index(max(gap))  # the first of equals
    on = sorted((v for v in spread if region[v] > 0), key=lambda v: (-region[v], v))
    return sorted((on + [v for v in spread if region[v] == 0])[:k])


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_equals_the_naive_loop(side, k):
    encoded = toy_encoded([((side, side),)] * 2, extras=["region"])
    keep = OraclePruner().select(encoded, k / side**2).keep
    for b, region in enumerate(encoded.extras["region"].tolist()):
        assert keep[b].nonzero().squeeze(1).tolist() == _by_hand(region, side, k)


def test_the_region_comes_first_in_its_own_order():
    encoded = _toy({7: 1.0, 8: 0.5, 13: 1 / 3, 3: 0.25})
    assert _kept(encoded, 1) == [7]
    assert _kept(encoded, 3) == [7, 8, 13]
    assert _kept(encoded, 4) == [3, 7, 8, 13]


def test_the_rest_is_spread_from_the_center_to_the_corners():
    assert _kept(_toy({7: 1.0, 8: 0.5}), 5) == [0, 4, 7, 8, 12]
    # a spread token that is on the region is not counted twice
    assert _kept(_toy({12: 1.0}), 4) == [0, 4, 12, 20]


def test_no_region_is_an_even_spread():
    assert _kept(_toy({}), 5) == [0, 4, 12, 20, 24]


def test_low_scores_on_the_region_still_beat_everything_off_it():
    encoded = _toy({t: 1 / (1 + t) for t in range(50, 144)}, side=12)
    assert torch.tensor(_kept(encoded, 94)).tolist() == list(range(50, 144))


@pytest.mark.parametrize("ratio", RATIOS)
def test_oracle_with_diversity_takes_the_region_first(ratio):
    encoded, pruner = toy_encoded(RAGGED, width=64, extras=["region"]), OraclePruner(diversity=True)
    check(
        pruner,
        encoded,
        ratio,
        lambda b, members: (4.0 * (encoded.extras["region"][b, members] > 0)).tolist(),
    )
    keep = pruner.select(encoded, ratio).keep
    for b, grids in enumerate(RAGGED):
        for i in range(len(grids)):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            on = encoded.extras["region"][b, members] > 0
            assert (keep[b, members] & on).sum() == min(int(keep[b, members].sum()), int(on.sum()))


def test_copies_of_the_region_still_come_before_anything_else():
    # Eight equal tokens on the region: after the first, what a second adds is the kernel's jitter
    # alone.
    encoded = toy_encoded([((6, 6),)], width=64, extras=["region"])
    embeds, region = encoded.embeds.clone(), torch.zeros_like(encoded.extras["region"])
    embeds[0, encoded.visual_at[0, 10:18]] = embeds[0, encoded.visual_at[0, 10]].clone()
    region[0, 10:18] = 0.5
    keep = (
        OraclePruner(diversity=True)
        .select(replace(encoded, embeds=embeds, extras={"region": region}), 10 / 36)
        .keep
    )
    assert keep[0, 10:18].all()
    assert keep.sum() == 10
