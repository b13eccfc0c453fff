"""What every heuristic pruner must satisfy, whatever it selects."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.helpers import RAGGED, Grids, toy_encoded

from tprl.budget import budget
from tprl.build import choices, target_of
from tprl.errors import UserError
from tprl.pruners.hiprune import HiPrunePruner
from tprl.pruners.joined import JoinedPruner
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.visionzip import VisionZipPruner
from tprl.splice import splice
from tprl.types import Encoded, Pruner, TokenSelection


def heuristics() -> dict[str, type[Any]]:
    """Every class that a yaml of conf/pruner names, except those inside the language model and
    `keep_all`."""
    result: list[Any] = [target_of("pruner", name) for name in choices("pruner")]
    result = [
        item
        for item in result
        if inspect.isclass(item)
        and not hasattr(item, "stages")
        and item not in (KeepAll, JoinedPruner)  # the latter is named by its yaml: test_joined.py
    ]
    return {item.name: item for item in result}


def published() -> dict[str, Any]:
    """Every heuristic that can follow its paper to the letter, doing so."""
    able = {
        name: cls
        for name, cls in HEURISTICS.items()
        if "published" in inspect.signature(cls).parameters
    }
    return {f"{name} as published": cls(published=True) for name, cls in able.items()}


HEURISTICS = heuristics()
RATIOS = [1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18]
EXTRAS = sorted(frozenset().union(*(item.extras for item in HEURISTICS.values())))
EMPTY = ((), ((3, 4),))  # a prompt without images beside one with

OURS = {name: cls() for name, cls in HEURISTICS.items()}
OURS |= {
    "hiprune with more anchors": HiPrunePruner(0.8),
    "oracle_dpp": OraclePruner(diversity=True),
}
EXACT = {
    name: item for name, item in OURS.items() if name != "resize"
}  # as many as a smaller grid has
EXACT |= {"visionzip as published": VisionZipPruner(published=True)}
ALL = OURS | published()

our_heuristics = pytest.mark.parametrize("pruner", OURS.values(), ids=list(OURS))
every_exact = pytest.mark.parametrize("pruner", EXACT.values(), ids=list(EXACT))
every_heuristic = pytest.mark.parametrize("pruner", ALL.values(), ids=list(ALL))
every_ratio = pytest.mark.parametrize("ratio", RATIOS, ids=[f"{r:.3f}" for r in RATIOS])


def _ratios(pruner: Any) -> list[float | None]:
    return [*RATIOS, None] if getattr(pruner, "decides_alone", False) else [*RATIOS]


every_case = pytest.mark.parametrize(
    ("pruner", "ratio"),
    [
        pytest.param(
            item,
            ratio,
            id=f"{name}-{ratio and f'{ratio:.3f}'}",
            marks=pytest.mark.slow if ratio in (1 / 2, 2 / 9, 1 / 18) else (),
        )
        for name, item in ALL.items()
        for ratio in _ratios(item)
    ],
)


def _batch(grids: Grids = RAGGED) -> Encoded:
    return toy_encoded(grids, extras=EXTRAS)


def _live(selection: TokenSelection, encoded: Encoded) -> torch.Tensor:
    """[B V] how many live tokens stand at each visual token, kept or extra."""
    count = selection.keep.long()
    if selection.extra_at is not None and selection.extra_mask is not None:
        count = count.scatter_add(1, selection.extra_at, selection.extra_mask.long())
    return count


def _extra(selection: TokenSelection, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The extra tokens of a row, and where they stand."""
    assert selection.extra is not None
    assert selection.extra_at is not None
    assert selection.extra_mask is not None
    live = selection.extra_mask[row]
    return selection.extra[row, live], selection.extra_at[row, live]


def _assert_same(item: TokenSelection, row: int, batch: TokenSelection) -> None:
    """Row 0 of `one` (less padded) decides the same as `row` of `batch`."""
    v = item.keep.shape[1]
    assert torch.equal(item.keep[0], batch.keep[row, :v])
    assert not batch.keep[row, v:].any()
    if item.merged is not None or batch.merged is not None:
        assert item.merged is not None
        assert batch.merged is not None
        torch.testing.assert_close(item.merged[0], batch.merged[row, :v])
    if item.extra is not None or batch.extra is not None:
        (members, at), (other, other_at) = _extra(item, 0), _extra(batch, row)
        torch.testing.assert_close(members, other)
        assert torch.equal(at, other_at)


@pytest.mark.parametrize(
    "pruner", [*(cls() for cls in HEURISTICS.values()), KeepAll()], ids=[*HEURISTICS, "keep_all"]
)
def test_satisfies_the_protocol_and_has_its_yaml(pruner):
    assert isinstance(pruner, Pruner)
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "pruner" / f"{pruner.name}.yaml")
    assert config._target_ == f"{type(pruner).__module__}.{type(pruner).__name__}"


@pytest.mark.parametrize("batch", [RAGGED, EMPTY], ids=["ragged", "empty"])
@every_ratio
@every_exact
def test_budget_is_exact_in_every_image(pruner, ratio, batch):
    encoded = _batch(batch)
    live = _live(pruner.select(encoded, ratio), encoded)
    for b, grids in enumerate(batch):
        for i, (rows, columns) in enumerate(grids):
            members = encoded.visual_mask[b] & (encoded.image_of[b] == i)
            assert live[b, members].sum() == budget(ratio, rows * columns)
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


@our_heuristics
def test_ratio_one_is_the_identity(pruner):
    encoded = _batch()
    prompt = splice(encoded, pruner.select(encoded, 1.0))
    assert torch.equal(prompt.attention, encoded.attention)
    assert torch.equal(prompt.embeds[prompt.attention], encoded.embeds[encoded.attention])


@every_case
def test_alone_in_a_batch_or_permuted_is_the_same(pruner, ratio):
    encoded, order = _batch(), [2, 0, 1]
    batch, permuted = (pruner.select(x, ratio) for x in (encoded, encoded.rows(order)))
    for b, grids in enumerate(RAGGED):
        alone = pruner.select(toy_encoded([grids], uids=[f"toy-{b}"], extras=EXTRAS), ratio)
        _assert_same(alone, b, batch)
        _assert_same(alone, order.index(b), permuted)


@pytest.mark.parametrize("value", [1e4, -1e4])
@every_case
def test_values_in_the_padding_change_nothing(pruner, ratio, value):
    encoded = _batch()
    extras = {name: old.clone() for name, old in encoded.extras.items()}
    for each in extras.values():
        each[~encoded.visual_mask] = value
    embeds = encoded.embeds.masked_fill(~encoded.attention.unsqueeze(-1), value)
    dirty = pruner.select(
        replace(encoded, extras=extras, embeds=embeds, visual_at=_moved(encoded)), ratio
    )
    for item, other in zip(
        vars(pruner.select(encoded, ratio)).values(), vars(dirty).values(), strict=True
    ):
        assert item is other is None or torch.equal(item, other)


def _moved(encoded: Encoded) -> torch.Tensor:
    """`visual_at` with padded entries pointing at the last column instead of column 0."""
    return encoded.visual_at.masked_fill(~encoded.visual_mask, encoded.attention.shape[1] - 1)


@every_case
def test_prompts_without_images(pruner, ratio):
    mixed = pruner.select(_batch(EMPTY), ratio)
    alone = pruner.select(toy_encoded(EMPTY[1:], uids=["toy-1"], extras=EXTRAS), ratio)
    assert mixed.count.tolist() == [0, int(alone.count)]
    _assert_same(alone, 1, mixed)
    assert pruner.select(_batch([(), ()]), ratio).count.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("pruner", "bad"),
    [
        pytest.param(item, bad, id=f"{name}-{bad}")
        for name, item in ALL.items()
        for bad in (0.0, -0.5, 1.7, None)
        if bad not in _ratios(item)
    ],
)
def test_bad_ratio_is_a_user_error(pruner, bad):
    with pytest.raises(UserError, match=rf"keep_ratio .*got {bad}"):
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
