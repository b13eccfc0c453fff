from fractions import Fraction

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.pruners.uniform import UniformPruner


def _picture(keep: torch.Tensor, rows: int, columns: int) -> list[str]:
    return ["".join(".x"[int(k)] for k in row) for row in keep.reshape(rows, columns)]


@pytest.mark.parametrize(
    ("side", "down", "across"),
    [(12, 8, 6), (12, 8, 4), (12, 4, 4), (24, 16, 12), (24, 16, 8), (24, 8, 8)],
)
def test_a_grid_is_the_cells_under_its_windows_centers(side, down, across):
    expected = []
    for i in range(down):
        for j in range(across):
            y, x = side * (i + Fraction(1, 2)) / down, side * (j + Fraction(1, 2)) / across
            expected += [
                r * side + c
                for r in range(side)
                for c in range(side)
                if r <= y < r + 1 and c <= x < c + 1
            ]
    keep = UniformPruner().select(toy_encoded([((side, side),)] * 2), down * across / side**2).keep
    for row in keep:
        assert row.nonzero().squeeze(1).tolist() == expected


def test_a_quarter_of_a_square_is_every_second_row_and_column():
    keep = UniformPruner().select(toy_encoded([((4, 4),)]), 1 / 4).keep[0]
    assert _picture(keep, 4, 4) == ["....", ".x.x", "....", ".x.x"]


def test_a_budget_without_a_grid():
    keep = UniformPruner().select(toy_encoded([((6, 6),)]), 5 / 36).keep[0]
    assert _picture(keep, 6, 6) == ["......", ".x..x.", "......", "......", ".x.x.x", "......"]


def test_spread_covers_every_part_of_the_image():
    keep = UniformPruner().select(toy_encoded([((12, 12),)]), 1 / 9).keep[0].reshape(12, 12)
    blocks = keep.reshape(4, 3, 4, 3).sum((1, 3))
    assert (blocks == 1).all()
