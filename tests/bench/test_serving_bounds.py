"""What FLOPs say of a whole request: the table in experiments/serving/README.md."""

import re
from pathlib import Path

import pytest

from tprl.cost.flops import lm_layer_flops, mlp_flops, tower_flops
from tprl.cost.shapes import LMShape, VisionShape

PAGE = Path(__file__).parents[2] / "experiments" / "serving" / "README.md"
TOWER = VisionShape(24, 1024, 4096, 16, 576, 14)  # CLIP ViT-L/14 at 336 pixels
MODELS = {
    "LLaVA-1.5-7B's": LMShape(32, 4096, 11008, 32, 32, 128, 32064),
    "the 78 M above": LMShape(11, 768, 2048, 12, 12, 64, 32064),
}
SHARES = {"1/3": 192, "1/9": 64, "1/18": 32}
TOKENS, WORDS, LENGTH = 576, 64, 8
ROWS = re.findall(r"^\| (.+?) \| (1/\d+) \| ([\d.]+)x \| ([\d.]+)x \|$", PAGE.read_text(), re.M)


def language_flops(model: LMShape, visual: int) -> int:
    """A prompt and its answer, whose first token comes with the prompt."""
    prompt = WORDS + visual
    contexts = [(prompt, prompt)] + [(1, prompt + step) for step in range(1, LENGTH)]
    return sum(
        lm_layer_flops(layer, new, context, kind)
        for new, context in contexts
        for layer, kind in model.blocks
    )


def test_the_page_has_rows_of_both_models() -> None:
    assert {row[0] for row in ROWS} == set(MODELS)


@pytest.mark.parametrize(("name", "share", "alone", "whole"), ROWS)
def test_gains_are_those_of_the_cost_model(name: str, share: str, alone: str, whole: str) -> None:
    model = MODELS[name]
    seeing = tower_flops(TOWER, (24, 24)) + mlp_flops((1024, model.width, model.width), TOKENS)
    assert seeing == pytest.approx(0.4e12, rel=0.05)
    full, kept = language_flops(model, TOKENS), language_flops(model, SHARES[share])
    assert float(alone) == pytest.approx(full / kept, abs=0.05)
    assert float(whole) == pytest.approx((seeing + full) / (seeing + kept), abs=0.05)
