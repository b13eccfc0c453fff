"""What a heuristic teaches: nested masks with the right counts, whatever the batch."""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers import toy_encoded, untrained_policy
from tests.stages.toy_runs import WIDTH, lvlm, policy

from tprl.data.taking import BadRow
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.mlp import MLPPruner
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.pooling import PoolingPruner
from tprl.pruners.uniform import UniformPruner
from tprl.rl.rollout import step_ratios
from tprl.runtime.store import Cache, opened
from tprl.seeding import stable_seed
from tprl.stages.demonstrations import (
    Demonstrations,
    StoredDemonstrations,
    _episodes,
    _packed,
    _Shown,
    demonstrate,
)
from tprl.types import Encoded, Pruner, Sample, TokenSelection


def stored(
    demonstrator: Pruner | None = None,
    count: int = 30,
    keep_ratios: tuple[float, ...] = (0.5, 1 / 12),
    steps: int = 3,
    **options: object,
) -> StoredDemonstrations:
    teacher = demonstrator or UniformPruner()
    return demonstrate(
        teacher, policy(), lvlm(), ToyDataset(), count, keep_ratios, steps, **options
    )  # type: ignore[arg-type]


def demonstrated(*args: Any, **options: Any) -> Demonstrations:
    """All of `stored`, in order."""
    result = stored(*args, **options)
    return result.rows(torch.arange(len(result)))


class TestMasks:
    def test_every_step_keeps_a_subset_of_the_one_before(self) -> None:
        """Uniform grids of different sizes are not nested by themselves."""
        encoded = lvlm().encode([ToyDataset()[0]])
        free = [UniformPruner().select(encoded, ratio).keep for ratio in (0.5, 0.25)]
        assert (free[1] & ~free[0]).any()
        keep = demonstrated().keep
        assert keep.shape == (3, 30, 24)
        assert not (keep[1:] & ~keep[:-1]).any()

    def test_the_last_mask_is_the_heuristics_own_choice(self) -> None:
        result = demonstrated(keep_ratios=(0.25,))
        encoded = lvlm().encode([ToyDataset()[i] for i in range(30)])
        assert torch.equal(result.keep[-1], UniformPruner().select(encoded, 0.25).keep)

    def test_counts_shrink_geometrically_to_the_budget(self) -> None:
        result = demonstrated()
        counts = {
            (ratio, *column)
            for ratio, column in zip(
                result.keep_ratio.tolist(), result.keep.sum(2).T.tolist(), strict=True
            )
        }
        assert counts == {(0.5, 19, 15, 12), (1 / 12, 10, 5, 2)}

    def test_progressive_shares_are_of_what_is_alive(self) -> None:
        """0.8, 0.6 and 0.4 of 24: 19.2, 11.52 and 4.608."""
        result = demonstrated(progressive=(0.8, 0.6, 0.4), keep_ratios=(0.9,), steps=1)
        assert result.keep.sum(2).T.tolist() == [[19, 12, 5]] * 30
        assert result.keep_ratio.tolist() == pytest.approx([0.192] * 30)

    def test_samples_with_several_images_of_unequal_size(self) -> None:
        """Each image rounds its own budget, so a sample's count is not the budget of its sum."""
        grids = [((1, 3), (1, 3), (1, 1)), ((2, 3),), ((1, 1), (1, 1))]
        keep = _episodes(UniformPruner(), toy_encoded(grids), [step_ratios(1 / 3, 2)], 1 << 30)[0]
        assert keep.sum(2).tolist() == [[5, 3, 2], [3, 2, 2]]
        assert not (keep[1] & ~keep[0]).any()


class TestDraws:
    def test_batch_size_changes_nothing(self) -> None:
        """Nor the order: each question's ratio depends on (seed, uid), its masks on the heuristic
        alone."""
        first, other = demonstrated(batch_size=50), demonstrated(batch_size=7)
        assert torch.equal(first.keep, other.keep)
        assert torch.equal(first.keep_ratio, other.keep_ratio)
        for a, b in zip(first.x, other.x, strict=True):
            assert (
                torch.equal(a, b)
                if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
                else a is b
            )

    def test_ratios_are_spread_over_the_questions_and_follow_the_seed(self) -> None:
        first, other = demonstrated(count=200), demonstrated(count=200, seed=1)
        assert 60 < int((first.keep_ratio == 0.5).sum()) < 140
        assert not torch.equal(first.keep_ratio, other.keep_ratio)

    def test_uses_the_dataset_up_and_no_more(self) -> None:
        result = demonstrate(
            UniformPruner(), policy(), lvlm(), ToyDataset(limit=11), 50, [0.5], 1, batch_size=4
        )
        assert len(result) == 11

    def test_an_epoch_shows_every_question_once(self) -> None:
        store = stored(keep_ratios=(0.5,), demonstrator=ClsAttentionPruner())
        batches, result = (
            list(store.batches(8, torch.Generator().manual_seed(0))),
            store.rows(torch.arange(30)),
        )
        assert [len(batch.keep_ratio) for batch in batches] == [8, 8, 8, 6]
        rows = torch.cat([batch.x.codes.flatten(1) for batch in batches])
        assert sorted(rows.sum(1).tolist()) == sorted(result.x.codes.flatten(1).sum(1).tolist())
        assert not torch.equal(rows, result.x.codes.flatten(1))

    def test_the_oracle_and_what_keeps_no_token_cannot_demonstrate(self) -> None:
        with pytest.raises(
            UserError, match=r"pruner=oracle knows where the answer is and cannot demonstrate"
        ):
            demonstrated(OraclePruner())
        with pytest.raises(
            UserError,
            match=r"pruner=pooling puts new tokens in the place of all that there are and",
        ):
            demonstrated(PoolingPruner())

    def test_codes_are_stored_in_half_precision(self) -> None:
        result = demonstrated()
        assert (result.x.codes.dtype, result.x.query.dtype) == (torch.float16, torch.float16)
        assert result.x.features is None


class Ragged(ToyLVLM):
    """Prompts with other images and questions each; three questions in a row share their images."""

    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        numbers = [int(sample.uid) for sample in samples]
        grids = [GRIDS[number // 3 % len(GRIDS)] for number in numbers]
        names = [f"image {number // 3}" for number in numbers]
        return replace(toy_encoded(grids, uids=names), uids=tuple(sample.uid for sample in samples))


GRIDS = [((4, 4),), ((2, 3), (5, 1)), (), ((1, 7),)]


class Numbered(ToyDataset):
    """Uids are numbers, and question 13 is damaged."""

    def __getitem__(self, index: int) -> Sample:
        if index == 13:
            raise BadRow("broken")
        return super().__getitem__(index)._replace(uid=str(index))


class TestFiles:
    def ragged(self, cache: Cache | None = None, **options: Any) -> StoredDemonstrations:
        learner = untrained_policy(16)
        return demonstrate(
            UniformPruner(), learner, Ragged(), Numbered(), 45, [0.5, 0.25], 2,
            batch_size=2, cache=cache, **options,
        )  # fmt: skip

    def test_ragged_questions_come_back_bit_for_bit(self) -> None:
        result, learner = self.ragged(), untrained_policy(16)
        whole = result.rows(torch.arange(len(result)))
        assert (len(result), len(result.paths)) == (44, 3)
        assert whole.x.codes.shape == (44, 16, 8)
        assert whole.x.query.shape[1] == int(whole.x.query_mask.sum(1).max())
        for b, number in enumerate(n for n in range(45) if n != 13):
            encoded = Ragged().encode([Numbered()[number]])
            x, mask, words = learner.observe(encoded), whole.x.mask[b], whole.x.query_mask[b]
            assert mask.tolist() == [True] * x.mask.shape[1] + [False] * (16 - x.mask.shape[1])
            assert torch.equal(whole.x.codes[b, mask], x.codes[0].half())
            assert torch.equal(whole.x.xy[b, mask], x.xy[0])
            assert torch.equal(whole.x.query[b, words], x.query[0].half())
            ratio = (0.5, 0.25)[stable_seed(str(number), 0) % 2]
            assert float(whole.keep_ratio[b]) == ratio
            keep = _episodes(UniformPruner(), encoded, [step_ratios(ratio, 2)], 1 << 30)[0]
            assert torch.equal(whole.keep[:, b, mask], keep[:, 0])
            assert not any(
                part[b, ~mask].any()
                for part in (whole.x.codes, whole.x.xy, whole.keep[0], whole.keep[1])
            )

    def test_any_rows_in_any_order(self) -> None:
        result = self.ragged()
        whole, index = result.rows(torch.arange(44)), torch.tensor([43, 0, 20, 43])
        some = result.rows(index)
        assert torch.equal(some.keep, whole.keep[:, index])
        assert torch.equal(some.keep_ratio, whole.keep_ratio[index])
        for a, b in zip(some.x[:5], whole.x[:5], strict=True):
            assert torch.equal(cast(torch.Tensor, a), cast(torch.Tensor, b)[index])

    def test_an_image_is_stored_once_for_all_its_questions(self) -> None:
        """Six questions about a picture of 24 tokens; 22 different words in all of them."""
        result = stored()
        with opened(result.paths[0]) as file:
            assert file.get_tensor("codes").shape == (5 * 24, WIDTH)
            assert file.get_tensor("places").shape == (24, 2)
            vectors = file.get_tensor("vectors")
            assert len(vectors.unique(dim=0)) == len(vectors) < 16

    def test_all_rows_damaged(self) -> None:
        class Broken(ToyDataset):
            def __getitem__(self, index: int) -> Sample:
                raise BadRow("broken")

        with pytest.raises(
            UserError, match=r"all 5 rows of toy .* are damaged \(.*nothing to demonstrate"
        ):
            demonstrate(UniformPruner(), policy(), lvlm(), Broken(), 5, [0.5], 1)

    def test_a_temporary_folder_goes_with_them(self) -> None:
        result = stored()
        folder = result.paths[0].parent
        assert folder.is_dir()
        del result
        gc.collect()
        assert not folder.exists()

    def test_memory_is_that_of_a_batch(self, tmp_path: Path) -> None:
        """An epoch over 100 MB, in a process of its own that reports how far its peak rose."""
        codes = torch.ones(4096, 64).half()
        bits = torch.zeros(1, 512, dtype=torch.uint8)
        for shard in range(10):
            demonstrated = [
                _Shown(
                    f"{shard}/{i}", codes * (20 * shard + i), torch.zeros(4096, 2), codes[:2], bits
                )
                for i in range(20)
            ]
            save_file(_packed(demonstrated), tmp_path / str(shard))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100e6
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            before = peak()
            result = StoredDemonstrations(sorted(tmp_path.iterdir()), [0.5], 1, 0)
            seen = sum(
                float(part.x.codes[:, 0, 0].sum()) for part in result.batches(8, torch.Generator())
            )
            os.write(write, json.dumps([peak() - before, seen]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        rise, seen = json.loads(os.read(read, 100))
        assert seen == sum(range(200))
        assert rise < 40_000  # of 100,000 kB


def peak() -> int:
    """kB that this process held at most, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Watched(UniformPruner):
    """Counts the questions that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.demonstrated = 0

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        self.demonstrated += len(encoded)
        return super().select(encoded, keep_ratio)


class TestCache:
    def demonstrated(
        self, cache: Cache, learner: LearnedPruner | None = None, **options: Any
    ) -> int:
        """How many questions were demonstrated."""
        watched = Watched()
        settings = {"count": 30, "keep_ratios": [0.5], "steps": 1, "batch_size": 2} | options
        demonstrate(
            watched, learner or policy(code_width=8), lvlm(), ToyDataset(), cache=cache, **settings
        )
        return watched.demonstrated

    def test_what_is_there_is_not_demonstrated_again(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path, {})
        assert self.demonstrated(cache) == 30
        assert self.demonstrated(cache) == 0
        assert self.demonstrated(cache, seed=1) == 0
        assert self.demonstrated(cache, count=20) == 0
        assert self.demonstrated(cache, count=50) == 30  # rows 20 .. 40 were cut at 30
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(
        "option", [{"keep_ratios": [0.25]}, {"steps": 2}, {"progressive": [0.9, 0.5]}]
    )
    def test_other_schedules_are_others(self, option: dict[str, Any], tmp_path: Path) -> None:
        self.demonstrated(Cache(tmp_path, {}))
        assert self.demonstrated(Cache(tmp_path, {}), **option) >= 30
        assert len(list(tmp_path.iterdir())) == 2

    def test_so_are_other_codes_and_other_runs(self, tmp_path: Path) -> None:
        self.demonstrated(Cache(tmp_path, {}))
        assert self.demonstrated(Cache(tmp_path, {}), policy(1, code_width=8)) == 30
        assert self.demonstrated(Cache(tmp_path, {"model": "another"})) == 30
        assert len(list(tmp_path.iterdir())) == 3

    def test_other_networks_on_the_same_codes_share_them(self, tmp_path: Path) -> None:
        mlp, learner = MLPPruner(WIDTH, code_width=8, width=16), policy(code_width=8)
        assert mlp.autoencoder is not None
        assert learner.autoencoder is not None
        mlp.autoencoder.load_state_dict(learner.autoencoder.state_dict())
        assert [self.demonstrated(Cache(tmp_path, {}), first) for first in (learner, mlp)] == [
            30,
            0,
        ]
