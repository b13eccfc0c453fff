"""What is not finite is named with its sample, before an optimizer steps on it."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.stages.test_lfd import lfd
from tests.stages.toy_runs import fit, policy, ppo, same, weights
from torch import Tensor

from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.runtime.checkpoint import LAST, SaveEvery
from tprl.runtime.finite import check_finite
from tprl.stages.ppo import PPO
from tprl.types import Outcome


class TestTheSentence:
    def test_names_the_value_and_the_samples_along_any_axis(self) -> None:
        fine, bad = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1.0], [0.0, torch.inf, 0.0]])
        check_finite({"a": fine, "b": fine}, ["x", "y", "z"], "iteration 3")
        with pytest.raises(
            UserError,
            match=r"^iteration 3: reward/b is infinite for sample y; .* before the optimizer",
        ):
            check_finite(
                {"reward/a": fine, "reward/b": bad}, ["x", "y", "z"], "iteration 3", axis=1
            )
        with pytest.raises(UserError, match=r"b is infinite for sample y;"):
            check_finite({"b": bad}, ["x", "y"], "iteration 3")

    def test_a_scalar_belongs_to_all_and_many_are_not_all_listed(self) -> None:
        uids = [str(i) for i in range(7)] * 2
        with pytest.raises(
            UserError, match="loss is not a number for samples 0, 1, 2, 3, 4 and 2 more;"
        ):
            check_finite({"loss": torch.tensor(torch.nan)}, uids, "epoch 0")


class Spoiled(WeightedReward):
    """Infinitely bad on one question, from its second batch on."""

    calls = 0

    def __call__(self, outcome: Outcome) -> dict[str, Tensor]:
        terms = super().__call__(outcome)
        self.calls += 1
        if self.calls > 1:
            next(iter(terms.values()))[0, 5] = -torch.inf
            self.uid = outcome.uids[5]
        return terms


class Overflows(PPO):
    """A loss that is not a number, from the second iteration on."""

    def _loss(self, *args: Any, **options: Any) -> Any:
        loss = super()._loss(*args, **options)
        self.before: dict[str, Tensor] = weights(self.pruner)
        return loss._replace(total=loss.total * torch.nan) if self.iteration else loss


class TestStages:
    def test_ppo_stops_on_a_reward_and_keeps_the_checkpoint(self, tmp_path: Path) -> None:
        reward = Spoiled(ppo().reward.terms)
        stage = ppo(reward=reward)
        with pytest.raises(
            UserError, match=r"^iteration 1: reward/score_change is infinite for sample "
        ) as stop:
            fit(stage, SaveEvery(tmp_path, 1))
        assert f"for sample {reward.uid};" in str(stop.value)
        assert torch.load(tmp_path / LAST, weights_only=True)["ppo"]["iteration"] == 1

    def test_ppo_does_not_step_on_a_loss(self) -> None:
        stage = cast(Overflows, ppo(kind=Overflows))
        with pytest.raises(
            UserError, match=r"^iteration 1: ppo/total is not a number for samples "
        ):
            fit(stage)
        assert same(stage.before, weights(stage.pruner))

    def test_lfd_does_not_step_on_a_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pruner = policy()
        stage = lfd(pruner, batch_size=64)
        stage.setup("fit")
        assert stage.demonstrations is not None
        batches = stage.demonstrations.batches

        def spoiled(*args: Any) -> Any:
            for batch in batches(*args):
                batch.x.codes[3, 0, 0] = torch.nan
                yield batch

        monkeypatch.setattr(stage.demonstrations, "batches", spoiled)
        before = weights(pruner)
        with pytest.raises(
            UserError, match=r"^epoch 0: lfd/loss is not a number for sample 0 to 63 "
        ):
            fit(stage)
        assert same(before, weights(pruner))
