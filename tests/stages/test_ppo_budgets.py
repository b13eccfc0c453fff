"""Which budgets PPO holds, and what it refuses."""

from typing import Any

import pytest
from tests.stages.toy_runs import (
    Metrics,
    fit,
    policy,
    ppo,
)

from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.rewards.score_change import ScoreChange


class TestBudget:
    @pytest.mark.slow
    def test_lagrange_holds_the_mean_count_and_free_does_not(self) -> None:
        kept = {}
        for budget in ("lagrange", "free"):
            metrics = Metrics()
            options = {
                "lr_lagrange": 0.5,
                "minibatch": 32,
                "update_epochs": 3,
                "anneal": False,
                "prompts": 32,
            }
            fit(
                ppo(
                    budget=budget,
                    keep_ratio=0.2,
                    iterations=45 if budget == "lagrange" else 20,
                    **options,
                ),
                metrics,
            )
            kept[budget] = metrics["ppo/keep_ratio"]
            assert kept[budget][0] == pytest.approx(0.5, abs=0.1)
        assert sum(kept["lagrange"][-20:]) / 20 == pytest.approx(0.2, abs=0.05)
        # never near the single forced token, from where nothing is explored
        assert min(kept["lagrange"]) > 0.08
        assert kept["free"][-1] > 0.6

    @pytest.mark.parametrize(
        ("budget", "select", "kind"),
        [
            ("free", "threshold", "bernoulli"),
            ("lagrange", "topk", "bernoulli"),
            ("exact_k", "topk", "subset"),
            ("exact_k", "gumbel", "subset"),
            ("exact_k", "dpp", "sequential"),
        ],
    )
    def test_sampling_is_of_the_kind_that_is_served(
        self, budget: str, select: str, kind: str
    ) -> None:
        rule = ppo(policy(select=select, quality=3.0), budget=budget, discount=0.7).rule()
        assert (rule.kind, rule.quality, rule.discount) == (kind, 3.0, 0.7)

    def test_the_kdpp_is_an_option(self) -> None:
        assert ppo(policy(select="dpp"), law="kdpp").rule().kind == "dpp"

    def test_a_free_budget_without_a_price_is_refused(self) -> None:
        with pytest.raises(
            UserError, match=r"budget=free keeps every token unless the reward charges for them"
        ):
            ppo(budget="free", reward=WeightedReward([ScoreChange()]))

    @pytest.mark.parametrize("budget", ["free", "lagrange"])
    def test_a_training_that_dpp_does_not_serve_is_refused(self, budget: str) -> None:
        with pytest.raises(
            UserError, match=r"trains tokens one by one, which policy\.select=dpp does not serve"
        ):
            ppo(policy(select="dpp"), budget=budget)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"law": "dpp"}, r"stage\.law must be sequential or kdpp, got dpp\."),
            ({"budget": "some"}, r"stage\.budget must be free, lagrange or exact_k, got some\."),
            ({"advantage": "td"}, r"stage\.advantage must be gae, grpo or rloo, got td\."),
            ({"advantage": "grpo", "group": 1}, r"set stage\.group above 1\."),
            ({"keep_ratio": [0.5, 1.7]}, r"keep_ratio must be .*got 1\.7"),
        ],
    )
    def test_bad_settings_are_refused_in_a_sentence(
        self, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            ppo(**options)
