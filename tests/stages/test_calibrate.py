"""How relevance fades above the trained keep ratios is chosen by validation likelihood."""

import pytest
import torch
from tests.stages.toy_runs import policy, served

from tprl.pruners.learned import LearnedPruner
from tprl.pruners.serving import Serving
from tprl.stages.calibrate import FADES, calibrate_fade


def test_the_fade_with_the_best_likelihood_above_the_trained_ratios_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[float, float]] = []

    def log_prob(pruner: LearnedPruner, ratio: float) -> float:
        asked.append((ratio, pruner.serving.fade))
        # both reached by a fade of 1
        return -abs(pruner.serving.quality_at(ratio) - {0.5: 0.8, 0.25: 1.6}[ratio])

    pruner, judge = policy(select="dpp"), served(limit=1)
    monkeypatch.setattr(judge, "log_prob", log_prob)
    calibrate_fade(pruner, judge, 0.2, [0.5, 0.25, 0.2, 0.1])
    assert asked == [(ratio, fade) for fade in FADES for ratio in (0.5, 0.25)]
    assert (pruner.serving.trained_to, pruner.serving.fade, pruner.serving.quality) == (
        0.2,
        1.0,
        2.0,
    )


def test_it_measures_what_is_served() -> None:
    pruner, judge = policy(select="dpp"), served(limit=12, keep_ratios=(0.5,))
    with torch.no_grad():
        # so that relevance is not drowned by diversity at any fade
        pruner.net.policy_head.out.weight.mul_(300)
    calibrate_fade(pruner, judge, 0.1, [0.5])
    best = judge(pruner)["log_prob"]
    assert judge.log_prob(pruner, 0.5) == pytest.approx(best, abs=1e-6)
    result = []
    for fade in FADES:
        pruner.serving = Serving(trained_to=0.1, fade=fade)
        result.append(judge(pruner)["log_prob"])
    assert best == max(result)
    assert len(set(result)) > 1


@pytest.mark.parametrize(("select", "ratios"), [("topk", [0.5]), ("dpp", [0.1, 0.2])])
def test_nothing_to_choose(
    select: str, ratios: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    pruner = policy(select=select)
    before = pruner.serving
    with caplog.at_level("INFO"):
        calibrate_fade(pruner, served(limit=4), 0.2, ratios)
    assert pruner.serving == before
    assert f"nothing to calibrate: no DPP serves, or none of {ratios} is above 0.2" in caplog.text


def test_quality_is_constant_up_to_the_trained_ratio_and_falls_by_a_power_above() -> None:
    serving = Serving(quality=3.0, trained_to=0.1, fade=0.5)
    assert [serving.quality_at(ratio) for ratio in (0.01, 0.1, 0.4)] == pytest.approx(
        [3.0, 3.0, 1.5]
    )
    assert Serving(quality=3.0).quality_at(0.9) == 3.0
