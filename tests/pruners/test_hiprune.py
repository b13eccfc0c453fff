"""Against a plain reading of docs/baselines.md#hiprune (HiPrune), one image and one token at a
time."""

from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget
from tprl.errors import UserError
from tprl.pruners.hiprune import HiPrunePruner
from tprl.types import Encoded

RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]


def _by_hand(
    middle: list[float], last: list[float], views, k: int, alpha: float = 0.1
) -> list[int]:
    cells = [
        (view, r, c)
        for view, (rows, columns) in enumerate(views)
        for r in range(rows)
        for c in range(columns)
    ]
    order = sorted(range(len(middle)), key=lambda v: (-middle[v], v))
    chosen = set()
    for v in order[: int(k * alpha / 5)]:
        view, r, c = cells[v]
        around = [
            (view, r, c),
            (view, r - 1, c),
            (view, r + 1, c),
            (view, r, c - 1),
            (view, r, c + 1),
        ]
        chosen |= {cells.index(cell) for cell in around if cell in cells}
    remainder = sorted(set(range(len(last))) - chosen, key=lambda v: (-last[v], v))
    return sorted(chosen | set(remainder[: k - len(chosen)]))


def _encoded(grids=RAGGED, **options) -> Encoded:
    return toy_encoded(grids, extras=["middle_attention", "last_attention"], **options)


def _check(encoded: Encoded, ratio: float, **options) -> None:
    keep = HiPrunePruner(**options).select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, views in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            middle, last = (
                encoded.extras[x][b, members].tolist()
                for x in ("middle_attention", "last_attention")
            )
            k = budget(ratio, len(middle))
            assert keep[b, members].nonzero().squeeze(1).tolist() == _by_hand(
                middle, last, views, k, **options
            )


@pytest.mark.parametrize(
    ("side", "k"), [(12, 100), (12, 64), (12, 50), (12, 16), (24, 192), (24, 128), (24, 64)]
)
def test_equals_the_naive_loop(side, k):
    _check(_encoded([((side, side),)] * 3), k / side**2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_image_of_a_ragged_batch(ratio, alpha):
    encoded = _encoded([*RAGGED, ((1, 1),), ((1, 9),), ((9, 1),)])
    _check(encoded, ratio, alpha=alpha)
    counts = HiPrunePruner(alpha).select(encoded, ratio).count.tolist()
    assert counts == [
        sum(budget(ratio, len(x) and x[0][0] * x[0][1]) for x in grids) for grids in encoded.grids
    ]


def _one_anchor(at: int, grid: tuple[int, int] = (4, 5)) -> Encoded:
    """One token is what the middle layer sees; the last layer prefers the last tokens."""
    encoded = _encoded([(grid,)])
    encoded.extras["middle_attention"][0] = torch.eye(grid[0] * grid[1])[at]
    encoded.extras["last_attention"][0] = torch.arange(grid[0] * grid[1]) / 100
    return encoded


@pytest.mark.parametrize(
    ("at", "objects"),
    [
        (0, [0, 1, 5]),
        (4, [3, 4, 9]),  # 5 follows 4 in raster order but is on the next line
        (5, [0, 5, 6, 10]),
        (9, [4, 8, 9, 14]),
        (7, [2, 6, 7, 8, 12]),
        (15, [10, 15, 16]),
        (19, [14, 18, 19]),
    ],
)
def test_neighbors_stop_at_the_borders(at, objects):
    keep = (
        HiPrunePruner(alpha=1.0)
        .select(_one_anchor(at), 6 / 20)
        .keep[0]
        .nonzero()
        .squeeze(1)
        .tolist()
    )
    remainder = [v for v in range(19, -1, -1) if v not in objects]
    assert keep == sorted(objects + remainder[: 6 - len(objects)])


def test_neighbors_stay_in_their_view_and_anchors_are_of_the_whole_image():
    encoded = _one_anchor(7, (1, 20))
    # The same 20 tokens as two crops of 2 x 4 and 3 x 4: token 7 ends the first.
    crops = replace(encoded, grids=((((2, 4), (3, 4)),),))
    keep = HiPrunePruner(alpha=1.0).select(crops, 6 / 20).keep[0].nonzero().squeeze(1).tolist()
    assert keep == [3, 6, 7, 17, 18, 19]
    _check(crops, 6 / 20, alpha=1.0)
    # Both anchors lie in the second, which has 6 of the 10 places by its size.
    crops.extras["middle_attention"][0] = torch.eye(20)[14] + 0.5 * torch.eye(20)[19]
    crops.extras["last_attention"][0] = torch.arange(20.0).flip(0)
    keep = HiPrunePruner(alpha=1.0).select(crops, 10 / 20).keep[0].nonzero().squeeze(1).tolist()
    assert keep == [0, 1, 2, 3, 10, 13, 14, 15, 18, 19]


def test_padding_below_an_image_is_no_neighbor():
    encoded = _encoded([((4, 5),), ((12, 12),)])
    encoded.extras["middle_attention"][:, 0] = 1
    _check(encoded, 1 / 2, alpha=1.0)


@pytest.mark.parametrize(("k", "anchors"), [(49, 0), (50, 1), (99, 1), (100, 2)])
def test_anchors_are_rounded_down(k, anchors):
    encoded = _encoded([((12, 12),)])
    encoded.extras["middle_attention"][0] = 0
    encoded.extras["middle_attention"][0, [13, 17]] = torch.tensor([0.6, 0.4])
    encoded.extras["last_attention"][0] = torch.arange(144.0)
    keep = HiPrunePruner().select(encoded, k / 144).keep[0].nonzero().squeeze(1).tolist()
    objects = [[], [1, 12, 13, 14, 25], [1, 5, 12, 13, 14, 16, 17, 18, 25, 29]][anchors]
    assert keep == sorted({*objects, *range(144 - k + len(objects), 144)})


def test_ties_go_to_the_lower_index():
    encoded = _encoded([((12, 12),)])
    for value in encoded.extras.values():
        value.fill_(1 / 144)
    keep = HiPrunePruner().select(encoded, 50 / 144).keep[0].nonzero().squeeze(1).tolist()
    assert keep == list(range(50))  # the anchor is token 0, with 1 and 12


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_bad_alpha(bad):
    with pytest.raises(UserError, match=r"alpha must be .*got"):
        HiPrunePruner(bad)
