"""Against a plain reading of docs/baselines.md#tome, one image, one block and one token at a time,
in float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import RAGGED, ToyBlock, toy_encoded, toy_tower
from torch.nn.functional import gelu

from tprl.budget import budget
from tprl.errors import UserError
from tprl.pruners.bipartite import clipped, merged_tower, schedule
from tprl.pruners.tome import ToMePruner
from tprl.types import Encoded, Tower

EXTRAS = ToMePruner.extras
# a token: x [C], the patches in it, and the patch at whose place it stands (-1: CLS)
Plain = dict[str, Any]


def _norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def _attended(
    tokens: list[Plain], block: Any, heads: int = 3
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every token after attention, in which a token of size s counts s times, and its key, mean
    over heads."""
    query, key, value = (
        [_norm(token["x"]) @ weight.double().numpy() for token in tokens]
        for weight in (block.query, block.key, block.value)
    )
    sizes, width = np.array([len(token["patches"]) for token in tokens]), len(query[0]) // heads
    keys, values, out = np.array(key), np.array(value), block.out.double().numpy()
    result = []
    for i, token in enumerate(tokens):
        mixed = []
        for part in (slice(h * width, (h + 1) * width) for h in range(heads)):
            weight = sizes * np.exp(keys[:, part] @ query[i][part] / width**0.5)
            mixed.append(weight @ values[:, part] / weight.sum())
        result.append(token["x"] + np.concatenate(mixed) @ out)
    return result, [item.reshape(heads, width).mean(0) for item in key]


def _merged(tokens: list[Plain], keys: list[np.ndarray], r: int) -> list[Plain]:
    unit = [key / np.linalg.norm(key) for key in keys]
    even, odd = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    best: dict[int, tuple[float, int]] = {}
    for i in even:
        if tokens[i]["place"] >= 0:
            likeness = [float(unit[i] @ unit[j]) for j in odd]
            best[i] = max(likeness), odd[likeness.index(max(likeness))]
    gone = sorted(best, key=lambda i: -best[i][0])[:r]  # sorted is stable: ties to the lower index
    groups = {j: [j, *(i for i in sorted(gone) if best[i][1] == j)] for j in odd}
    new = []
    for j, group in groups.items():
        patches = [patch for i in group for patch in tokens[i]["patches"]]
        total = sum(len(tokens[i]["patches"]) * tokens[i]["x"] for i in group)
        new.append({"x": total / len(patches), "patches": patches, "place": tokens[j]["place"]})
    return [tokens[i] for i in even if i not in gone] + new


def by_hand(patches: torch.Tensor, tower: Tower, plan: Sequence[int]) -> dict[int, np.ndarray]:
    """Features of the survivors, by place."""
    tokens: list[Plain] = [
        {"x": x, "patches": [p], "place": p} for p, x in enumerate(patches.double().numpy())
    ]
    if tower.cls is not None:
        tokens.insert(0, {"x": tower.cls.double().numpy(), "patches": [-1], "place": -1})
    for block, r in zip(tower.blocks, plan, strict=True):
        result, keys = _attended(tokens, block)
        tokens = [token | {"x": x} for token, x in zip(tokens, result, strict=True)]
        tokens = _merged(tokens, keys, r)
        for token in tokens:
            up, down = (weight.double() for weight in (block.up, block.down))  # type: ignore
            inner = gelu(torch.from_numpy(_norm(token["x"])) @ up)
            token["x"] = token["x"] + (inner @ down).numpy()
    assert sorted(p for token in tokens for p in token["patches"] if p >= 0) == list(
        range(len(patches))
    )
    return {token["place"]: token["x"] for token in tokens if token["place"] >= 0}


def plan_by_hand(n: int, k: int, blocks: int, has_cls: bool) -> list[int]:
    """Try every constant r from 0 on."""
    for r in range(n):
        left, plan = n + has_cls, []
        for _ in range(blocks):
            plan.append(min(r, (left - 1) // 2 if has_cls else left // 2, left - has_cls - k))
            left -= plan[-1]
        if left - has_cls == k:
            return plan
    raise AssertionError


def check(
    encoded: Encoded, pruner: ToMePruner, ratio: float | None, b: int, plan: Sequence[int]
) -> None:
    """Sample b, of one image."""
    selection, n = pruner.select(encoded, ratio), int(encoded.visual_mask[b].sum())
    assert encoded.tower is not None
    assert encoded.project is not None
    assert selection.merged is not None
    expected = by_hand(encoded.extras["patch_embeds"][b, :n], encoded.tower, plan)
    assert selection.keep[b].nonzero().squeeze(1).tolist() == sorted(expected)
    for place, x in expected.items():
        torch.testing.assert_close(
            selection.merged[b, place],
            encoded.project(torch.from_numpy(x).float()),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("ratio", [1 / 3, 1 / 9, 1 / 18])
@pytest.mark.parametrize("side", [12, 24])
def test_indices_and_values_are_those_of_plain_loops(
    side: int, ratio: float, has_cls: bool
) -> None:
    encoded = toy_encoded([((side, side),)], extras=EXTRAS)
    encoded = replace(encoded, tower=toy_tower(24, has_cls=has_cls))
    n = side * side
    check(encoded, ToMePruner(), ratio, 0, plan_by_hand(n, budget(ratio, n), 6, has_cls))


@pytest.mark.parametrize("b", [0, 1])
def test_images_of_other_sizes_in_the_batch_change_nothing(b: int) -> None:
    n = (144, 54)[b]
    check(
        toy_encoded(RAGGED, extras=EXTRAS),
        ToMePruner(),
        1 / 3,
        b,
        plan_by_hand(n, budget(1 / 3, n), 6, True),
    )


@pytest.mark.parametrize(("r", "ratio"), [(16, None), (16, 0.9), (5, None), (200, None)])
def test_as_published_r_tokens_merge_in_every_block_whatever_the_ratio(
    r: int, ratio: float | None
) -> None:
    plan, left = [], 145
    for _ in range(6):
        plan.append(min(r, (left - 1) // 2))
        left -= plan[-1]
    check(toy_encoded(extras=EXTRAS), ToMePruner(published=True, r=r), ratio, 0, plan)


class TestSchedule:
    def test_of_the_paper(self) -> None:
        assert 576 - sum(clipped(576, 16, 576, 23, True)) == 208
        assert 576 - sum(clipped(576, 16, 576, 24, True)) == 192
        assert clipped(576, 400, 576, 4, True) == (288, 144, 72, 36)

    @pytest.mark.parametrize(
        ("k", "merges"),
        [
            (576, (0,) * 23),
            (575, (1,) + (0,) * 22),
            (192, (17,) * 22 + (10,)),  # 22 x 17 + 10 = 384 = 576 - 192
            (64, (23,) * 22 + (6,)),
        ],
    )
    def test_is_exact_with_the_smallest_constant(self, k: int, merges: tuple[int, ...]) -> None:
        assert schedule(576, k, 23, True) == merges

    def test_every_count_within_reach_is_exact(self) -> None:
        for k in range(19, 145):
            assert sum(schedule(144, k, 3, True)) == 144 - k
            assert list(schedule(144, k, 3, True)) == plan_by_hand(144, k, 3, True)

    @pytest.mark.parametrize("has_cls", [True, False])
    def test_a_count_out_of_reach_is_refused_with_the_bound(self, has_cls: bool) -> None:
        assert sum(schedule(144, 18, 3, has_cls)) == 126
        with pytest.raises(UserError) as error:
            schedule(144, 17, 3, has_cls)
        assert str(error.value) == (
            "tome at most halves the tokens in each of 3 blocks, which "
            "leaves 18 of 144: keeping 17 is infeasible, give a keep_ratio of at least 0.125."
        )
        assert sum(schedule(9, 1, 4, has_cls)) == 8


def _run(tower: Tower, patches: torch.Tensor, plan: list[int]) -> Any:
    mask = torch.ones(1, len(patches), dtype=torch.bool)
    return merged_tower(tower, patches[None], mask, torch.tensor([plan]))


def test_cls_never_merges_even_with_a_patch_that_equals_it() -> None:
    tower, draw = toy_tower(24), torch.Generator().manual_seed(3)
    assert tower.cls is not None
    patches = torch.randn(16, 24, generator=draw)
    patches[4] = tower.cls
    tokens = _run(tower, patches, [2, 8, 2, 1, 1, 0])
    assert tokens.place[0, 0] == -1
    assert tokens.place[0].eq(-1).sum() == 1
    assert tokens.size[0, 0] == 1
    assert tokens.size.sum() == 17


class Unweighted(ToyBlock):
    """The same block without proportional attention."""

    def attend(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().attend(x, bias.clamp(min=-1e30, max=0))


def test_a_merged_pair_of_equals_is_attended_to_as_two() -> None:
    """Patches 2m and 2m + 1 are equal, so merging them all at once changes no feature, if sizes
    count."""
    tower, draw = toy_tower(24), torch.Generator().manual_seed(5)
    patches = torch.randn(8, 24, generator=draw).repeat_interleave(2, 0)
    patches[2:4] = patches[4:6] = patches[:2]  # groups of two and of six, so that sizes differ
    apart, together = (_run(tower, patches, [r, 0, 0, 0, 0, 0]) for r in (0, 8))
    assert together.place[0].tolist() == [-1, *range(0, 16, 2)]
    assert together.size[0].sum() == 17
    for place, x in zip(together.place[0].tolist(), together.x[0], strict=True):
        torch.testing.assert_close(x, apart.x[0, place + 1], atol=1e-5, rtol=1e-5)
    for block in tower.blocks:
        block.__class__ = Unweighted
    assert not torch.allclose(
        _run(tower, patches, [8, 0, 0, 0, 0, 0]).x[0, 1], apart.x[0, 1], atol=1e-3
    )


def test_values_that_tie_go_to_the_lower_index() -> None:
    class Flat:
        """All keys are equal."""

        def attend(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, torch.ones_like(x)

        def feed(self, x: torch.Tensor) -> torch.Tensor:
            return x

    tokens = _run(Tower(torch.zeros(2), [Flat()]), torch.arange(16.0).reshape(8, 2), [3])
    # of tokens 2, 4, 6, 8 the first three join token 1
    assert tokens.place[0].tolist() == [-1, 7, 0, 2, 4, 6]
    assert tokens.size[0].tolist() == [1, 1, 4, 1, 1, 1]
    assert tokens.x[0, 2].tolist() == [(0 + 2 + 6 + 10) / 4, (1 + 3 + 7 + 11) / 4]


def test_what_cannot_be_is_refused() -> None:
    encoded = replace(toy_encoded(extras=EXTRAS), tower=toy_tower(24, blocks=2))
    with pytest.raises(
        UserError, match=r"which leaves 36 of 144: keeping 16 is infeasible.*at least 0\.25\."
    ):
        ToMePruner().select(encoded, 1 / 9)
    with pytest.raises(UserError, match=r"no vision tower \(Encoded.tower\)"):
        ToMePruner().select(replace(encoded, tower=None), 1 / 2)
    with pytest.raises(UserError, match="r must be at least 0, got -1"):
        ToMePruner(published=True, r=-1)
