"""Forecasts of passes, FLOPs and bytes against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from tprl import cost
from tprl.bench.devices import Device
from tprl.bench.forecast import (
    ALLOCATOR,
    Model,
    TypicalQuestion,
    reading_bytes,
    stage_needs,
    uncounted,
)
from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.stages import autoencoder

SHAPE = LVLMShape(
    VisionShape(layers=24, width=1024, mlp=4096, heads=16, patches=576, patch_size=14),
    (1024, 4096, 4096),
    LMShape(layers=32, width=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32064),
)
LLAVA = Model(
    SHAPE,
    weights=14 * 10**9,
    number=2,
    micro_batch=16,
    policy=10**6,
    policy_width=64,
    policy_layers=2,
    code_width=64,
)
QUESTION = TypicalQuestion(text=40, visual=576, answer=2, tiles=((1, 576),))
PPO: dict[str, Any] = {
    "name": "ppo", "iterations": 10, "prompts": 4, "group": 8, "steps": 1, "keep_ratio": 0.5,
    "credit_blocks": 0, "validate_every": 5, "update_epochs": 2, "minibatch": 32,
    "served": {"keep_ratios": [0.5], "limit": 20, "first": 0},
}  # fmt: skip


def test_passes_of_ppo() -> None:
    (need,) = stage_needs(PPO, LLAVA, QUESTION, open_ended=False, questions=0)
    assert need.encodes == 10 * 4 + 20
    assert need.reads == 10 * 4 * (8 + 1) + 3 * 20  # validated before, in the middle and at the end
    assert need.written == 0
    (open_ended,) = stage_needs(PPO, LLAVA, QUESTION, open_ended=True, questions=0)
    assert open_ended.written == 10 * 4 + 20 * (1 + 3)


TUNE: dict[str, Any] = {
    "name": "tune", "iterations": 10, "prompts": 4, "keep_ratio": [0.5, 0.25], "answers": "own",
    "rank": 8, "validate_every": 4, "served": {"keep_ratios": [0.5, 0.25], "limit": 20},
}  # fmt: skip


def test_passes_of_tune() -> None:
    (need,) = stage_needs(TUNE, LLAVA, QUESTION, open_ended=False, questions=0)
    assert need.encodes == 10 * 4 + 20
    # validated before, after 4 and 8, and at the end: two ratios and all tokens
    assert need.reads == 3 * 10 * 4 + 4 * 20 * 3
    assert need.written == 10 * 4
    (labels,) = stage_needs({**TUNE, "answers": "reference"}, LLAVA, QUESTION, False, questions=0)
    assert labels.written == 0
    assert uncounted(TUNE) == []


def test_bytes_of_gradients() -> None:
    """All activations where they fit, else what layers read; adapters come with their moments."""
    model, cost_of = replace(LLAVA, micro_batch=4), {}
    for working in (1e9, 1e15):
        (need,) = stage_needs(TUNE, replace(model, working=working), QUESTION, False, questions=0)
        assert need.largest == "gradients through the language model"
        cost_of[working] = need.device_bytes / ALLOCATOR - LLAVA.weights
    tokens = 40 + 288 + 2
    # inputs of 32 layers for four prompts, at least, and a fraction of everything
    assert 32 * 4 * tokens * 4096 * 2 < cost_of[1e9] < 0.2 * cost_of[1e15]
    assert cost_of[1e15] > 4 * 32 * 4 * tokens * (14 * 4096 + 4 * 11008)
    (ranked,) = stage_needs({**TUNE, "rank": 16}, model, QUESTION, False, questions=0)
    (need,) = stage_needs(TUNE, model, QUESTION, False, questions=0)
    numbers = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # in and out of seven matrices
    assert ranked.device_bytes - need.device_bytes == pytest.approx(ALLOCATOR * 16 * 8 * numbers)


def test_what_null_means() -> None:
    stage = {
        **PPO,
        "credit_blocks": None,
        "budget": "exact_k",
        "law": "sequential",
        "ratio": "token",
    }

    def reads(model: Model = LLAVA, **options: Any) -> int:
        return stage_needs({**stage, **options}, model, QUESTION, open_ended=False, questions=100)[
            0
        ].reads

    whole = 10 * 4 * (8 + 1) + 3 * 20
    assert reads() == whole + 10 * 4 * 4
    for others in ({"law": "kdpp"}, {"ratio": "joint"}, {"budget": "lagrange"}):
        assert reads(**others) == whole
    assert reads(replace(LLAVA, select="topk")) == whole
    assert reads(credit_blocks=2) == whole + 10 * 4 * 2
    assert reads(credit_blocks=0, served={**PPO["served"], "limit": None}) == whole + 3 * 80


def test_stages_without_a_cost_model_have_no_forecast() -> None:
    assert stage_needs({"name": "center"}, LLAVA, QUESTION, open_ended=False, questions=0) == []
    chain = {"chain": ["ppo", "center"], "ppo": PPO, "center": {"name": "center"}}
    assert (uncounted(chain), uncounted(PPO)) == (["center"], [])


def test_flops_are_those_of_the_cost_model() -> None:
    (need,) = stage_needs(
        {**PPO, "served": {}},
        replace(LLAVA, policy_layers=0),
        QUESTION,
        open_ended=False,
        questions=0,
    )
    see = cost.vision_flops(SHAPE, 1) + cost.projector_flops(SHAPE, 1)
    half = cost.prefill_flops(SHAPE, 42, 288) + cost.lm_head_flops(SHAPE, 2)
    whole = cost.prefill_flops(SHAPE, 42, 576) + cost.lm_head_flops(SHAPE, 2)
    assert need.flops == 40 * see + 320 * half + 40 * whole


def test_hours() -> None:
    (need,) = stage_needs(PPO, LLAVA, QUESTION, open_ended=True, questions=0)
    device = Device("GPU", tflops=1000.0, bandwidth=2.0, memory=80.0)
    computing = need.flops / 0.4e15
    # a further token of 16 answers is one pass of the weights
    writing = need.written / 16 * 14e9 / 2e12
    alone, few, many = (replace(LLAVA, workers=count) for count in (0, 1, 10**6))
    together = (computing + writing + 0.2 * need.encodes) / 3600
    assert need.hours(device, alone, QUESTION) == pytest.approx(together)
    # threads prepare images meanwhile: the longer of both counts
    assert need.hours(device, few, QUESTION) == pytest.approx(0.2 * need.encodes / 3600)
    assert need.hours(device, many, QUESTION) == pytest.approx((computing + writing) / 3600)
    assert (LLAVA.workers_on(device), LLAVA.workers_on(replace(device, name="CPU"))) == (4, 0)
    # a small picture
    assert TypicalQuestion(40, 4, 2, ((2, 2),)).preparation(14) == pytest.approx(
        0.2 * 4 * 196 / 1e5
    )


def test_bytes_are_weights_and_the_largest_activity() -> None:
    (need,) = stage_needs(PPO, LLAVA, QUESTION, open_ended=False, questions=0)
    kept = 20 * 616 * 4096 * 2
    assert need.device_bytes > ALLOCATOR * (14e9 + kept + reading_bytes(LLAVA, QUESTION))
    less = stage_needs(PPO, replace(LLAVA, micro_batch=1), QUESTION, open_ended=False, questions=0)[
        0
    ]
    assert less.device_bytes < need.device_bytes
    cache = cost.kv_bytes(SHAPE.lm, 618, 2)
    assert reading_bytes(replace(LLAVA, micro_batch=1), QUESTION) > cache


def test_few_episodes_are_spliced_in_few_bytes() -> None:
    """Measured at LLaVA's widths with few layers: experiments/memory."""
    wide = replace(LLAVA, weights=0, micro_batch=1, policy=0)
    encoding = 616 * 4096 * 2  # of a question
    small: dict[str, Any] = {**PPO, "prompts": 2, "group": 2, "served": {}}
    needs = []
    for group in (2, 200):
        (need,) = stage_needs({**small, "group": group}, wide, QUESTION, False, questions=0)
        needs.append(need.device_bytes / ALLOCATOR)
    assert needs[0] < needs[1]
    # at most as many prompts as the budget holds, spliced out of copies, beside two questions
    most = int(wide.working // (2 * encoding))
    assert needs[1] == pytest.approx(2 * most * encoding + 2 * encoding)


def test_batches_are_those_that_the_stages_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many images at a time, and the weights beside them stay; the budget of bytes bounds
    them."""
    part = {"name": "autoencoder", "images": 1000}

    def held(working: float) -> float:
        model = replace(LLAVA, working=working)
        (need,) = stage_needs(part, model, QUESTION, open_ended=False, questions=0)
        return need.device_bytes / ALLOCATOR - LLAVA.weights

    usual, bounded = held(1e12), held(1e9)
    monkeypatch.setattr(autoencoder, "AT_ONCE", 2 * autoencoder.AT_ONCE)
    assert held(1e12) == pytest.approx(2 * usual)
    assert held(1e9) == bounded
    assert 1e9 < bounded < 1.7e9  # the tower's, and the tokens of what fits
