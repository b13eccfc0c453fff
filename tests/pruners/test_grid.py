from itertools import pairwise

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from tprl.pruners.grid import centers, grid_table, layout, spread_order, windows

GRIDS = [(12, 12), (24, 24), (6, 9), (9, 6), (1, 7), (7, 1), (2, 30), (1, 1), (5, 7)]


@pytest.mark.parametrize(
    ("grid", "k", "bands"),
    [
        ((24, 24), 144, (12,) * 12),
        ((24, 24), 192, (12,) * 16),
        ((24, 24), 128, (8,) * 16),
        ((24, 24), 64, (8,) * 8),
        ((12, 12), 48, (6,) * 8),
        ((12, 12), 5, (2, 3)),  # 5 x 1 would be five times as wide as high
        ((12, 12), 7, (2, 2, 3)),
        ((2, 30), 6, (6,)),  # 2 x 5 is nearer to square than 1 x 10
        ((1, 7), 3, (3,)),
        ((7, 1), 3, (1, 1, 1)),
        ((6, 9), 54, (9,) * 6),
    ],
)
def test_layout_literals(grid, k, bands):
    assert layout(grid[0], grid[1], k) == bands


@pytest.mark.parametrize("grid", GRIDS)
def test_every_budget_is_met_exactly(grid):
    n = grid[0] * grid[1]
    for k in range(1, n + 1):
        bands = layout(grid[0], grid[1], k)
        assert sum(bands) == k
        assert len(bands) <= grid[0]
        assert max(bands) - min(bands) <= 1
        assert 1 <= min(bands) <= max(bands) <= grid[1]


@pytest.mark.parametrize("grid", GRIDS)
def test_centers_are_distinct_ascending_and_inside_their_window(grid):
    n = grid[0] * grid[1]
    for k in range(1, n + 1, max(1, n // 40)):
        cells, weight = centers(*grid, k), windows(*grid, k)
        assert len(cells) == k
        assert (cells.diff() > 0).all()
        assert (weight.gather(1, cells.unsqueeze(1)) > 0).all()
        assert torch.allclose(weight.sum(1), torch.ones(k))
        assert (weight.sum(0) > 0).all()  # the windows cover the image


@pytest.mark.parametrize("bad", [0, 7])
def test_impossible_counts(bad):
    with pytest.raises(ValueError, match=rf"{bad} windows on a grid of 2 x 3"):
        layout(2, 3, bad)


@pytest.mark.parametrize(
    ("k", "shape"), [(144, (12, 12)), (64, (8, 8)), (36, (6, 6)), (192, (16, 12)), (128, (16, 8))]
)
def test_exact_grids_are_adaptive_average_pooling(k, shape):
    tokens = torch.randn(576, 5, generator=torch.Generator().manual_seed(0))
    expected = adaptive_avg_pool2d(tokens.T.reshape(1, 5, 24, 24), shape).flatten(2)[0].T
    torch.testing.assert_close(windows(24, 24, k) @ tokens, expected)


def test_uneven_bands_by_hand():
    # 5 windows on 4 x 4 cells: two above, three overlapping ones below, all 2 x 2.
    assert layout(4, 4, 5) == (2, 3)
    corners = [(0, 0), (0, 2), (2, 0), (2, 1), (2, 2)]
    expected = torch.zeros(5, 4, 4)
    for window, (r, c) in zip(expected, corners, strict=True):
        window[r : r + 2, c : c + 2] = 1 / 4
    assert torch.equal(windows(4, 4, 5), expected.flatten(1))
    assert centers(4, 4, 5).tolist() == [5, 7, 12, 14, 15]


def test_spread_order_is_farthest_point_order():
    rank = spread_order(5, 5)
    assert sorted(rank.tolist()) == list(range(25))
    assert rank[12] == 0  # the center
    assert rank.argsort()[:5].tolist() == [12, 0, 4, 20, 24]  # then the corners
    order = spread_order(8, 11).argsort()
    xy = torch.stack([order // 11, order % 11], 1).double()
    gap = [torch.cdist(xy[i : i + 1], xy[:i]).min() for i in range(1, 88)]
    assert all(later <= earlier for earlier, later in pairwise(gap))


def test_table_fills_rows_by_shape():
    out = grid_table([(2,), (3,), (2,)], lambda n: torch.arange(n) + 1, torch.zeros(3, 4))
    assert out.tolist() == [[1, 2, 0, 0], [1, 2, 3, 0], [1, 2, 0, 0]]
