import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import (
    budget,
    budgets,
    check_keep_ratio,
    image_rows,
    keep_top,
    keep_top_per_image,
    need_ratio,
    view_rows,
)
from tprl.errors import UserError


@pytest.mark.parametrize(
    ("ratio", "n", "kept"),
    [
        (1.0, 576, 576),
        (1 / 3, 576, 192),
        (2 / 9, 576, 128),
        (1 / 9, 576, 64),
        (0.333, 576, 192),
        (0.222, 576, 128),
        (0.111, 576, 64),
        (1 / 9, 144, 16),
        (1 / 18, 144, 8),
        (0.5, 5, 3),  # half up, not banker's rounding (which gives 2)
        (0.5, 3, 2),
        (0.1, 4, 1),  # 0.4 rounds to 0, at least one token lives
        (1e-9, 1000, 1),
        (0.5, 0, 0),  # no image, no token
    ],
)
def test_budget_literals(ratio, n, kept):
    assert budget(ratio, n) == kept


@pytest.mark.parametrize("good", [1, 1.0, "0.5", 1e-9])
def test_good_ratios_become_floats(good):
    assert check_keep_ratio(good) == float(good)


@pytest.mark.parametrize("bad", [0, -0.1, 1.7, "a", None, math.nan, math.inf, [0.5]])
def test_bad_ratio_is_one_sentence_that_names_the_value(bad):
    with pytest.raises(UserError) as error:
        check_keep_ratio(bad)
    assert str(bad) in str(error.value)
    assert "(0, 1]" in str(error.value)
    assert "\n" not in str(error.value)


def test_need_ratio():
    assert need_ratio("uniform", 0.5) == 0.5
    with pytest.raises(UserError, match=r"uniform needs a keep_ratio .*got None"):
        need_ratio("uniform", None)
    with pytest.raises(UserError, match=r"keep_ratio .*got 2"):
        need_ratio("uniform", 2.0)


def test_budgets_count_valid_tokens_only():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    assert budgets(0.5, mask).tolist() == [2, 3, 0]
    empty = budgets(0.5, mask[:0])
    assert empty.shape == (0,)
    assert empty.dtype == torch.long


def test_keep_top_breaks_ties_by_lower_index_and_never_keeps_padding():
    scores = torch.tensor([[1.0, 3.0, 3.0, 9.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert keep_top(scores, mask, torch.tensor([2, 3])).int().tolist() == [
        [0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    assert keep_top(scores, mask, torch.tensor([5, 0])).int().tolist() == [
        [1, 1, 1, 0, 1],
        [0, 0, 0, 0, 0],
    ]


def test_image_rows_round_trip():
    encoded = toy_encoded(RAGGED)
    images = image_rows(encoded.visual_mask, encoded.image_of)
    assert images.sample.tolist() == [0, 1, 2, 2]
    assert images.mask.sum(1).tolist() == [144, 54, 16, 35]
    assert images.at[3, :35].tolist() == list(range(16, 51))
    tokens = images.split(encoded.visual)
    assert torch.equal(tokens[3, :35], encoded.visual[2, 16:51])
    assert torch.equal(images.join(images.mask, encoded.visual_mask), encoded.visual_mask)
    assert not images.join(~images.mask, encoded.visual_mask).any()


def test_image_rows_of_prompts_without_images():
    encoded = toy_encoded([(), ((2, 3),), ()])
    assert image_rows(encoded.visual_mask, encoded.image_of).sample.tolist() == [1]
    encoded = toy_encoded([(), ()])
    nothing = image_rows(encoded.visual_mask, encoded.image_of)
    assert nothing.at.shape == (0, 0)
    assert nothing.budgets(0.5).tolist() == []


def test_budget_is_per_image():
    encoded = toy_encoded([((2, 2), (3, 4))])
    scores = torch.arange(16.0).unsqueeze(0)  # the second image outscores the first everywhere
    keep = keep_top_per_image(scores, encoded, 0.5)
    assert keep[0].nonzero().squeeze(1).tolist() == [2, 3, 10, 11, 12, 13, 14, 15]


def test_grid_that_is_not_the_token_count_is_refused():
    encoded = replace(toy_encoded([((2, 2),)]), grids=((((2, 3),),),))
    with pytest.raises(ValueError, match="4 visual tokens on a grid of 2 x 3"):
        view_rows(encoded, 0.5)


def test_views_share_the_budget_of_their_image():
    encoded = toy_encoded([((5, 5),), ((4, 4),)])
    # 25 tokens: a small view and a crop
    encoded = replace(encoded, grids=((((2, 2), (3, 7)),), (((4, 4),),)))
    views, shapes = view_rows(encoded, 0.28)
    assert shapes == ((2, 2, 1), (3, 7, 6), (4, 4, 4))
    assert views.sample.tolist() == [0, 0, 1]
    assert views.mask.sum(1).tolist() == [4, 21, 16]
    assert views.at[1, :21].tolist() == list(range(4, 25))
    assert view_rows(encoded, 0.04)[1] == ((2, 2, 0), (3, 7, 1), (4, 4, 1))
