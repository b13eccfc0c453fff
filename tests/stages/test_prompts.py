"""The order in which PPO reads its questions."""

import pytest
from tests.stages.toy_runs import (
    ppo,
)

from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.stages.prompts import PromptStream
from tprl.types import Sample

BUDGETS = [("free", "topk"), ("lagrange", "topk"), ("exact_k", "topk"), ("exact_k", "dpp")]
every_budget = pytest.mark.parametrize(
    ("budget", "select"), BUDGETS, ids=["-".join(pair) for pair in BUDGETS]
)


class TestPromptStream:
    def read(
        self, start: int = 0, stop: int = 6, prompts: int = 5, size: int = 60
    ) -> list[list[str]]:
        stream = PromptStream(ToyDataset(limit=size), prompts, start, stop, 3)
        return [[sample.uid for sample in batch] for batch in stream]

    def test_a_pass_shows_every_question_once_before_any_twice(self) -> None:
        uids = [uid for batch in self.read(stop=24) for uid in batch]
        assert (
            sorted(uids[:60])
            == sorted(uids[60:])
            == sorted(sample.uid for sample in ToyDataset(limit=60))
        )
        assert uids[:60] != uids[60:]

    def test_ranks_share_out_the_questions_of_an_iteration(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = self.read(prompts=6)
        monkeypatch.setattr("tprl.runtime.distributed.count", lambda: 3)
        parts = []
        for rank in range(3):
            monkeypatch.setattr("tprl.runtime.distributed.rank", lambda rank=rank: rank)
            parts.append(self.read(prompts=6))
        assert [
            [uid for pair in zip(*batches, strict=True) for uid in pair]
            for batches in zip(*parts, strict=True)
        ] == alone
        with pytest.raises(
            UserError, match=r"stage.prompts=5 .* 3 ranks cannot share them equally"
        ):
            self.read(prompts=5)

    def test_a_later_start_continues_where_the_first_run_was(self) -> None:
        assert self.read(start=4, stop=20) == self.read(stop=20)[4:]

    def test_batches_may_be_larger_than_the_data(self) -> None:
        assert [len(batch) for batch in self.read(size=3)] == [5] * 6

    def test_the_loader_hands_samples_through_unchanged(self) -> None:
        first = next(iter(ppo().train_dataloader())).samples
        assert all(type(sample) is Sample and type(sample.images) is tuple for sample in first)
