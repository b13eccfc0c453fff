import pytest
import torch
from PIL import Image

from tprl.lvlm.regions import region_rank
from tprl.types import Box, Sample


def _sample(
    *boxes: Box, sizes: tuple[tuple[int, int], ...] = ((40, 40),), region: bool = True
) -> Sample:
    images = tuple(Image.new("RGB", size) for size in sizes)
    floats = tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in boxes)
    return Sample("s", images, "?", ("a",), region=floats if region else None)


def _rank(
    *boxes: Box, grid: tuple[int, int] = (4, 4), size: tuple[int, int] = (40, 40)
) -> torch.Tensor:
    return region_rank([_sample(*boxes, sizes=(size,))], [[[grid]]], grid[0] * grid[1])[0].reshape(
        grid
    )


def _on(scores: torch.Tensor) -> list[int]:
    return scores.flatten().nonzero().squeeze(1).tolist()


def test_no_region_is_zero():
    samples = [_sample(region=False), _sample(), _sample((0, 0, 10, 10), sizes=())]
    assert not region_rank(samples, [[[(4, 4)]], [[(4, 4)]], []], 20).any()


def test_a_box_that_fills_cells_exactly_does_not_spill_over():
    assert _on(_rank((10, 10, 30, 20))) == [5, 6]


@pytest.mark.parametrize(("x1", "on"), [(27.4, [6, 7]), (27.6, [7])])
def test_a_quarter_of_a_cell_counts(x1, on):
    assert _on(_rank((x1, 10, 40, 20))) == on


def test_a_tiny_box_lies_on_the_cell_of_its_center():
    assert _on(_rank((11, 31, 12, 32))) == [13]
    # center on the corner of four cells: the half-open cell owns it
    assert _on(_rank((19, 9, 21, 11))) == [6]
    assert _on(_rank((39, 39, 41, 41))) == [15]  # at the border of the image


def test_rank_is_the_distance_to_the_center_with_ties_by_index():
    # center (20, 15): the two middle cells of the second row are nearest
    scores = _rank((0, 0, 40, 30))
    third = [1 / 9, 1 / 3.0, 1 / 4.0, 1 / 10]
    rows = [third, [1 / 7, 1.0, 1 / 2, 1 / 8], [1 / 11, 1 / 5.0, 1 / 6.0, 1 / 12], [0.0] * 4]
    torch.testing.assert_close(scores, torch.tensor(rows))


def test_boxes_share_the_top_fairly_however_large():
    scores = _rank((0, 0, 30, 40), (30, 30, 40, 40)).flatten()
    top = scores.argsort(descending=True, stable=True)
    assert sorted(scores[scores > 0].tolist(), reverse=True)[:3] == [1.0, 1.0, 0.5]
    assert 15 in top[:2].tolist()


def test_a_token_on_two_boxes_keeps_its_better_rank():
    scores = _rank((0, 0, 40, 10), (0, 0, 10, 10))
    assert scores[0, 0] == 1.0


def test_grid_is_stretched_over_a_rectangular_image():
    assert _on(_rank((100, 0, 200, 25), grid=(2, 4), size=(200, 50))) == [2, 3]


def test_the_region_belongs_to_the_last_image():
    sample = _sample((10, 10, 20, 20), sizes=((40, 40), (20, 20)))
    scores = region_rank([sample, _sample((0, 0, 10, 10))], [[[(4, 4)], [(2, 2)]], [[(4, 4)]]], 24)
    # the last quarter of the small image; of the large one it would be the first
    assert _on(scores[0]) == [19]
    assert _on(scores[1]) == [0]
    assert scores.shape == (2, 24)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        region_rank([_sample()], [], 4)
