import math

import pytest
import torch
from tests.helpers import toy_encoded
from torch.nn.functional import adaptive_avg_pool2d

from tprl.pruners.pooling import PoolingPruner
from tprl.splice import splice


@pytest.mark.parametrize(
    ("side", "down", "across"),
    [(12, 8, 6), (12, 8, 4), (12, 4, 4), (24, 12, 12), (24, 16, 12), (24, 16, 8), (24, 8, 8)],
)
def test_grids_equal_the_naive_loop_and_adaptive_average_pooling(side, down, across):
    encoded = toy_encoded([((side, side),)] * 2, width=6)
    selection = PoolingPruner().select(encoded, down * across / side**2)
    assert selection.extra is not None
    assert not selection.keep.any()
    for b, tokens in enumerate(encoded.visual.tolist()):
        expected = []
        for i in range(down):
            for j in range(across):
                top, left = i * side // down, j * side // across
                bottom, right = math.ceil((i + 1) * side / down), math.ceil((j + 1) * side / across)
                window = [
                    tokens[r * side + c] for r in range(top, bottom) for c in range(left, right)
                ]
                expected.append([sum(column) / len(window) for column in zip(*window, strict=True)])
        torch.testing.assert_close(selection.extra[b], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    pooled = adaptive_avg_pool2d(
        encoded.visual.transpose(1, 2).unflatten(2, (side, side)), (down, across)
    ).flatten(2)
    torch.testing.assert_close(selection.extra, pooled.transpose(1, 2))


def test_two_images_are_pooled_apart_and_stand_at_their_windows_centers():
    encoded = toy_encoded([((2, 2), (4, 4)), ((4, 4),)])
    selection = PoolingPruner().select(encoded, 5 / 16)  # 1 of 4 and 5 of 16; 5 of 16
    extra = selection.extra
    assert extra is not None
    assert selection.extra_mask is not None
    assert selection.extra_at is not None
    assert selection.extra_mask.tolist() == [[True] * 6, [True] * 5 + [False]]
    corners = [
        (0, 0),
        (0, 2),
        (2, 0),
        (2, 1),
        (2, 2),
    ]  # of the five 2 x 2 windows on 4 x 4, see tests/pruners/test_grid.py
    for b, start in ((0, 4), (1, 0)):
        image = encoded.visual[b, start : start + 16].unflatten(0, (4, 4))
        mean = torch.stack([image[r : r + 2, c : c + 2].mean((0, 1)) for r, c in corners])
        torch.testing.assert_close(extra[b, 1 - b : 6 - b], mean)
    torch.testing.assert_close(extra[0, 0], encoded.visual[0, :4].mean(0))
    assert selection.extra_at[0].tolist() == [3, *(4 + cell for cell in (5, 7, 12, 14, 15))]
    assert selection.extra_at[1, :5].tolist() == [5, 7, 12, 14, 15]


def test_pooled_tokens_take_their_centers_positions():
    encoded = toy_encoded([((12, 12),)])
    prompt = splice(encoded, PoolingPruner().select(encoded, 1 / 9))
    at = encoded.positions[0, 0].gather(0, encoded.visual_at[0])
    center = [r * 12 + c for r in (1, 4, 7, 10) for c in (1, 4, 7, 10)]
    assert prompt.positions[0, 0, prompt.visual[0]].tolist() == at[center].tolist()


def test_dtype_of_the_model_is_kept():
    encoded = toy_encoded([((4, 4),)])
    half = PoolingPruner().select(
        type(encoded)(**{**vars(encoded), "embeds": encoded.embeds.bfloat16()}), 0.25
    )
    assert half.extra is not None
    assert half.extra.dtype == torch.bfloat16
