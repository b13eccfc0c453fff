"""Learnability: on the toy model PPO must find out which token the question names."""

from typing import Any

import pytest
from tests.stages.toy_runs import SMALL, Metrics, fit, lvlm, policy, ppo, served

from tprl.data.toy import KINDS, ToyDataset
from tprl.pruners.learned import LearnedPruner
from tprl.rewards import WeightedReward
from tprl.rewards.score_change import ScoreChange
from tprl.rewards.tokens_saved import TokensSaved


def learned(seed: int, iterations: int, select: str = "topk", **options: Any) -> float:
    """How often the served selection holds the named token, on 300 fresh questions, after
    training."""
    pruner = policy(seed, select, width=32)
    options = {
        "lr_actor": 3e-3,
        "lr_critic": 3e-3,
        "minibatch": 256,
        "update_epochs": 4,
        "entropy_coef": 0.0,
    } | options
    stage = ppo(
        pruner,
        seed=seed,
        dataset=ToyDataset(seed=seed),
        iterations=iterations,
        kl_stop=0.2,
        served=served(120),
        validate_every=10,
        **options,
    )
    fit(stage)
    return _kept_share(pruner)


def _kept_share(pruner: LearnedPruner) -> float:
    test = ToyDataset("test", limit=300)
    samples = [test[i] for i in range(len(test))]
    encoded = lvlm().encode(samples, frozenset({"region"}))
    keep = pruner.select(encoded, SMALL).keep
    assert keep.sum(1).tolist() == [2] * 300
    return float((keep & (encoded.extras["region"] > 0)).sum(1).float().mean())


class TestLearnability:
    """One of 24 tokens, named by the question, holds the answer; two may stay. Blind to the
    question at most one picture in three is answered (6 kinds of objects, 2 tokens)."""

    def test_an_untrained_policy_does_not_know(self) -> None:
        assert _kept_share(policy()) < 0.4
        assert len(KINDS) == 6

    @pytest.mark.parametrize(
        "seed",
        [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)],
    )
    @pytest.mark.parametrize(
        ("select", "iterations", "options"),
        [
            # The cheapest in the default suite; with a critic, PPO's other tests there take its
            # steps.
            pytest.param(
                "topk", 45, {"advantage": "grpo", "prompts": 32, "group": 8}, marks=pytest.mark.slow
            ),
            pytest.param(
                "topk", 45, {"advantage": "gae", "prompts": 64, "group": 4}, marks=pytest.mark.slow
            ),
            ("dpp", 30, {"advantage": "grpo", "prompts": 32, "group": 8}),
        ],
        ids=["grpo", "gae", "dpp-grpo"],
    )
    def test_ppo_learns_to_keep_the_named_token(
        self, select: str, iterations: int, options: dict[str, Any], seed: int
    ) -> None:
        assert learned(seed, iterations, select, **options) > 0.95

    @pytest.mark.slow  # TestBudget in test_ppo_budgets follows Bernoulli episodes of one step
    def test_the_papers_bernoulli_episodes_improve_their_return(self) -> None:
        """Three steps without a budget: the discount starts at keeping 1.6 %, tokens cost beta,
        answers pay alpha."""
        metrics = Metrics()
        reward = WeightedReward([ScoreChange(1.0), TokensSaved(0.1)])
        rates: dict[str, Any] = {"lr_actor": 3e-3, "lr_critic": 3e-3, "kl_stop": 0.2}
        size: dict[str, Any] = {
            "iterations": 26,
            "prompts": 64,
            "group": 2,
            "minibatch": 128,
            "update_epochs": 4,
        }
        fit(ppo(policy(width=32), budget="free", steps=3, reward=reward, **rates, **size), metrics)
        returns = metrics["reward/return"]
        # 128 episodes with a standard deviation of about 0.35: a mean over 8 iterations is known to
        # 0.01.
        assert sum(returns[-8:]) / 8 > sum(returns[:8]) / 8 + 0.06
