"""What bench.py and profile_ppo.py run: the embedded LVLM, the pruner that ships, and PPO as conf/
has it."""

import logging
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import nn

from tprl.build import build, conf_dir, load_component
from tprl.data.scenes import Scenes
from tprl.pruners.learned import load_pruner
from tprl.rewards import WeightedReward
from tprl.stages.ppo import PPO

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
LINEARS = ("float32", "onednn", "bfloat16")


def load_lvlm(linears: str = "float32", device: str = "cpu") -> Any:
    """The embedded LVLM.

    "float32": as it comes (PyTorch multiplies float32 by MKL); "onednn": float32 too, its linear
    layers multiplied by oneDNN, which PyTorch carries but does not use for float32; "bfloat16":
    model.dtype=bfloat16.
    """
    dtype = "bfloat16" if linears == "bfloat16" else "float32"
    lvlm = load_component("model", "tiny_llava", device=device, dtype=dtype)
    if linears == "onednn":
        for module in lvlm.model.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(_onednn, module)
    return lvlm


def _onednn(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def make_ppo(lvlm: Any, iterations: int, reward: str = "log_likelihood", **changes: Any) -> PPO:
    """The stage of conf/stage/ppo.yaml with `changes`; validation is left out."""
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stage" / "ppo.yaml"))
    assert isinstance(config, dict)
    options = config["module"] | changes
    rewards: WeightedReward = load_component("reward", reward)
    live = {
        "pruner": load_pruner("tprl_tiny_llava"),
        "lvlm": lvlm,
        "dataset": Scenes(),
        "reward": rewards,
    }
    return build(
        options | {"iterations": iterations},
        served=lambda _: {"accuracy": 0.0, "log_prob": 0.0},
        **live,
    )


def fit(stage: PPO, *callbacks: pl.Callback) -> None:
    """Train without any output."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "logger"), False
    )
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu" if stage.lvlm.device.type == "cpu" else "auto",
        devices=1,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **quiet,
    ).fit(stage)
