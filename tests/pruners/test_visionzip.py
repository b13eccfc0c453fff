"""Against a plain reading of docs/baselines.md#visionzip, one image and one token at a time."""

import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, merged_and_extra, toy_encoded

from tprl.errors import UserError
from tprl.pruners.visionzip import VisionZipPruner
from tprl.splice import splice
from tprl.types import Encoded, TokenSelection

EXTRAS = VisionZipPruner.extras
RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]


def _by_hand(attention, keys, features, k: int, t: int) -> tuple[list[int], dict[int, list[float]]]:
    """Dominant patches, and the features of each contextual token by its target."""
    order = sorted(range(len(attention)), key=lambda v: (-attention[v], v))
    dominant = sorted(order[: k - t - 1])
    remainder = [v for v in range(len(attention)) if v not in dominant]
    targets = remainder[:: max(1, len(remainder) // t)][:t] if t else []
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for v in remainder:
        if v not in joined and targets:
            joined[max(targets, key=lambda target: _cosine(keys[v], keys[target]))].append(
                v
            )  # max: the first of equals
    result = {}
    for target, others in joined.items():
        mean = [
            sum(features[v][c] for v in others) / max(1, len(others))
            for c in range(len(features[0]))
        ]
        result[target] = [h + m for h, m in zip(features[target], mean, strict=True)]
    return dominant, result


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def _check(encoded: Encoded, selection: TokenSelection, b: int, k: int, t: int) -> None:
    """Sample b, of one image."""
    n = int(encoded.visual_mask[b].sum())
    attention, keys, h = (
        encoded.extras[x][b, :n].tolist()
        for x in ("cls_attention", "vision_keys", "vision_features")
    )
    dominant, result = _by_hand(attention, keys, h, k, t)
    merged, extra, extra_at, extra_mask = merged_and_extra(selection)
    assert selection.keep[b].nonzero().squeeze(1).tolist() == sorted([*dominant, *result])
    assert torch.equal(merged[b, dominant], encoded.visual[b, dominant])
    assert encoded.project is not None
    expected = encoded.project(
        torch.tensor([result[v] for v in sorted(result)]).reshape(len(result), len(h[0]))
    )
    torch.testing.assert_close(merged[b, sorted(result)], expected, rtol=1e-5, atol=1e-5)
    assert extra_mask[b].sum() == 1
    cls = encoded.project(encoded.extras["cls_feature"][b, :1])
    torch.testing.assert_close(extra[b, extra_mask[b]], cls, rtol=1e-5, atol=1e-5)
    assert extra_at[b, 0] == min(set(range(n)) - set(dominant) - set(result))
    assert selection.count[b] == k


@pytest.mark.parametrize(
    ("side", "k", "t"),
    [(12, 48, 8), (12, 32, 5), (12, 16, 3), (24, 192, 30), (24, 128, 20), (24, 64, 10)],
)
@pytest.mark.parametrize("published", [False, True])
def test_equals_the_naive_loop(side, k, t, published):
    encoded = toy_encoded([((side, side),)] * 3, extras=EXTRAS)
    selection = VisionZipPruner(published).select(encoded, k / side**2)
    for b in range(3):
        _check(encoded, selection, b, k, t)


@pytest.mark.parametrize(
    ("k", "t"),
    [(1, 0), (2, 1), (3, 1), (9, 1), (10, 2), (22, 3), (23, 4), (72, 11), (142, 22), (143, 22)],
)
def test_small_large_and_halved_budgets(k, t):
    encoded = toy_encoded([((12, 12),)] * 2, extras=EXTRAS)
    selection = VisionZipPruner().select(encoded, k / 144)
    for b in range(2):
        _check(encoded, selection, b, k, t)


def _hand_made() -> Encoded:
    """Eight patches with the unit vectors as features; the sixth and the second matter; no
    projector in between."""
    encoded = toy_encoded([((2, 4),)], width=24, extras=EXTRAS)
    encoded.extras["cls_attention"][0] = torch.tensor(
        [0.01, 0.2, 0.05, 0.02, 0.03, 0.6, 0.05, 0.04]
    )
    encoded.extras["vision_features"][0] = torch.eye(24)[:8]
    return replace(encoded, project=lambda features: features)


def test_the_cls_token_counts_and_a_target_is_added_to_the_mean_of_those_that_joined():
    encoded = _hand_made()
    # 4 tokens: CLS, patches 1 and 5, and all others in patch 0
    selection = VisionZipPruner().select(encoded, 0.5)
    merged, extra, extra_at, _ = merged_and_extra(selection)
    assert selection.keep[0].int().tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    assert selection.count.tolist() == [4]
    expected = torch.tensor([1, 0, 0.2, 0.2, 0.2, 0, 0.2, 0.2])  # not halved
    torch.testing.assert_close(merged[0, 0, :8], expected)
    assert torch.equal(extra[0, 0], encoded.extras["cls_feature"][0, 0])
    assert extra_at.tolist() == [[2]]


def test_a_patch_joins_the_target_with_the_most_similar_key_and_the_first_of_equals():
    encoded = toy_encoded([((2, 8),)], width=24, extras=EXTRAS)
    encoded.extras["cls_attention"][0] = torch.arange(16, 0, -1) / 136
    encoded.extras["vision_features"][0] = torch.eye(24)[:16]
    # 10 tokens: CLS, patches 0-6, targets 7 and 11 (every fourth of the nine others).
    keys = torch.zeros(16, 8)
    keys[7, 0], keys[11, 1] = 1, 5
    keys[[8, 12], 0] = torch.tensor([0.1, 7.0])  # like 7, whatever their lengths
    keys[13], keys[14] = (
        torch.tensor([1.0, 2, 0, 0, 0, 0, 0, 0]),
        torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]),
    )
    keys[[9, 10, 15], 1] = -1.0  # 0 with 7, -1 with 11
    encoded.extras["vision_keys"][0] = keys
    selection = VisionZipPruner().select(
        replace(encoded, project=lambda features: features), 10 / 16
    )
    merged, *_ = merged_and_extra(selection)
    assert selection.keep[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 11]
    first, other = torch.eye(24)[7], torch.eye(24)[11]
    first[[8, 9, 10, 12, 14, 15]], other[13] = 1 / 6, 1  # 14 is as near to both
    torch.testing.assert_close(merged[0, [7, 11]], torch.stack([first, other]))


def test_equal_attention_keeps_the_first_patches():
    encoded = _hand_made()
    encoded.extras["cls_attention"][0] = 0.125
    assert VisionZipPruner().select(encoded, 0.5).keep[0].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_nothing_to_prune_is_the_identity_unless_published():
    encoded = _hand_made()
    ours, published_selection = (
        VisionZipPruner(published).select(encoded, 1.0) for published in (False, True)
    )
    assert torch.equal(splice(encoded, ours).embeds, encoded.embeds)
    _check(encoded, published_selection, 0, 8, 1)
    assert published_selection.count.tolist() == ours.count.tolist() == [8]
    assert not torch.equal(splice(encoded, published_selection).embeds, encoded.embeds)


def test_dominant_patches_reach_the_language_model_bit_by_bit():
    encoded = toy_encoded([((12, 12),)], extras=EXTRAS)
    encoded = replace(encoded, embeds=encoded.embeds.bfloat16(), project=lambda x: x[..., :16] * 3)
    prompt = splice(encoded, VisionZipPruner().select(encoded, 1 / 9))
    assert prompt.embeds.dtype == torch.bfloat16
    top = encoded.extras["cls_attention"][0].topk(12).indices  # 16 less CLS and 3
    for v in top.tolist():
        column = (prompt.positions[0, 0] == encoded.visual_at[0, v]).nonzero().squeeze(1)
        assert torch.equal(prompt.embeds[0, column], encoded.visual[0, [v]])


def test_two_images_of_a_sample_have_their_own_cls_tokens():
    encoded = toy_encoded(RAGGED, extras=EXTRAS)
    _, extra, extra_at, extra_mask = merged_and_extra(VisionZipPruner().select(encoded, 1 / 3))
    assert extra_mask.tolist() == [[True, False], [True, False], [True, True]]
    assert encoded.image_of[2, extra_at[2]].tolist() == [0, 1]
    assert encoded.project is not None
    torch.testing.assert_close(extra[2], encoded.project(encoded.extras["cls_feature"][2, [0, 16]]))


def test_without_a_projector_is_a_user_error():
    with pytest.raises(UserError, match="projector"):
        VisionZipPruner().select(replace(toy_encoded(extras=EXTRAS), project=None), 0.5)
