"""Stages on the GPU of a later rank, emulated: nothing stays behind on that of the first."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tests.devices import Machine, device_of, live_on, place
from tests.lvlm.small import families
from tests.stages.plain import build_stage
from tests.stages.test_ppo_waits import Emulated
from tests.stages.toy_runs import ppo

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.tprl import TPRL
from tprl.scoring.validation import ServedScore
from tprl.stages.lfd import LfD

SECOND = device_of(1)  # of the rank with this number


def small(name: str) -> FrozenLVLM:
    torch.manual_seed(0)
    return load_component("model", name, pretrained=None, dtype="float32", max_new_tokens=2)


def trained(stage: Any) -> dict[str, torch.Tensor]:
    """The policy's weights after training where the model is, back on the host."""
    device = stage.lvlm.device
    strategy: Any = "auto"
    if device.type != "cpu":
        strategy = SingleDeviceStrategy(device, accelerator=Emulated())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=stage.epochs,
            accelerator="auto" if device.type != "cpu" else "cpu",
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(stage)
    weights = dict(stage.pruner.net.named_parameters())
    assert {place(weight) for weight in weights.values()} <= {device, device_of("cpu")}
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def policy(lvlm: FrozenLVLM) -> TPRL:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "code_width": 0}
    return TPRL(lvlm.width, select="topk", positions=False, **sizes)


def ppo_on(lvlm: FrozenLVLM) -> dict[str, torch.Tensor]:
    sizes: dict[str, Any] = {"prompts": 2, "group": 2, "minibatch": 4, "keep_ratio": 0.3}
    served = ServedScore(lvlm, Scenes("val"), (0.3,), 2)
    live: dict[str, Any] = {"lvlm": lvlm, "dataset": Scenes("train"), "served": served}
    return trained(ppo(policy(lvlm), iterations=1, validate_every=1, **live, **sizes))


def lfd_on(lvlm: FrozenLVLM) -> dict[str, torch.Tensor]:
    served = ServedScore(lvlm, Scenes("val"), (0.3,), 2)
    live: dict[str, Any] = {"lvlm": lvlm, "dataset": Scenes("train"), "served": served}
    sizes: dict[str, Any] = {"demonstrations": 4, "epochs": 1, "batch_size": 2, "keep_ratio": 0.3}
    demonstrator = ClsAttentionPruner()
    return trained(
        build_stage(LfD, pruner=policy(lvlm), demonstrator=demonstrator, **live, **sizes)
    )


@pytest.mark.parametrize(
    ("name", "stage"),
    [("llava", ppo_on)]
    + [pytest.param("llava", lfd_on, marks=pytest.mark.slow)]
    + [pytest.param(n, ppo_on, marks=pytest.mark.slow) for n in families() if n != "llava"],
)
def test_a_stage_of_the_second_rank(name: str, stage: Any) -> None:
    expected = stage(small(name))
    with Machine():
        lvlm = small(name)
        live_on(lvlm, SECOND)
        assert lvlm.device == SECOND
        weights = stage(lvlm)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4)
