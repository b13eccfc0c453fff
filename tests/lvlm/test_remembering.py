"""A conversation about an image: the tower runs once, and every turn is answered as if it ran."""

from typing import Any

import pytest
import torch
from tests.helpers import untrained_policy

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.frozen import FrozenLVLM

QUESTIONS = [Scenes("test")[i] for i in range(6)]  # five about an image, one about the next


@pytest.mark.parametrize(
    "family",
    ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_vl", "internvl3"))],
)
def test_a_new_question_about_the_same_image_needs_no_tower(family: str) -> None:
    lvlm: FrozenLVLM = load_component("model", family, pretrained=None, dtype="float32")
    runs: list[int] = []
    tower: Any = next(
        module
        for name, module in lvlm.model.named_modules()
        if name in ("model.vision_tower", "model.visual")  # by family
    )
    tower.register_forward_hook(lambda *call: runs.append(1))
    policy = untrained_policy(lvlm.width)
    how = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    expected, kept, answers, kept_again = [], [], [], []
    turns = [stock_inputs(lvlm, [QUESTIONS[i]]) for i in (0, 1, 5, 2)]
    with tprl.prune(lvlm.model, policy, keep_ratio=0.25, processor=lvlm.processor) as pruning:
        for turn in turns:
            expected.append(lvlm.model.generate(**turn, **how).logits[0])
            kept.append(pruning.kept[0][0].indices)
    assert len(runs) == 4
    assert pruning.encoded is None
    runs.clear()
    with tprl.prune(
        lvlm.model, policy, keep_ratio=0.25, processor=lvlm.processor, reuse_images=True
    ) as pruning:
        for turn in turns:
            answers.append(lvlm.model.generate(**turn, **how).logits[0])
            kept_again.append(pruning.kept[0][0].indices)
            assert pruning.encoded is not None
            assert pruning.encoded.input_ids.shape == turn["input_ids"].shape
    # Two questions about the first image, one about another, and the first image again.
    assert pruning.look is not None
    assert len(runs) == pruning.look.runs == 3
    assert all(map(torch.equal, answers, expected))
    assert all(map(torch.equal, kept_again, kept))
    assert not torch.equal(expected[0], expected[1])


def test_pixels_that_changed_in_place_are_seen_anew() -> None:
    lvlm: FrozenLVLM = load_component("model", "llava", pretrained=None, dtype="float32")
    turn = stock_inputs(lvlm, [QUESTIONS[0]])
    with tprl.prune(lvlm.model, "uniform", keep_ratio=0.25, reuse_images=True) as pruning:
        lvlm.model.generate(**turn, max_new_tokens=1)
        turn["pixel_values"][0, 0, 0, 0] += 1
        lvlm.model.generate(**turn, max_new_tokens=1)
        lvlm.model.generate(**turn, max_new_tokens=1)
    assert pruning.look is not None
    assert pruning.look.runs == 2
