"""Which draws of a set get credit for its reward."""

from typing import Any

import pytest
import torch
from tests.stages.toy_runs import (
    fit,
    policy,
    ppo,
)
from torch import Tensor

from tprl.errors import UserError
from tprl.rl.rollout import Rollout
from tprl.stages.ppo import PPO


class TestCredit:
    def test_draws_that_did_not_matter_get_no_advantage(self) -> None:
        """On the toy model one token answers: of a right episode only its block is rewarded."""
        seen: list[tuple[Tensor, Tensor, Rollout]] = []

        class Watched(PPO):
            def _credit(
                self,
                advantage: Tensor,
                reward: Tensor,
                samples: Any,
                encoded: Any,
                rollout: Rollout,
            ) -> Tensor:
                each = super()._credit(advantage, reward, samples, encoded, rollout)
                answers = torch.tensor(
                    [int(s.region[0][1] // 8) * 6 + int(s.region[0][0] // 8) for s in samples]
                )
                seen.append((each[0], answers, rollout))
                return each

        group = 8
        options = {
            "advantage": "rloo",
            "group": group,
            "keep_ratio": 0.25,
            "credit_blocks": 6,
            "minibatch": 64,
        }
        fit(ppo(policy(select="dpp"), kind=Watched, iterations=1, **options))
        each, answers, rollout = seen[0]
        decisive = 0
        for question, at in enumerate(answers.tolist()):
            rows = each[question * group : (question + 1) * group]
            keep = rollout.keep[0, question * group : (question + 1) * group]
            for advantage, kept in zip(rows, keep, strict=True):
                if bool(kept[at]) and float(advantage[at]) > 2 * float(advantage[kept].mean()) > 0:
                    decisive += 1
                    assert advantage[kept].count_nonzero() == 1  # six blocks of one token
        assert decisive >= 4

    def test_one_block_is_no_silent_zero(self) -> None:
        with pytest.raises(
            UserError, match=r"stage\.credit_blocks=1 has no other block .* use 2 or more, or 0"
        ):
            ppo(policy(select="dpp"), credit_blocks=1)

    def test_is_refused_where_a_set_has_one_advantage(self) -> None:
        for options in ({"law": "kdpp"}, {"ratio": "joint"}, {"steps": 2}):
            with pytest.raises(
                UserError, match=r"stage\.credit_blocks=4 needs stage\.law=sequential"
            ):
                ppo(policy(select="dpp"), credit_blocks=4, **options)
