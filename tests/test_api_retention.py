"""`tprl.prune(model, pruner, retention=0.98)`: the calibration chooses, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from tests.helpers import untrained_policy
from tests.lvlm.test_families import SAMPLES

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.errors import UserError
from tprl.evaluation.calibration import Calibration, identity
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.recognition import model_print
from tprl.pruners.learned import load_pruner
from tprl.pruners.random import RandomPruner


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


def calibration(lvlm: FrozenLVLM, pruner: Any, questions: int = 200) -> Calibration:
    """A ninth keeps nine answers of ten, a third all of them."""
    model = {"name": lvlm.name, "print": model_print(lvlm.model)}
    about = {"pruner": identity(pruner), "model": model, "dataset": "scenes"}
    scores = [[float(i % 10 > 0), 1.0] for i in range(questions)]
    return Calibration(about, [1 / 9, 1 / 3], [*range(questions)], [1.0] * questions, scores)


def test_it_keeps_as_few_tokens_as_keep_the_promise(llava: FrozenLVLM, tmp_path: Path) -> None:
    """A policy has its calibration beside its weights; for a rule one names the folder."""
    untrained_policy(llava.width).save_pretrained(tmp_path / "policy")
    policy = load_pruner(tmp_path / "policy")
    calibration(llava, policy).save(tmp_path / "policy" / "retention.json")
    with tprl.prune(llava.model, policy, retention=0.95, processor=llava.processor) as pruning:
        assert pruning.keep_ratio == 1 / 3
        llava.model.generate(**stock_inputs(llava, SAMPLES[:1]), max_new_tokens=1)
        assert len(pruning.kept[0][0].indices) == 12
    with tprl.prune(
        llava.model, policy, retention=0.8, confidence=0.99, processor=llava.processor
    ) as pruning:
        assert pruning.keep_ratio == 1 / 9
    (tmp_path / "rules").mkdir()
    calibration(llava, RandomPruner()).save(tmp_path / "rules" / "retention.json")
    with tprl.prune(
        llava.model, "random", retention=1.0, calibration=tmp_path / "rules"
    ) as pruning:
        assert (pruning.pruner.name, pruning.keep_ratio) == ("keep_all", 1.0)


def test_the_same_weights_in_another_type_are_the_same_model(llava: FrozenLVLM) -> None:
    before = model_print(llava.model)
    half = load_component("model", "llava", pretrained=None, dtype="float32").model.bfloat16()
    assert model_print(half) == before
    assert model_print(load_component("model", "qwen2_vl", pretrained=None).model) != before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"retention": 1.5}, r"retention must be a number in \(0, 1\], got 1\.5; use e\.g\. 0\.98"),
        ({"retention": 0.0}, r"retention must be a number in \(0, 1\], got 0.0"),
        (
            {"retention": 0.9, "confidence": 1.0},
            r"confidence must be a number in \(0, 1\), got 1.0",
        ),
        ({"retention": 0.9, "keep_ratio": 0.3}, "keep_ratio=0.3 and retention=0.9 contradict"),
        ({"retention": 0.9, "threshold": 0.3}, "threshold=0.3 and retention=0.9 contradict"),
        (
            {"retention": 0.9, "positions": "compact"},
            "is calibrated for positions=keep",
        ),
        (
            {"retention": 0.995},
            r"retention=0\.995 with confidence=0\.9 cannot be promised from 200 calibration images",
        ),
        ({"keep_ratio": 0.3}, "calibration=.* is not read without a retention"),
        ({"keep_ratio": 0.3, "confidence": 0.8}, "confidence=0.8 is not read without a retention"),
    ],
)
def test_what_it_refuses(
    llava: FrozenLVLM, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    calibration(llava, RandomPruner()).save(tmp_path / "retention.json")
    with pytest.raises(UserError, match=sentence):
        tprl.prune(llava.model, "random", **options, calibration=tmp_path)
    assert "generate" not in vars(llava.model)


def test_a_calibration_that_is_missing_or_of_another_model(
    llava: FrozenLVLM, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="pruner random has no calibration to choose its tokens by: make one by"
    ):
        tprl.prune(llava.model, "random", retention=0.9)
    other = load_component("model", "llava_next", pretrained=None, dtype="float32")
    calibration(other, RandomPruner()).save(tmp_path / "retention.json")
    with pytest.raises(UserError, match="pruner random was calibrated on other weights"):
        tprl.prune(llava.model, "random", retention=0.9, calibration=tmp_path)
