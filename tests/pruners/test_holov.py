"""Against a plain reading of docs/baselines.md#holov (HoloV), one chunk and one token at a time."""

import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.sizes import GRIDS

from tprl.budget import budget
from tprl.pruners.holov import HoloVPruner
from tprl.types import Encoded

RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]


def _by_hand(
    attention: list[float],
    features: list[list[float]],
    k: int,
    alpha=0.09,
    chunks=16,
    published=False,
):
    n = len(attention)
    parts = [list(range(c * n // chunks, (c + 1) * n // chunks)) for c in range(chunks)]
    unit = [[x / math.hypot(*row) for x in row] for row in features]
    score, means = [0.0] * n, []
    for part in parts:
        spread = []
        for i in part:
            cosines = [
                0.0 if i == j else sum(x * y for x, y in zip(unit[i], unit[j], strict=True))
                for j in part
            ]
            others = max(len(part) - 1, 1)
            middle = sum(cosines) / others
            spread.append(sum((x - middle) ** 2 for x in cosines) / others)
        average = sum(1000 * attention[i] for i in part) / max(len(part), 1)
        for i, v in zip(part, spread, strict=True):
            level = sum(spread) / len(part)
            score[i] = 1000 * attention[i] + alpha * average * (v / level if level > 1e-12 else 1.0)
        means.append(sum(score[i] for i in part) / len(part) if part else -1.0)
    total = sum(max(m, 0) for m in means)
    quotas = [math.floor(max(m, 0) / total * k) for m in means]
    for c in sorted(range(chunks), key=lambda c: (-means[c], c))[: k - sum(quotas)]:
        quotas[c] += 1
    chosen = [
        i
        for c, part in enumerate(parts)
        for i in sorted(part, key=lambda i: (-attention[i], i))[: quotas[c]]
    ]
    if not published:
        remainder = sorted(set(range(n)) - set(chosen), key=lambda i: (-score[i], i))
        chosen += remainder[: k - len(chosen)]
    return sorted(chosen)


def _encoded(grids=RAGGED, peak: int = 1, **options) -> Encoded:
    """`peak` raises attention to a power: the larger, the fewer tokens hold it."""
    encoded = toy_encoded(grids, extras=["cls_attention"], **options)
    raised = encoded.extras["cls_attention"].pow(peak)
    encoded.extras["cls_attention"] = raised / raised.sum(1, keepdim=True).clamp(min=1e-30)
    return encoded


def _check(encoded: Encoded, ratio: float, **options) -> None:
    keep = HoloVPruner(**options).select(encoded, ratio).keep
    for b, grids in enumerate(encoded.grids):
        for i, ((rows, columns),) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            attention = encoded.extras["cls_attention"][b, members].tolist()
            features = encoded.visual[b, members].tolist()
            expected = _by_hand(attention, features, budget(ratio, rows * columns), **options)
            assert keep[b, members].nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("peak", [1, 4])
@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_equals_the_naive_loop(side, k, peak, published):
    _check(_encoded([((side, side),)] * 2, peak=peak), k / side**2, published=published)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 0.0}, {"chunks": 5}, {"chunks": 1}])
def test_options(options):
    _check(_encoded([((12, 12),)], peak=4), 1 / 3, **options)


@pytest.mark.parametrize("options", [{}, {"published": True}, {"alpha": 1.0}])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_image_of_a_ragged_batch(ratio, options):
    # 144, 54, 16 and 35 tokens, and 6: chunks of unequal length, and empty ones
    _check(_encoded([*RAGGED, ((2, 3),)], peak=3), ratio, **options)


def test_a_chunk_of_one_token_has_the_variance_of_the_others():
    _check(_encoded([((4, 5),), ((4, 6),), ((3, 9),)], peak=2), 1 / 2, alpha=1.0, published=True)


@pytest.mark.parametrize("ratio", RATIOS)
def test_budget_is_exact_however_peaked_attention_is(ratio):
    for peak in (0, 1, 8, 40):
        count = HoloVPruner().select(_encoded(peak=peak), ratio).count
        assert count.tolist() == [sum(budget(ratio, r * c) for r, c in grids) for grids in RAGGED]


def test_quotas_follow_the_chunks_shares_of_attention():
    # 64 tokens, chunks of 4 that hold 22, 10, 2, 2, ... of 60 parts; k = 20 gives floor(7.33),
    # floor(3.33), floor(.67) each, and the 10 that are left go to the first 10 chunks by weight.
    # The first chunk has only 4 tokens.
    encoded = _encoded([((8, 8),)])
    parts = torch.tensor([22.0, 10.0] + [2.0] * 14)
    within = torch.tensor([0.1, 0.2, 0.3, 0.4])
    encoded.extras["cls_attention"][0] = (parts.unsqueeze(1) * within / 60).flatten()
    published = HoloVPruner(published=True).select(encoded, 20 / 64).keep[0].unflatten(0, (16, 4))
    # 8 + 4 + 8 x 1 = 20: four places are lost
    assert published.sum(1).tolist() == [4, 4] + [1] * 8 + [0] * 6
    assert published[2].tolist() == [False, False, False, True]
    full = HoloVPruner(alpha=0.0).select(encoded, 20 / 64).keep[0].unflatten(0, (16, 4))
    # to the best of the others: the 0.4 of four more chunks
    assert full.sum(1).tolist() == [4, 4] + [1] * 12 + [0] * 2


def _with_other_features(encoded: Encoded, seed: int) -> Encoded:
    other = torch.randn(encoded.embeds.shape, generator=torch.Generator().manual_seed(seed)).exp()
    return replace(encoded, embeds=other)


@pytest.mark.parametrize("alpha", [0.09, 1.0])
def test_the_variance_cancels_in_the_quotas(alpha):
    pruner = HoloVPruner(alpha=alpha, published=True)
    for ratio in RATIOS:
        keep = pruner.select(_encoded(peak=3), ratio).keep
        assert torch.equal(
            pruner.select(_with_other_features(_encoded(peak=3), 1), ratio).keep, keep
        )


def test_the_variance_decides_what_a_full_chunk_leaves():
    pruner = HoloVPruner(alpha=1.0)
    item, other = (
        pruner.select(_with_other_features(_encoded(peak=6), seed), 1 / 3).keep for seed in (1, 2)
    )
    assert not torch.equal(item, other)


def test_ties_go_to_the_lower_index_and_the_earlier_chunk():
    encoded = _encoded([((8, 8),)], peak=0)
    keep = HoloVPruner(published=True).select(encoded, 20 / 64).keep[0].unflatten(0, (16, 4))
    assert keep.int().tolist() == [[1, 1, 0, 0]] * 4 + [[1, 0, 0, 0]] * 12


@pytest.mark.parametrize(
    ("chunks", "k", "quotas"),
    [
        (16, 48, [3] * 16),
        (12, 48, [4] * 12),
        (12, 36, [3] * 12),
        (12, 40, [4] * 4 + [3] * 8),
        (16, 50, [4] * 2 + [3] * 14),
    ],
)
def test_equal_chunks_get_equal_quotas_whatever_the_features(chunks, k, quotas):
    encoded, pruner = (
        _encoded([((12, 12),), ((5, 7),)], peak=0),
        HoloVPruner(alpha=1.0, chunks=chunks, published=True),
    )
    for seed in range(20):
        keep = pruner.select(_with_other_features(encoded, seed), k / 144).keep[0]
        assert keep.unflatten(0, (chunks, -1)).sum(1).tolist() == quotas


def test_a_whole_share_is_not_rounded_down():
    encoded = _encoded([((12, 12),)])
    # exact
    encoded.extras["cls_attention"][0] = torch.tensor([7.0, 1.0, 1.0]).repeat_interleave(48) / 512
    keep = HoloVPruner(chunks=3, published=True).select(encoded, 9 / 144).keep[0]
    assert keep.unflatten(0, (3, 48)).sum(1).tolist() == [7, 1, 1]


@pytest.mark.parametrize("published", [False, True])
def test_an_image_without_attention_keeps_its_first_tokens(published):
    encoded = _encoded([((2, 3),)])
    encoded.extras["cls_attention"].zero_()
    keep = HoloVPruner(published=published).select(encoded, 0.5).keep[0]
    assert keep.int().tolist() == [1, 1, 1, 0, 0, 0]
