"""What PPO keeps, saves and goes on with."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.stages.toy_runs import (
    LastWeights,
    SaveAt,
    fit,
    lvlm,
    policy,
    ppo,
    same,
    weights,
)
from torch import nn

from tprl.lvlm.toy import ToyLVLM
from tprl.scoring.validation import ServedScore
from tprl.stages.ppo import PPO

BUDGETS = [("free", "topk"), ("lagrange", "topk"), ("exact_k", "topk"), ("exact_k", "dpp")]
every_budget = pytest.mark.parametrize(
    ("budget", "select"), BUDGETS, ids=["-".join(pair) for pair in BUDGETS]
)


class Scripted(ServedScore):
    """Answers from a list and remembers the weights it was shown."""

    def __init__(self, script: list[tuple[float, float]]) -> None:
        self.script, self.seen = script, []

    def __call__(self, pruner: Any) -> dict[str, float]:
        self.seen.append(weights(pruner))
        accuracy, log_prob = self.script[len(self.seen) - 1]
        return {"accuracy": accuracy, "log_prob": log_prob}


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("script", "best"),
        [
            ([(0.1, -1.0), (0.9, -1.0), (0.3, -1.0), (0.2, -1.0)], 1),
            # equal accuracy: the likelier answers
            ([(0.5, -1.0), (0.5, -0.8), (0.5, -0.9), (0.5, -1.0)], 1),
            ([(0.9, -9.0), (0.1, -1.0), (0.1, -1.0), (0.1, -1.0)], 0),  # training only harmed
        ],
    )
    def test_the_best_served_weights_are_put_back(
        self, script: list[tuple[float, float]], best: int
    ) -> None:
        scripted = Scripted(script)
        stage = ppo(served=scripted, iterations=3, validate_every=1)
        fit(stage)
        assert not any(same(first, other) for first, other in pairwise(scripted.seen))
        assert same(weights(stage.pruner), scripted.seen[best])
        assert [accuracy for _, accuracy in stage.curves["served"]] == [
            accuracy for accuracy, _ in script
        ]
        assert [seen for seen, _ in stage.curves["served"]] == [0, 8, 16, 24]

    def test_holds_the_pruner_and_nothing_else(self) -> None:
        class WithModule(ToyLVLM):
            model = nn.Linear(3, 3)

        stage = ppo(lvlm=WithModule(width=lvlm().width))
        assert set(stage.state_dict()) == {f"pruner.{name}" for name in stage.pruner.state_dict()}

    def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(self) -> None:
        runs = []
        for seed in (0, 0, 1):
            last = LastWeights()
            fit(ppo(seed=seed, steps=3, budget="free"), last)
            runs.append(last.weights)
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2])

    @pytest.mark.parametrize("budget", ["lagrange", "exact_k"])
    def test_three_and_three_resumed_equal_six(self, budget: str, tmp_path: Path) -> None:
        def stage(seed: int) -> PPO:
            return ppo(
                policy(seed),
                iterations=6,
                validate_every=2,
                budget=budget,
                steps=2,
                keep_ratio=[0.2, 0.4],
            )

        whole, resumed = stage(0), stage(7)  # the second one's own initial weights must not matter
        ends = LastWeights(), LastWeights()
        fit(whole, ends[0], SaveAt(3, tmp_path / "half.ckpt"))
        trainer = fit(resumed, ends[1], ckpt_path=tmp_path / "half.ckpt")
        assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 6
        assert resumed.iteration == 6
        assert same(ends[0].weights, ends[1].weights)
        assert same(weights(whole.pruner), weights(resumed.pruner))
        for name in ("lagrange", "samples_seen", "best", "curves"):
            assert getattr(whole, name) == getattr(resumed, name)
