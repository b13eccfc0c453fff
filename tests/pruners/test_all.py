"""What every heuristic pruner must satisfy, whatever it selects."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget
from tprl.build import choices, target_of
from tprl.errors import UserError
from tprl.pruners.keep_all import KeepAll
from tprl.splice import splice
from tprl.types import Encoded, Pruner, TokenSelection


def heuristics() -> dict[str, type[Any]]:
    """Every class that a yaml of conf/pruner names, except those inside the language model and `keep_all`."""
    found: list[Any] = [target_of("pruner", name) for name in choices("pruner")]
    found = [one for one in found if inspect.isclass(one) and not hasattr(one, "stages") and one is not KeepAll]
    return {one.name: one for one in found}


HEURISTICS = heuristics()
RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]
EXTRAS = sorted(frozenset().union(*(one.extras for one in HEURISTICS.values())))

every_heuristic = pytest.mark.parametrize("pruner", [cls() for cls in HEURISTICS.values()], ids=list(HEURISTICS))
every_ratio = pytest.mark.parametrize("ratio", RATIOS, ids=[f"{r:.3f}" for r in RATIOS])


def _batch() -> Encoded:
    return toy_encoded(RAGGED, extras=EXTRAS)


def _live(selection: TokenSelection, encoded: Encoded) -> torch.Tensor:
    """[B V] how many live tokens stand at each visual token, kept or extra."""
    count = selection.keep.long()
    if selection.extra_at is not None and selection.extra_mask is not None:
        count = count.scatter_add(1, selection.extra_at, selection.extra_mask.long())
    return count


def _assert_same(one: TokenSelection, row: int, batch: TokenSelection) -> None:
    """Row 0 of `one` (less padded) decides the same as `row` of `batch`."""
    v = one.keep.shape[1]
    assert torch.equal(one.keep[0], batch.keep[row, :v])
    assert not batch.keep[row, v:].any()
    if one.extra is not None and batch.extra is not None:
        assert one.extra_mask is not None
        assert batch.extra_mask is not None
        live, other = one.extra_mask[0], batch.extra_mask[row]
        torch.testing.assert_close(one.extra[0, live], batch.extra[row, other])


@pytest.mark.parametrize("pruner", [*(cls() for cls in HEURISTICS.values()), KeepAll()], ids=[*HEURISTICS, "keep_all"])
def test_satisfies_the_protocol_and_has_its_yaml(pruner):
    assert isinstance(pruner, Pruner)
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "pruner" / f"{pruner.name}.yaml")
    assert config._target_ == f"{type(pruner).__module__}.{type(pruner).__name__}"


@every_ratio
@every_heuristic
def test_budget_is_exact_in_every_image(pruner, ratio):
    encoded = _batch()
    live = _live(pruner.select(encoded, ratio), encoded)
    for b, grids in enumerate(RAGGED):
        for i, (rows, columns) in enumerate(grids):
            mine = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            assert live[b, mine].sum() == budget(ratio, rows * columns)
    assert (live[~encoded.visual_mask] == 0).all()
    assert live.max() == 1


@every_heuristic
def test_count_is_what_the_language_model_reads_in_raster_order(pruner):
    encoded = _batch()
    selection = pruner.select(encoded, 2 / 9)
    prompt = splice(encoded, selection)
    assert torch.equal(selection.count, prompt.visual.sum(1))
    for b in range(len(encoded)):
        at = prompt.positions[0, b, prompt.visual[b]]
        assert (at.diff() > 0).all()


@every_heuristic
def test_ratio_one_is_the_identity(pruner):
    encoded = _batch()
    prompt = splice(encoded, pruner.select(encoded, 1.0))
    assert torch.equal(prompt.attention, encoded.attention)
    torch.testing.assert_close(prompt.embeds[prompt.attention], encoded.embeds[encoded.attention])


@every_ratio
@every_heuristic
def test_alone_or_in_a_batch_is_the_same(pruner, ratio):
    batch = pruner.select(_batch(), ratio)
    for b, grids in enumerate(RAGGED):
        alone = toy_encoded([grids], uids=[f"toy-{b}"], extras=EXTRAS)
        _assert_same(pruner.select(alone, ratio), b, batch)


@every_heuristic
def test_order_of_the_batch_changes_nothing(pruner):
    encoded, order = _batch(), [2, 0, 1]
    straight, permuted = pruner.select(encoded, 1 / 3), pruner.select(encoded.rows(order), 1 / 3)
    assert torch.equal(permuted.keep, straight.keep[order])
    if straight.extra is not None:
        torch.testing.assert_close(permuted.extra, straight.extra[order])


@every_heuristic
def test_values_in_the_padding_change_nothing(pruner):
    encoded = _batch()
    spoilt = {
        name: value.masked_fill(~encoded.visual_mask.reshape(*encoded.visual_mask.shape, *[1] * (value.ndim - 2)), 1e4)
        for name, value in encoded.extras.items()
    }
    embeds = encoded.embeds.masked_fill(~encoded.attention.unsqueeze(-1), 1e4)
    clean, dirty = (
        pruner.select(x, 1 / 3)
        for x in (encoded, replace(encoded, extras=spoilt, embeds=embeds, visual_at=_moved(encoded)))
    )
    assert torch.equal(clean.keep, dirty.keep)
    if clean.extra is not None:
        assert torch.equal(clean.extra, dirty.extra)


def _moved(encoded: Encoded) -> torch.Tensor:
    """`visual_at` with padded entries pointing at the last column instead of column 0."""
    return encoded.visual_at.masked_fill(~encoded.visual_mask, encoded.attention.shape[1] - 1)


@every_heuristic
def test_prompts_without_images(pruner):
    mixed = toy_encoded([(), ((3, 4),)], extras=EXTRAS)
    assert pruner.select(mixed, 0.5).count.tolist() == [0, 6]
    assert pruner.select(toy_encoded([(), ()], extras=EXTRAS), 0.5).count.tolist() == [0, 0]


@every_heuristic
@pytest.mark.parametrize("bad", [0.0, -0.5, 1.7, None])
def test_bad_ratio_is_a_user_error(pruner, bad):
    with pytest.raises(UserError, match="keep_ratio="):
        pruner.select(_batch(), bad)


@every_heuristic
def test_the_declared_extras_suffice(pruner):
    full = pruner.select(_batch(), 1 / 3)
    lean = pruner.select(toy_encoded(RAGGED, extras=pruner.extras), 1 / 3)
    if not pruner.extras:
        assert torch.equal(lean.keep, full.keep)
    assert torch.equal(lean.count, full.count)


@pytest.mark.parametrize("ratio", [None, 0.1, 1.0])
def test_keep_all_ignores_the_ratio(ratio):
    encoded = _batch()
    assert torch.equal(KeepAll().select(encoded, ratio).keep, encoded.visual_mask)
