"""Against a plain reading of docs/baselines.md#prumerge, one image and one token at a time."""

import math
from dataclasses import replace
from statistics import quantiles

import pytest
import torch
from tests.helpers import RAGGED, merged_and_extra, toy_encoded
from tests.pruners.sizes import GRIDS

from tprl.errors import UserError
from tprl.pruners.prumerge import PruMergePlusPruner, PruMergePruner
from tprl.types import Encoded, TokenSelection

EXTRAS = PruMergePruner.extras
RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]
both = pytest.mark.parametrize("cls", [PruMergePruner, PruMergePlusPruner])


def _outliers(c: list[float]) -> int:
    q1, _, q3 = quantiles(c, n=4, method="inclusive")
    return sum(x > q3 + 1.5 * (q3 - q1) for x in c)


def _top(c: list[float], count: int) -> list[int]:
    return sorted(range(len(c)), key=lambda v: (-c[v], v))[:count]


def _published(c: list[float], plus: bool) -> list[int]:
    """As the rule is written, divisions included; these inputs have outliers."""
    n = len(c)
    ratio = _outliers(c) / n
    kept = _top(c, int(n * ratio))
    if plus:
        step = int(1 / ratio)
        kept += [v for v in range(0, n - 1, int(step / 3)) if v not in kept]
    return sorted(kept)


def _filled(c: list[float], plus: bool, count: int) -> list[int]:
    kept = _top(c, min(_outliers(c), count) if plus else count)
    remainder = [v for v in range(len(c)) if v not in kept]
    more = count - len(kept)
    return sorted(kept + [remainder[math.ceil(j * len(remainder) / more)] for j in range(more)])


def _merged(c, keys, h, kept: list[int]) -> tuple[list[list[float]], list[float]]:
    """The features of every kept token, and of the extra one."""
    unit = [[x / math.hypot(*row) for x in row] for row in keys]
    rows = []
    for i in kept:
        others = [j for j in range(len(c)) if j != i]
        others.sort(key=lambda j: -sum(a * b for a, b in zip(unit[i], unit[j], strict=True)))
        rows.append([h[i][x] + sum(c[j] * h[j][x] for j in others[:32]) for x in range(len(h[0]))])
    left = set(range(len(c))) - set(kept)
    return rows, [sum(c[j] * h[j][x] for j in left) for x in range(len(h[0]))]


def _check(encoded: Encoded, selection: TokenSelection, b: int, kept: list[int]) -> None:
    """Sample b, of one image, with an extra token."""
    n = int(encoded.visual_mask[b].sum())
    c, keys, h = (
        encoded.extras[x][b, :n].tolist()
        for x in ("last_cls_attention", "last_keys", "vision_features")
    )
    merged, extra, extra_at, extra_mask = merged_and_extra(selection)
    assert selection.keep[b].nonzero().squeeze(1).tolist() == kept
    assert encoded.project is not None
    rows, last = (encoded.project(torch.tensor(x)) for x in _merged(c, keys, h, kept))
    torch.testing.assert_close(merged[b, kept], rows, rtol=1e-5, atol=1e-5)
    assert extra_mask[b].sum() == 1
    torch.testing.assert_close(extra[b, 0], last, rtol=1e-5, atol=1e-5)
    assert extra_at[b, 0] == max(set(range(n)) - set(kept))


def _attention(encoded: Encoded, b: int = 0) -> list[float]:
    return encoded.extras["last_cls_attention"][b].tolist()


@both
@pytest.mark.parametrize(("side", "k"), GRIDS)
def test_exact_fill_equals_the_naive_loop(cls, side, k):
    encoded = toy_encoded([((side, side),)] * 2, extras=EXTRAS)
    selection = cls().select(encoded, k / side**2)
    for b in range(2):
        _check(
            encoded, selection, b, _filled(_attention(encoded, b), cls is PruMergePlusPruner, k - 1)
        )
    assert selection.count.tolist() == [k, k]


@both
@pytest.mark.parametrize(
    ("side", "seed"),
    [
        (12, 0),
        (12, 1),
        (12, 2),
        (24, 0),
        pytest.param(24, 1, marks=pytest.mark.slow),
        pytest.param(24, 2, marks=pytest.mark.slow),
    ],
)
def test_published_equals_the_naive_loop_and_ignores_the_ratio(cls, side, seed):
    encoded = toy_encoded([((side, side),)] * 2, extras=EXTRAS, seed=seed)
    selection = cls(published=True).select(encoded, None)
    for b in range(2):
        kept = _published(_attention(encoded, b), cls is PruMergePlusPruner)
        _check(encoded, selection, b, kept)
        assert selection.count[b] == len(kept) + 1
    again = cls(published=True).select(encoded, 1 / 3)
    for item, other in zip(
        (selection.keep, *merged_and_extra(selection)),
        (again.keep, *merged_and_extra(again)),
        strict=True,
    ):
        assert torch.equal(item, other)


@both
@pytest.mark.parametrize("k", [2, 3, 5, 14, 15, 71, 142, 143])
def test_small_and_large_budgets(cls, k):
    encoded = toy_encoded([((12, 12),)], extras=EXTRAS)
    kept = _filled(_attention(encoded), cls is PruMergePlusPruner, k - 1)
    _check(encoded, cls().select(encoded, k / 144), 0, kept)


def _hand_made(rows: int, columns: int, attention: torch.Tensor) -> Encoded:
    """Unit vectors as features and no projector in between: entry j of an embedding is the weight
    of token j."""
    n = rows * columns
    encoded = toy_encoded([((rows, columns),)], width=n, vision_width=n, extras=EXTRAS)
    encoded.extras["last_cls_attention"][0] = attention
    encoded.extras["vision_features"][0] = torch.eye(n)
    return replace(encoded, project=lambda features: features)


def test_weights_are_the_attention_itself_and_kept_tokens_are_neighbors_too():
    # sums to 0.9: the rest of it is on the CLS token
    c = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.02, 0.03])
    merged, extra, extra_at, _ = merged_and_extra(PruMergePruner().select(_hand_made(2, 3, c), 0.5))
    for i in (1, 3):  # fewer than 33 tokens: all others are neighbors
        expected = c.clone()
        expected[i] = 1
        torch.testing.assert_close(merged[0, i], expected)
    torch.testing.assert_close(extra[0, 0], c * torch.tensor([1, 0, 1, 0, 1, 1]))
    assert extra_at.tolist() == [[5]]


@pytest.mark.parametrize("equal", [False, True])
def test_thirty_two_neighbors_by_the_angle_of_keys_and_the_first_of_equals(equal):
    c = torch.full((40,), 0.01)
    c[20] = 0.5
    encoded = _hand_made(5, 8, c)
    angle = torch.zeros(40) if equal else (torch.arange(40) - 23) * 0.03
    length = 1 + torch.arange(40) % 3  # of the keys: only the angle counts
    encoded.extras["last_keys"][0] = 0
    encoded.extras["last_keys"][0, :, :2] = (
        torch.stack([angle.cos(), angle.sin()], 1) * length[:, None]
    )
    merged, *_ = merged_and_extra(PruMergePruner().select(encoded, 2 / 40))
    near = range(33) if equal else range(4, 37)  # 20 itself among them
    expected = torch.zeros(40)
    expected[list(near)] = 0.01
    expected[20] = 1
    torch.testing.assert_close(merged[0, 20], expected)


@both
def test_one_token_is_the_top_one_merged_without_an_extra(cls):
    c = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.02, 0.03])
    selection = cls().select(_hand_made(2, 3, c), 1 / 6)
    merged, _, _, extra_mask = merged_and_extra(selection)
    assert selection.keep[0].int().tolist() == [0, 1, 0, 0, 0, 0]
    assert not extra_mask.any()
    torch.testing.assert_close(merged[0, 1], torch.tensor([0.1, 1, 0.05, 0.3, 0.02, 0.03]))


@pytest.mark.parametrize(
    ("cls", "kept"), [(PruMergePruner, [0]), (PruMergePlusPruner, [0, 192, 384])]
)
def test_no_outlier_counts_as_one(cls, kept):
    encoded = toy_encoded([((24, 24),)], extras=EXTRAS)
    encoded.extras["last_cls_attention"][0] = 1 / 576
    selection = cls(published=True).select(encoded, None)
    assert selection.keep[0].nonzero().squeeze(1).tolist() == kept
    assert selection.count.tolist() == [len(kept) + 1]
    assert cls().select(encoded, 1 / 9).count.tolist() == [64]


@pytest.mark.parametrize(("last", "kept"), [(0.0, 575), (1.0, 576)])
def test_many_outliers_saturate_the_published_plus(last, kept):
    encoded = toy_encoded([((24, 24),)], extras=EXTRAS)
    c = encoded.extras["last_cls_attention"][0]
    c[:] = torch.rand(576, generator=torch.Generator().manual_seed(0))
    c[::5] += 100  # 115 outliers and perhaps the last token, more than a sixth: stride 1
    c[575] = 100 * last
    selection = PruMergePlusPruner(published=True).select(encoded, None)
    assert selection.keep.sum() == kept
    assert selection.keep[0, :575].all()
    assert selection.count.tolist() == [576]  # no extra token where nothing is left for it
    assert PruMergePruner(published=True).select(encoded, None).keep.sum() == 115 + last
    ours = PruMergePlusPruner().select(encoded, 1 / 9)
    assert ours.count.tolist() == [64]
    # outliers take all of the budget
    assert torch.equal(ours.keep, PruMergePruner().select(encoded, 1 / 9).keep)


@both
def test_images_too_small_for_a_stride(cls):
    encoded = toy_encoded([((1, 1),), ((1, 2),)], extras=EXTRAS)  # int(int(1 / ratio) / 3) is 0
    encoded.extras["last_cls_attention"][1] = torch.tensor([0.2, 0.6])
    selection = cls(published=True).select(encoded, None)
    plus = cls is PruMergePlusPruner
    assert selection.keep.int().tolist() == [[1, 0], [int(plus), 1]]
    assert selection.count.tolist() == [1, 2]


def test_the_count_truncates_as_written():
    encoded = toy_encoded([((7, 7),)], extras=EXTRAS)
    c = encoded.extras["last_cls_attention"][0]
    c[:] = torch.arange(49) / 49
    # 49 * (4 / 49) is just below 4, and 49 * (1 / 49) below 1
    for outliers, kept in ((1, 1), (3, 3), (4, 3)):
        c[49 - outliers :] = 9 + torch.arange(outliers)
        assert PruMergePruner(published=True).select(encoded, None).keep.sum() == kept


def test_spread_tokens_cover_the_raster():
    encoded = toy_encoded([((12, 12),)], extras=EXTRAS)
    encoded.extras["last_cls_attention"][0] = 0.001
    encoded.extras["last_cls_attention"][0, 100:110] = 0.5 + torch.arange(10) / 100
    # 10 outliers, then 14 of the 134 others
    keep = PruMergePlusPruner().select(encoded, 25 / 144).keep[0]
    others = [v for v in range(144) if not 100 <= v < 110]
    assert keep[100:110].all()
    assert (keep[others].nonzero().squeeze(1).diff() - 134 / 14).abs().max() < 1


@both
@pytest.mark.parametrize("published", [False, True])
def test_images_of_a_sample_do_not_see_each_other(cls, published):
    encoded = toy_encoded(RAGGED, extras=EXTRAS)
    both_images = cls(published).select(encoded, 1 / 3)
    for name in EXTRAS:
        encoded.extras[name][2, :16] = encoded.extras[name][2, :16].flip(0) * 3
    changed = cls(published).select(encoded, 1 / 3)
    merged, extra, *_ = merged_and_extra(both_images)
    other, other_extra, *_ = merged_and_extra(changed)
    assert torch.equal(both_images.keep[2, 16:], changed.keep[2, 16:])
    torch.testing.assert_close(merged[2, 16:], other[2, 16:])
    torch.testing.assert_close(extra[2, 1], other_extra[2, 1])
    assert not torch.allclose(extra[2, 0], other_extra[2, 0])


@both
def test_dtypes_of_the_model_are_kept(cls):
    encoded = toy_encoded([((12, 12),)], extras=EXTRAS)
    seen = []

    def project(features: torch.Tensor) -> torch.Tensor:
        seen.append(features.dtype)
        return features[..., :16]

    half = {name: value.bfloat16() for name, value in encoded.extras.items()}
    encoded = replace(encoded, embeds=encoded.embeds.bfloat16(), extras=half, project=project)
    merged, extra, *_ = merged_and_extra(cls().select(encoded, 1 / 9))
    assert seen == [torch.bfloat16]
    assert merged.dtype == extra.dtype == torch.bfloat16


@both
def test_without_a_projector_is_a_user_error(cls):
    with pytest.raises(UserError, match="projector"):
        cls().select(replace(toy_encoded(extras=EXTRAS), project=None), 0.5)
