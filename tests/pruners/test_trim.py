"""Against a plain reading of docs/baselines.md#trim (TRIM), one image and one token at a time."""

import math
from dataclasses import replace
from statistics import quantiles

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.sizes import GRIDS

from tprl.budget import budget
from tprl.pruners.trim import TrimPruner
from tprl.splice import splice
from tprl.types import Encoded, TokenSelection

RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]


def _by_hand(
    relevance: list[float], tokens: list[list[float]], kept: int, mean: bool, sign: int = -1
):
    """Kept indices, and the mean of the others with the last of them (None without a mean)."""
    order = sorted(range(len(relevance)), key=lambda v: (-sign * relevance[v], v))
    remainder = sorted(order[kept:])
    if not mean:
        return sorted(order[:kept]), None, None
    average = [sum(tokens[v][d] for v in remainder) / len(remainder) for d in range(len(tokens[0]))]
    return sorted(order[:kept]), average, remainder[-1]


def _share_by_hand(relevance: list[float], sign: int = -1) -> int:
    weights = [math.exp(sign * x) for x in relevance]
    weights = [w / sum(weights) for w in weights]
    first, _, third = quantiles(weights, n=4, method="inclusive")
    return sum(w > third + 1.5 * (third - first) for w in weights)


def _encoded(grids=RAGGED, **options) -> Encoded:
    return toy_encoded(grids, extras=["clip_relevance"], **options)


def _images(encoded: Encoded):
    for b, grids in enumerate(encoded.grids):
        for i in range(len(grids)):
            yield b, i, (encoded.visual_mask[b] & (encoded.image_of[b] == i)).nonzero().squeeze(1)


def _check(
    encoded: Encoded, selection: TokenSelection, counts: list[tuple[int, bool]], sign: int = -1
) -> None:
    """`counts`: kept tokens and whether there is a mean, per image."""
    assert selection.extra is not None
    assert selection.extra_at is not None
    assert selection.extra_mask is not None
    live = [0] * len(encoded)  # means of a sample follow each other
    for (b, _, members), (kept, mean) in zip(_images(encoded), counts, strict=True):
        relevance, tokens = (
            encoded.extras["clip_relevance"][b, members].tolist(),
            encoded.visual[b, members].tolist(),
        )
        expected, average, last = _by_hand(relevance, tokens, kept, mean, sign)
        assert selection.keep[b, members].nonzero().squeeze(1).tolist() == expected
        if average is not None:
            torch.testing.assert_close(
                selection.extra[b, live[b]], torch.tensor(average), atol=1e-5, rtol=0
            )
            assert selection.extra_at[b, live[b]] == members[last]
        live[b] += mean
    assert selection.extra_mask.sum(1).tolist() == live


def _exact(encoded: Encoded, ratio: float) -> list[tuple[int, bool]]:
    counts = []
    for _, _, members in _images(encoded):
        n, k = len(members), budget(ratio, len(members))
        mean = 1 < k < n
        counts.append((k - mean, mean))
    return counts


@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_equals_the_naive_loop(side, k):
    encoded = _encoded([((side, side),)] * 2)
    selection = TrimPruner().select(encoded, k / side**2)
    _check(encoded, selection, [(k - 1, True)] * 2)
    assert selection.count.tolist() == [k, k]


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_image_of_a_ragged_batch(ratio):
    encoded = _encoded()
    selection = TrimPruner().select(encoded, ratio)
    _check(encoded, selection, _exact(encoded, ratio))
    assert selection.count.tolist() == [
        sum(budget(ratio, r * c) for r, c in grids) for grids in RAGGED
    ]


def test_one_token_is_the_best_alone_and_all_need_no_mean():
    encoded = _encoded([((2, 3),)])
    encoded.extras["clip_relevance"][0] = torch.tensor([0.4, 0.2, -0.1, 0.3, 0.0, 0.1])
    alone, pair, five, all_ = (TrimPruner().select(encoded, k / 6) for k in (1, 2, 5, 6))
    assert [x.keep[0].int().tolist() for x in (alone, pair, five, all_)] == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert [x.count.item() for x in (alone, pair, five, all_)] == [1, 2, 5, 6]
    assert five.extra is not None
    torch.testing.assert_close(five.extra[0, 0], encoded.visual[0, [0, 3]].mean(0))
    highest = TrimPruner(negative_relevance=False).select(encoded, 1 / 6)
    assert highest.keep[0].int().tolist() == [1, 0, 0, 0, 0, 0]
    assert TrimPruner().reads_question


def test_the_mean_enters_the_prompt_where_the_last_dropped_token_stood():
    encoded = _encoded([((2, 3),)])
    # keeps 2 and 5
    encoded.extras["clip_relevance"][0] = torch.tensor([0.4, 0.2, 0.1, 0.3, 0.5, 0.0])
    prompt = splice(encoded, TrimPruner().select(encoded, 0.5))
    first = int(encoded.visual_at[0, 0])
    assert prompt.positions[0, 0, prompt.visual[0]].tolist() == [first + 2, first + 4, first + 5]
    torch.testing.assert_close(
        prompt.embeds[0, prompt.visual[0]][1], encoded.visual[0, [0, 1, 3, 4]].mean(0)
    )


@pytest.mark.parametrize("ratio", [1.0, 1 / 3, 0.29, 1 / 18])
@pytest.mark.parametrize("sign", [-1, 1])
def test_published_keeps_one_more(ratio, sign):
    encoded = _encoded()
    counts = [(int(len(members) * ratio), ratio < 1) for _, _, members in _images(encoded)]
    _check(encoded, TrimPruner(sign < 0, published=True).select(encoded, ratio), counts, sign)


@pytest.mark.parametrize("sign", [-1, 1])
def test_published_without_a_ratio_keeps_the_outliers(sign):
    encoded = _encoded([((12, 12),), ((6, 9),), ((4, 4), (5, 7)), ((1, 1), (1, 2))])
    encoded.extras["clip_relevance"] *= (
        4 * encoded.extras["clip_relevance"].square() * (1 + encoded.image_of)
    )
    counts = [
        _share_by_hand(encoded.extras["clip_relevance"][b, members].tolist(), sign)
        if len(members) > 1
        else 0
        for b, _, members in _images(encoded)
    ]
    assert sum(counts) > 6
    assert 0 in counts
    _check(
        encoded,
        TrimPruner(sign < 0, published=True).select(encoded, None),
        [(c, True) for c in counts],
        sign,
    )


def test_ties_go_to_the_lower_index():
    encoded = _encoded([((4, 4),)])
    encoded.extras["clip_relevance"].fill_(0.3)
    selection = TrimPruner().select(encoded, 0.25)
    assert selection.keep[0].nonzero().squeeze(1).tolist() == [0, 1, 2]


def test_dtype_of_the_model_is_kept():
    encoded = _encoded([((4, 4),)])
    selection = TrimPruner().select(replace(encoded, embeds=encoded.embeds.bfloat16()), 0.5)
    assert selection.extra is not None
    assert selection.extra.dtype == torch.bfloat16
