import pytest
import torch
from tests.helpers import toy_encoded
from torch.nn.functional import adaptive_avg_pool2d

from tprl.pruners.pooling import PoolingPruner
from tprl.splice import splice


@pytest.mark.parametrize(("ratio", "shape"), [(1 / 4, (12, 12)), (1 / 3, (16, 12)), (2 / 9, (16, 8)), (1 / 9, (8, 8))])
def test_grids_equal_adaptive_average_pooling(ratio, shape):
    encoded = toy_encoded([((24, 24),)])
    selection = PoolingPruner().select(encoded, ratio)
    expected = adaptive_avg_pool2d(encoded.visual.transpose(1, 2).unflatten(2, (24, 24)), shape).flatten(2)
    assert selection.extra is not None
    torch.testing.assert_close(selection.extra, expected.transpose(1, 2))
    assert not selection.keep.any()


def test_two_images_are_pooled_apart_and_stand_at_their_windows_centres():
    encoded = toy_encoded([((2, 2), (4, 4)), ((4, 4),)])
    selection = PoolingPruner().select(encoded, 5 / 16)  # 1 of 4 and 5 of 16; 5 of 16
    extra = selection.extra
    assert extra is not None
    assert selection.extra_mask is not None
    assert selection.extra_at is not None
    assert selection.extra_mask.tolist() == [[True] * 6, [True] * 5 + [False]]
    corners = [(0, 0), (0, 2), (2, 0), (2, 1), (2, 2)]  # of the five 2 x 2 windows on 4 x 4, see tests/test_grid.py
    for b, start in ((0, 4), (1, 0)):
        image = encoded.visual[b, start : start + 16].unflatten(0, (4, 4))
        mean = torch.stack([image[r : r + 2, c : c + 2].mean((0, 1)) for r, c in corners])
        torch.testing.assert_close(extra[b, 1 - b : 6 - b], mean)
    torch.testing.assert_close(extra[0, 0], encoded.visual[0, :4].mean(0))
    assert selection.extra_at[0].tolist() == [3, *(4 + cell for cell in (5, 7, 12, 14, 15))]
    assert selection.extra_at[1, :5].tolist() == [5, 7, 12, 14, 15]


def test_pooled_tokens_take_their_centres_positions():
    encoded = toy_encoded([((12, 12),)])
    prompt = splice(encoded, PoolingPruner().select(encoded, 1 / 9))
    at = encoded.positions[0, 0].gather(0, encoded.visual_at[0])
    centre = [r * 12 + c for r in (1, 4, 7, 10) for c in (1, 4, 7, 10)]
    assert prompt.positions[0, 0, prompt.visual[0]].tolist() == at[centre].tolist()


def test_dtype_of_the_model_is_kept():
    encoded = toy_encoded([((4, 4),)])
    half = PoolingPruner().select(type(encoded)(**{**vars(encoded), "embeds": encoded.embeds.bfloat16()}), 0.25)
    assert half.extra is not None
    assert half.extra.dtype == torch.bfloat16
