"""Calibrations: how they are made, what they choose, and what they say nothing of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pruners.test_adaptive import ENCODED, policy

from tprl.build import load_component
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.evaluation.calibrating import calibrate
from tprl.evaluation.calibration import (
    PRICES,
    Calibration,
    bought_at,
    calibration_of,
    identity,
    read_calibration,
)
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.adaptive import Adaptive
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.random import RandomPruner
from tprl.scoring.scorer import Scorer
from tprl.splice import splice

LVLM, QUESTIONS, PRUNER = ToyLVLM(), ToyDataset("val"), ClsAttentionPruner()
RATIOS = (1 / 24, 0.25)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    (fresh,) = calibrate(LVLM, QUESTIONS, [PRUNER], RATIOS, 40, batch_size=16, split="val")
    return fresh


def test_scores_are_those_of_the_evaluation(calibration: Calibration) -> None:
    samples = [QUESTIONS[i] for i in range(40)]
    encoded = LVLM.encode(samples, PRUNER.extras)
    scorer = Scorer(LVLM, QUESTIONS, frozenset({"score"}))
    for column, ratio in enumerate(RATIOS):
        scored = scorer(samples, splice(encoded, PRUNER.select(encoded, ratio)))
        assert [row[column] for row in calibration.pruned] == scored.score.tolist()
    assert set(calibration.full) == {1.0}
    # Some are lost with a token, and questions about one image share its number.
    assert 0 < np.mean(calibration.pruned, axis=0)[0] < np.mean(calibration.pruned, axis=0)[1]
    assert len(set(calibration.images)) == len({s.uid.rpartition("/")[0] for s in samples})


def test_without_labels_the_answers_with_all_tokens_are_right(calibration: Calibration) -> None:
    (fresh,) = calibrate(LVLM, QUESTIONS, [PRUNER], RATIOS, 40, batch_size=16, labels=False)
    assert fresh.agreement
    assert fresh.full == [1.0] * 40
    # The toy is right with all tokens, so what agrees with it is what is right.
    assert fresh.pruned == calibration.pruned


def test_what_questions_buy_is_what_the_adaptive_pruner_keeps() -> None:
    adaptive = Adaptive(policy())
    forecasts = np.array(adaptive.forecasts(ENCODED).tolist())
    bought = bought_at(forecasts, np.array(adaptive.budgets))
    sizes = torch.stack([adaptive.at_budget(ENCODED, b).count for b in adaptive.budgets], 1)
    chosen = set()
    for column, price in list(enumerate(PRICES))[::5]:
        kept = Adaptive(adaptive.pruner, price).select(ENCODED, None).count
        expected = sizes.gather(1, torch.tensor(bought[:, [column]])).squeeze(1)
        assert torch.equal(kept, expected)
        chosen |= set(bought[:, column].tolist())
    assert chosen == {0, 1, 2}


def many(pruned: list[list[float]], **others: object) -> Calibration:
    """Of 400 questions about an image each; of `pruned` every row stands for 100."""
    rows = [row for row in pruned for _ in range(100)]
    about = {
        "pruner": identity(PRUNER),
        "model": {"name": "toy", "print": "toy of width 32"},
        "dataset": "toy",
    }
    settings: Any = others
    return Calibration(about, RATIOS, range(400), [1.0] * 400, rows, **settings)


def test_it_serves_the_fewest_tokens_that_keep_the_promise() -> None:
    quarter = many([[1.0, 1.0]] * 3 + [[0.0, 1.0]])
    assert quarter.serve(PRUNER, 0.95, 0.9) == (PRUNER, 0.25, 0.25)
    assert quarter.serve(PRUNER, 0.6, 0.9) == (PRUNER, 1 / 24, 1 / 24)
    lossy = many([[0.0, 0.0]] + [[1.0, 1.0]] * 3)
    pruner, ratio, kept = lossy.serve(PRUNER, 0.95, 0.9)
    assert (type(pruner), ratio, kept) == (KeepAll, 1.0, 1.0)


def test_an_adaptive_pruner_is_served_at_a_price() -> None:
    """Questions whose forecast is flat can do with a token; the others need a quarter of them."""
    flat, steep = [0.8, 0.8], [0.1, 0.9]
    forecasts = [row for row in (flat, flat, flat, steep) for _ in range(100)]
    fresh = many([[1.0, 1.0]] * 3 + [[0.0, 1.0]], forecasts=forecasts)
    pruner = policy()
    served, ratio, kept = fresh.serve(Adaptive(pruner), 0.95, 0.9)
    assert ratio is None
    assert kept == pytest.approx((3 / 24 + 0.25) / 4)
    assert isinstance(served, Adaptive)
    # Up to a price of 0.8 / (1/4 - 1/24) the last quarter still buys.
    assert served.fixed_price == max(price for price in PRICES if price < 3.84)


def test_a_saved_calibration_is_read_back(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "retention.json"
    calibration.save(path)
    assert read_calibration(path) == replace(calibration, keep_ratios=list(RATIOS))
    assert calibration_of(PRUNER, tmp_path) == read_calibration(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "full": content["full"][1:]}))
    with pytest.raises(UserError, match=r"retention\.json is damaged \(its content differs"):
        read_calibration(path)
    (tmp_path / ".sums" / "retention.json.sha256").unlink()
    with pytest.raises(UserError, match=r"is damaged \(it has \(40, 2\) scores\)"):
        read_calibration(path)
    path.write_text(json.dumps({**content, "forecasts": [[0.5]]}))
    with pytest.raises(UserError, match=r"is damaged \(it has \(1, 1\) forecasts\)"):
        read_calibration(path)


def test_it_belongs_to_a_pruner_a_model_and_a_dataset(
    calibration: Calibration, tmp_path: Path
) -> None:
    calibration.check(LVLM, PRUNER, "toy")
    with pytest.raises(UserError, match="calibrated on other weights than this model's"):
        calibration.check(ToyLVLM(width=40), PRUNER)
    with pytest.raises(UserError, match="on questions of toy, and these are of scenes"):
        calibration.check(LVLM, PRUNER, "scenes")
    with pytest.raises(UserError, match="another state of pruner cls_attention"):
        calibration.check(LVLM, RandomPruner())
    assert identity(RandomPruner(seed=1)) == identity(RandomPruner(seed=2))
    # A policy that was trained on is another state.
    learned = policy()
    before = identity(learned)
    with torch.no_grad():
        learned.net.policy_head.out.weight.add_(1)
    assert identity(learned) != before
    with pytest.raises(
        UserError,
        match=r"pruner cls_attention has no calibration in .*: make one by "
        r"`python -m src\.eval mode=calibrate run=.*`",
    ):
        calibration_of(PRUNER, tmp_path)


def test_what_ships_promises_out_of_the_box() -> None:
    lvlm = load_component("model", "tiny_llava")
    shares = []
    for name in ("tprl", "tprl_adaptive"):
        pruner = load_component("pruner", name)
        shipped = calibration_of(pruner)
        shipped.check(lvlm.model, pruner, "scenes")
        assert shipped.about["split"] == "test"
        shares.append(shipped.serve(pruner, 0.98, 0.9).kept)
        assert shares[-1] < 1
    assert shares[1] < shares[0]  # budgets per question need fewer tokens for the same promise


def test_the_pruner_of_crowd_ships_with_promises_too() -> None:
    lvlm = load_component("model", "tiny_crowd")
    pruner = load_component("pruner", "tprl", pretrained="tprl_tiny_crowd")
    shipped = calibration_of(pruner)
    shipped.check(lvlm.model, pruner, "crowd")
    assert shipped.about["split"] == "test"
    shares = [shipped.serve(pruner, retention, 0.9).kept for retention in (0.98, 0.95, 0.9)]
    assert shares == [1.0, 0.3333, 0.1111]
    with pytest.raises(UserError, match="from 334 calibration images: about 347 are needed"):
        shipped.serve(pruner, 0.99, 0.9)
