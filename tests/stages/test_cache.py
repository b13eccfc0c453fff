"""Stages that find what an earlier run computed end with the same bits as those that do not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.plain import build_stage
from tests.stages.toy_runs import LastWeights, fit, policy, ppo, same, served, weights

from tprl.data.toy import ToyDataset
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.mlp import MLPPruner
from tprl.rewards import WeightedReward
from tprl.rewards.fidelity import Fidelity
from tprl.rewards.score_change import ScoreChange
from tprl.runtime.store import Cache
from tprl.stages.lfd import LfD
from tprl.types import Encoded, Prompt, Sample


class Counting(ToyLVLM):
    """Counts the prompts that it reads whole."""

    def __init__(self) -> None:
        super().__init__(width=24)
        self.encoded, self.whole = 0, 0

    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        self.encoded += len(samples)
        return super().encode(samples, extras)

    def score(self, prompt: Prompt, answers: Sequence[str]) -> Any:
        self.whole += int((prompt.visual.sum(1) == 24).sum())
        return super().score(prompt, answers)

    def answer(self, prompt: Prompt) -> list[str]:
        self.whole += int((prompt.visual.sum(1) == 24).sum())
        return super().answer(prompt)


class TestLfD:
    @pytest.mark.parametrize("kind", ["tprl", "mlp"])
    def test_the_same_weights_with_and_without_an_earlier_store(
        self, kind: str, tmp_path: Path
    ) -> None:
        ends, encoded = [], []
        for cache in (None, Cache(tmp_path, {}), Cache(tmp_path, {})):
            lvlm, end = Counting(), LastWeights()
            torch.manual_seed(0)
            learner = (
                policy(code_width=8) if kind == "tprl" else MLPPruner(24, code_width=8, width=16)
            )
            options: dict[str, Any] = {
                "keep_ratio": [0.25, 0.5],
                "steps": 2,
                "epochs": 2,
                "batch_size": 16,
            }
            live: dict[str, Any] = {
                "pruner": learner,
                "lvlm": lvlm,
                "dataset": ToyDataset(),
                "served": served(),
            }
            live |= {"demonstrator": ClsAttentionPruner(), "cache": cache}
            stage = build_stage(LfD, **live, demonstrations=64, **options)
            start = weights(learner)
            fit(stage, end)
            ends.append(end.weights)
            encoded.append(lvlm.encoded)
        assert encoded == [64, 64, 0]
        assert not same(ends[0], start)  # something was learned that could differ
        assert same(ends[0], ends[1])
        assert same(ends[0], ends[2])


class TestPPO:
    @pytest.mark.parametrize("reward", [ScoreChange, Fidelity])
    def test_the_same_weights_and_no_prompt_read_whole_twice(
        self, reward: Any, tmp_path: Path
    ) -> None:
        ends, whole = [], []
        for cache, seed in [
            (None, 0),
            (Cache(tmp_path, {}), 0),
            (Cache(tmp_path, {}), 0),
            (Cache(tmp_path, {}), 1),
        ]:
            lvlm, last = Counting(), LastWeights()
            stage = ppo(
                policy(), lvlm=lvlm, reward=WeightedReward([reward()]), cache=cache, seed=seed
            )
            fit(stage, last)
            ends.append(last.weights)
            whole.append(lvlm.whole)
        assert whole == [16, 16, 0, 16]
        assert not same(ends[0], weights(policy()))  # something was learned that could differ
        assert same(ends[0], ends[1])
        assert same(ends[0], ends[2])
        assert len(list(tmp_path.glob("scores-*"))) == 2  # other seeds draw other batches
