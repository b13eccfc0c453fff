"""What a heuristic teaches: nested masks with the right counts, whatever the batch."""

from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded
from tests.stages.toy_runs import lvlm, policy

from tprl.data.demonstrations import Demonstrations, StoredDemonstrations, _episodes, demonstrate
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.uniform import UniformPruner
from tprl.rl.rollout import step_ratios
from tprl.types import Pruner


def stored(
    demonstrator: Pruner | None = None,
    count: int = 30,
    keep_ratios: tuple[float, ...] = (0.5, 1 / 12),
    steps: int = 3,
    **options: object,
) -> StoredDemonstrations:
    teacher = demonstrator or UniformPruner()
    return demonstrate(teacher, policy(), lvlm(), ToyDataset(), count, keep_ratios, steps, **options)  # type: ignore[arg-type]


def shown(*args: Any, **options: Any) -> Demonstrations:
    """All of `stored`, in order."""
    found = stored(*args, **options)
    return found.rows(torch.arange(len(found)))


class TestMasks:
    def test_every_step_keeps_a_subset_of_the_one_before(self) -> None:
        """Uniform grids of different sizes are not nested by themselves."""
        encoded = lvlm().encode([ToyDataset()[0]])
        free = [UniformPruner().select(encoded, ratio).keep for ratio in (0.5, 0.25)]
        assert (free[1] & ~free[0]).any()
        keep = shown().keep
        assert keep.shape == (3, 30, 24)
        assert not (keep[1:] & ~keep[:-1]).any()

    def test_the_last_mask_is_the_heuristics_own_choice(self) -> None:
        found = shown(keep_ratios=(0.25,))
        encoded = lvlm().encode([ToyDataset()[i] for i in range(30)])
        assert torch.equal(found.keep[-1], UniformPruner().select(encoded, 0.25).keep)

    def test_counts_shrink_geometrically_to_the_budget(self) -> None:
        found = shown()
        counts = {
            (ratio, *column)
            for ratio, column in zip(found.keep_ratio.tolist(), found.keep.sum(2).T.tolist(), strict=True)
        }
        assert counts == {(0.5, 19, 15, 12), (1 / 12, 10, 5, 2)}

    def test_progressive_shares_are_of_what_is_alive(self) -> None:
        """0.8, 0.6 and 0.4 of 24: 19.2, 11.52 and 4.608."""
        found = shown(progressive=(0.8, 0.6, 0.4), keep_ratios=(0.9,), steps=1)
        assert found.keep.sum(2).T.tolist() == [[19, 12, 5]] * 30
        assert found.keep_ratio.tolist() == pytest.approx([0.192] * 30)

    def test_samples_with_several_images_of_unequal_size(self) -> None:
        """Each image rounds its own budget, so a sample's count is not the budget of its sum."""
        grids = [((1, 3), (1, 3), (1, 1)), ((2, 3),), ((1, 1), (1, 1))]
        keep = _episodes(UniformPruner(), toy_encoded(grids), [step_ratios(1 / 3, 2)])[0]
        assert keep.sum(2).tolist() == [[5, 3, 2], [3, 2, 2]]
        assert not (keep[1] & ~keep[0]).any()


class TestDraws:
    def test_batch_size_changes_nothing(self) -> None:
        """Nor the order: each question's ratio depends on (seed, uid), its masks on the heuristic alone."""
        one, other = shown(batch_size=50), shown(batch_size=7)
        assert torch.equal(one.keep, other.keep)
        assert torch.equal(one.keep_ratio, other.keep_ratio)
        for a, b in zip(one.x, other.x, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b

    def test_ratios_are_spread_over_the_questions_and_follow_the_seed(self) -> None:
        one, other = shown(count=200), shown(count=200, seed=1)
        assert 60 < int((one.keep_ratio == 0.5).sum()) < 140
        assert not torch.equal(one.keep_ratio, other.keep_ratio)

    def test_uses_the_dataset_up_and_no_more(self) -> None:
        found = demonstrate(UniformPruner(), policy(), lvlm(), ToyDataset(limit=11), 50, [0.5], 1, batch_size=4)
        assert len(found) == 11

    def test_an_epoch_shows_every_question_once(self) -> None:
        store = stored(keep_ratios=(0.5,), demonstrator=ClsAttentionPruner())
        batches, found = list(store.batches(8, torch.Generator().manual_seed(0))), store.rows(torch.arange(30))
        assert [len(batch.keep_ratio) for batch in batches] == [8, 8, 8, 6]
        rows = torch.cat([batch.x.codes.flatten(1) for batch in batches])
        assert sorted(rows.sum(1).tolist()) == sorted(found.x.codes.flatten(1).sum(1).tolist())
        assert not torch.equal(rows, found.x.codes.flatten(1))

    def test_the_oracle_cannot_demonstrate(self) -> None:
        with pytest.raises(UserError, match=r"pruner=oracle knows where the answer is and cannot demonstrate"):
            shown(OraclePruner())

    def test_codes_are_stored_in_half_precision(self) -> None:
        found = shown()
        assert (found.x.codes.dtype, found.x.query.dtype) == (torch.float16, torch.float16)
        assert found.x.similarity is None
