"""The RL correctness list of the method, each line a test, through the real stage and a real
Trainer."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.stages.toy_runs import (
    SMALL,
    LastWeights,
    Metrics,
    fit,
    lvlm,
    policy,
    ppo,
    weights,
)
from torch import Tensor

from tprl.data.toy import KINDS, ToyDataset
from tprl.lvlm.toy import ToyLVLM
from tprl.rewards import Term, WeightedReward
from tprl.rewards.fidelity import Fidelity
from tprl.rewards.flops_saved import FlopsSaved
from tprl.rewards.log_likelihood import LogLikelihood
from tprl.rewards.score_change import ScoreChange
from tprl.rewards.tokens_saved import TokensSaved
from tprl.rl.ppo import PPOLoss
from tprl.rl.rollout import Rollout, evaluate_actions
from tprl.scoring.ahead import Ready
from tprl.scoring.flops import question_flops
from tprl.scoring.scorer import Scorer
from tprl.scoring.validation import ServedScore
from tprl.splice import splice
from tprl.stages.ppo import PPO, Episodes
from tprl.types import Outcome, Prompt, Sample, TokenSelection


class Recorded(WeightedReward):
    """Keeps what it is asked about."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__(terms)
        self.outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> dict[str, Tensor]:
        self.outcomes.append(outcome)
        return super().__call__(outcome)


class Probe(PPO):
    """Keeps what one iteration hands on: rollouts, outcomes, losses before and during the
    update."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reward = Recorded(self.reward.terms)
        self.outcomes = self.reward.outcomes
        self.before: list[PPOLoss] = []
        self.first: list[PPOLoss] = []
        self.drift: list[float] = []
        self.rollouts: list[Rollout] = []
        self.uids: list[list[str]] = []
        self.rewards: list[Tensor] = []

    def training_step(self, batch: Ready, index: int) -> None:
        self.uids.append([sample.uid for sample in batch.samples])
        super().training_step(batch, index)

    def _advantage(self, reward: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        self.rewards.append(reward)
        return super()._advantage(reward, rollout)

    def _update(self, episodes: Episodes) -> tuple[list[PPOLoss], int]:
        x, rule, rollout, keep_ratio = episodes[:4]
        self.rollouts.append(rollout)
        with torch.no_grad():
            self.before.append(self._loss(episodes))
            for t in range(len(rollout.alive)):
                group = self.hparams["group"]
                again = evaluate_actions(self.net, x, rule, rollout, keep_ratio, t, group)[0]
                self.drift.append(float((again - rollout.log_prob[t]).abs().max()))
        losses, epochs = super()._update(episodes)
        self.first.append(losses[0])
        return losses, epochs


def probed(**options: Any) -> Probe:
    stage = ppo(kind=Probe, **options)
    assert isinstance(stage, Probe)
    fit(stage)
    return stage


def asked(uid: str) -> Sample:
    """The question of the training split with this uid."""
    *_, picture, kind = uid.split("/")
    return ToyDataset()[int(picture) * len(KINDS) + KINDS.index(kind)]


class TestRatio:
    @pytest.mark.parametrize(
        ("budget", "select", "advantage", "group"),
        [  # every budget, every way of choosing, every kind of advantage
            ("free", "topk", "gae", 1),
            ("lagrange", "topk", "grpo", 4),
            ("exact_k", "topk", "gae", 1),
            ("exact_k", "dpp", "grpo", 4),
            *(
                pytest.param(*pair, marks=pytest.mark.slow)
                for pair in (
                    ("free", "topk", "grpo", 4),
                    ("lagrange", "topk", "gae", 1),
                    ("exact_k", "topk", "grpo", 4),
                    ("exact_k", "dpp", "gae", 1),
                )
            ),
        ],
    )
    def test_is_exactly_one_before_the_first_update_of_every_iteration(
        self, budget: str, select: str, advantage: str, group: int
    ) -> None:
        options = {"advantage": advantage, "group": group, "prompts": 16 // group, "minibatch": 16}
        stage = probed(
            pruner=policy(select=select), budget=budget, steps=3, iterations=2, **options
        )
        assert len(stage.drift) == 6  # three steps in each of two iterations
        assert stage.drift == [0.0] * 6
        for loss in stage.before:
            assert (float(loss.kl), float(loss.clip_fraction), float(loss.ratio_max)) == (
                0.0,
                0.0,
                1.0,
            )

    @pytest.mark.parametrize(
        ("budget", "select"),
        [
            ("exact_k", "topk"),
            ("exact_k", "dpp"),
            pytest.param("free", "topk", marks=pytest.mark.slow),
            pytest.param("lagrange", "topk", marks=pytest.mark.slow),
        ],
    )
    def test_stays_at_one_within_rounding_in_a_shuffled_minibatch(
        self, budget: str, select: str
    ) -> None:
        stage = probed(
            pruner=policy(select=select), budget=budget, steps=3, iterations=2, minibatch=4
        )
        for loss in stage.first:
            assert float(loss.kl) < 1e-9
            assert float(loss.clip_fraction) == 0
            assert float(loss.ratio_max) == pytest.approx(1, abs=1e-4)

    def test_moves_once_the_weights_have_moved(self) -> None:
        metrics = Metrics()
        fit(ppo(minibatch=8, update_epochs=4), metrics)
        assert min(metrics["ppo/kl"]) > 1e-6


class TestRollouts:
    @pytest.mark.parametrize("select", ["topk", "dpp"])
    def test_sampled_counts_are_the_budgets(self, select: str) -> None:
        stage = probed(
            pruner=policy(select=select),
            steps=3,
            keep_ratio=[0.5, 1 / 12],
            prompts=32,
            iterations=1,
        )
        counts = {tuple(column) for column in stage.outcomes[0].kept.T.tolist()}
        assert counts == {(24, 19, 15, 12), (24, 10, 5, 2)}

    def test_each_iteration_reads_fresh_questions(self) -> None:
        stage = probed(iterations=4)
        seen = [uid for uids in stage.uids for uid in uids]
        assert len(set(seen)) == len(seen) == 32

    def test_masks_are_nested(self) -> None:
        stage = probed(steps=3, budget="free")
        for rollout in stage.rollouts:
            assert not (rollout.action[1:] & ~rollout.action[:-1]).any()
            assert torch.equal(rollout.alive[1:], rollout.action[:-1])

    def test_episodes_of_a_group_differ_and_share_their_question(self) -> None:
        stage = probed(prompts=4, group=8, advantage="grpo")
        actions = stage.rollouts[0].action[-1].unflatten(0, (4, 8))
        assert all(len({tuple(row.tolist()) for row in group}) > 1 for group in actions)
        assert stage.outcomes[0].uids == tuple(uid for uid in stage.uids[0] for _ in range(8))


class TestReward:
    def test_the_first_step_is_compared_with_the_full_token_score(self) -> None:
        """The toy model is right with all tokens, so a lost answer costs 1 and a kept one earns 0,
        not 1."""
        stage = probed(steps=3, prompts=16, reward=WeightedReward([ScoreChange()]))
        for outcome, reward in zip(stage.outcomes, stage.rewards, strict=True):
            assert outcome.score is not None
            assert torch.equal(outcome.score[0], torch.ones(16))
            assert torch.equal(reward[0], outcome.score[1] - 1)
            assert torch.equal(reward.sum(0), outcome.score[-1] - 1)
            assert 0 < float(outcome.score[-1].mean()) < 1

    def test_is_the_sum_of_the_weighted_terms(self) -> None:
        reward = WeightedReward([ScoreChange(2.0), LogLikelihood(0.5), TokensSaved(0.25)])
        stage, metrics = ppo(kind=Probe, reward=reward, budget="free"), Metrics()
        fit(stage, metrics)
        terms = ("score_change", "log_likelihood", "tokens_saved")
        total = [sum(row[f"reward/{term}"] for term in terms) for row in metrics.rows]
        assert metrics["reward/return"] == pytest.approx(total, abs=1e-5)
        assert all(row["reward/tokens_saved"] > 0 for row in metrics.rows)

    def test_states_are_scored_as_one_by_one(self) -> None:
        """Three steps at once give the rewards of a pass per step."""
        stage = probed(
            steps=3, prompts=6, group=2, reward=WeightedReward([ScoreChange(), LogLikelihood()])
        )
        for uids, rollout, outcome in zip(stage.uids, stage.rollouts, stage.outcomes, strict=True):
            assert outcome.score is not None
            assert outcome.log_prob is not None
            samples = [asked(uid) for uid in uids for _ in range(2)]
            encoded = lvlm().encode(samples)
            states = [encoded.visual_mask, *rollout.action]
            for t, keep in enumerate(states):
                alone = Scorer(lvlm(), ToyDataset())(samples, splice(encoded, TokenSelection(keep)))
                torch.testing.assert_close(
                    outcome.log_prob[t], alone.log_prob, atol=1e-6, rtol=1e-6
                )
                assert torch.equal(outcome.score[t], alone.score)
        assert stage.scorer.evaluations == 2 * (6 + 3 * 12)

    def test_fidelity_reads_no_label(self) -> None:
        class Unlabelled(ToyDataset):
            def __getitem__(self, index: int) -> Sample:
                return super().__getitem__(index)._replace(answers=())

        arguments = ServedScore(lvlm(), Unlabelled("val"), (SMALL,), 24, labels=False)
        stage = probed(
            dataset=Unlabelled(), reward=WeightedReward([Fidelity()]), steps=2, served=arguments
        )
        for outcome, reward in zip(stage.outcomes, stage.rewards, strict=True):
            assert outcome.answer_kl is not None
            assert outcome.log_prob is None
            torch.testing.assert_close(reward.sum(0), -outcome.answer_kl[-1].clamp(max=4.0))
            assert float(outcome.answer_kl[-1].max()) > 1

    def test_flops_are_those_of_the_evaluation(self) -> None:
        stage = probed(reward=WeightedReward([ScoreChange(), FlopsSaved()]), budget="free", steps=2)
        outcome = stage.outcomes[0]
        assert outcome.flops is not None
        for i, uid in enumerate(outcome.uids):
            sample = asked(uid)
            encoded = lvlm().encode([sample])
            kept = outcome.kept[1:, i].tolist()
            costs = [
                question_flops(stage.scorer, encoded, 0, sample, policy(), [count])
                for count in kept
            ]
            expected = [costs[0][1], *(cost for cost, _ in costs)]
            assert outcome.flops[:, i].tolist() == pytest.approx(expected, rel=1e-6)
        assert (outcome.flops[2] <= outcome.flops[1]).all()
        # the policy itself costs
        assert (outcome.flops[1] > outcome.flops[0])[outcome.kept[1] == 24].all()

    def test_a_failing_scorer_raises_through_training(self) -> None:
        class Broken(ToyLVLM):
            def score(self, prompt: Prompt, answers: Any) -> tuple[Tensor, Tensor]:
                if int(prompt.visual.sum(1).min()) < 24:
                    raise RuntimeError("the evaluator is gone")
                return super().score(prompt, answers)

        with pytest.raises(RuntimeError, match="the evaluator is gone"):
            fit(ppo(lvlm=Broken(width=lvlm().width)))

    def test_a_measurement_that_was_not_made_raises(self) -> None:
        class Forgetful(ScoreChange):
            needs = frozenset({"log_prob"})

        with pytest.raises(ValueError, match=r"outcome\.score"):
            fit(ppo(reward=WeightedReward([Forgetful()])))


class TestSpeed:
    def test_evaluations_per_second_and_the_time_of_every_phase_are_logged(self) -> None:
        metrics = Metrics()
        fit(ppo(steps=2, iterations=3), metrics)
        phases = ("encode", "rollout", "score", "update")
        for row in metrics.rows:
            seconds = [row[f"time/{phase}"] for phase in phases]
            assert min(seconds) > 0
            # 8 prompts with all tokens, and two states of each
            assert row["ppo/evaluations_per_second"] * sum(seconds) == pytest.approx(24, rel=1e-3)


class TestUpdate:
    def test_kl_stop_ends_the_update_after_an_epoch(self) -> None:
        early, late = Metrics(), Metrics()
        fit(ppo(kl_stop=0.0, update_epochs=5), early)
        fit(ppo(kl_stop=1e9, update_epochs=5), late)
        assert (early["ppo/update_epochs"], late["ppo/update_epochs"]) == ([1.0, 1.0], [5.0, 5.0])

    @pytest.mark.parametrize("term", ["entropy_coef", "value_coef"])
    def test_entropy_and_value_terms_reach_the_trunk(self, term: str) -> None:
        runs = []
        for coefficient in (0.0, 0.5):
            changes: dict[str, Any] = {term: coefficient}
            stage = ppo(grad_clip=1e9, iterations=1, **changes)
            fit(stage)
            runs.append(weights(stage.pruner))
        changed = {name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])}
        assert any(name.startswith("net.blocks") for name in changed)
        assert any(name.startswith("net.code_in") for name in changed)

    def test_gradient_clipping_covers_trunk_and_heads_together(self) -> None:
        norms: list[dict[str, float]] = []

        class Norms(pl.Callback):
            def on_before_optimizer_step(
                self, trainer: pl.Trainer, pl_module: Any, optimizer: Any
            ) -> None:
                named = pl_module.pruner.net.named_parameters()
                norms.append(
                    {name: float(p.grad.norm()) for name, p in named if p.grad is not None}
                )

        fit(ppo(grad_clip=1e-3), Norms())
        assert len(norms) == 8  # two iterations, two epochs, two minibatches
        for parts in norms:
            assert math.hypot(*parts.values()) == pytest.approx(1e-3, rel=1e-3)
            assert all(
                any(parts[name] > 0 for name in parts if name.startswith(p))
                for p in ("blocks", "value", "policy")
            )

    def test_learning_rates_fall_linearly_to_nearly_zero(self) -> None:
        rates: list[list[float]] = []

        class Rates(pl.Callback):
            def on_train_batch_end(
                self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        fit(ppo(iterations=5, lr_actor=1.0e-3, lr_critic=2e-3), Rates())
        assert torch.tensor(rates) == pytest.approx(
            torch.tensor([[1e-3, 2e-3], [8e-4, 1.6e-3], [6e-4, 1.2e-3], [4e-4, 8e-4], [2e-4, 4e-4]])
        )
        rates.clear()
        fit(ppo(iterations=2, lr_actor=1e-3, lr_critic=2e-3, anneal=False), Rates())
        assert rates == [[1e-3, 2e-3]] * 2

    def test_the_critic_has_its_own_rate(self) -> None:
        stage = ppo(iterations=1, lr_actor=0.0)
        before = weights(stage.pruner)
        last = LastWeights()
        fit(stage, last)
        changed = {name for name in before if not torch.equal(before[name], last.weights[name])}
        assert changed
        assert all(name.startswith("net.value_head") for name in changed)

    def test_temperature_moves_from_first_to_last(self) -> None:
        stage = ppo(iterations=5, temperature=(1.0, 0.2))
        temperatures = []
        for stage.iteration in range(5):
            temperatures.append(stage.rule().temperature)
        assert temperatures == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])

    @pytest.mark.parametrize("advantage", ["grpo", "rloo"])
    def test_a_group_baseline_leaves_the_critic_alone(self, advantage: str) -> None:
        stage, last = ppo(advantage=advantage, group=4), LastWeights()
        before = weights(stage.pruner)
        fit(stage, last)
        assert all(
            torch.equal(before[n], last.weights[n]) == n.startswith("net.value_head")
            for n in before
        )
