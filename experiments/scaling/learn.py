"""Does learning scale with the number of tokens? PPO on the needle world, one row per iteration
that was validated.

python experiments/scaling/learn.py 576 [stage option=value ...]
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from needle import WIDTH, NeedleDataset, NeedleLVLM
from omegaconf import OmegaConf

from tprl.build import conf_dir
from tprl.pruners.tprl import TPRL
from tprl.rewards import WeightedReward
from tprl.rewards.log_likelihood import LogLikelihood
from tprl.scoring.validation import ServedScore
from tprl.stages.ppo import PPO

KEEP = 1 / 9
OPTIONS: dict[str, Any] = {
    "iterations": 60,
    "prompts": 24,
    "group": 16,
    "keep_ratio": KEEP,
    "steps": 1,
    "advantage": "rloo",
    "lr_actor": 1e-3,
    "lr_critic": 1e-3,
    "minibatch": 384,
    "update_epochs": 3,
    "entropy_coef": 0.0,
    "kl_stop": 0.05,
    "validate_every": 10,
    "seed": 0,
}


def main(tokens: int, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    options = OPTIONS | changes
    lvlm = NeedleLVLM(tokens)
    torch.manual_seed(options["seed"])
    pruner = TPRL(WIDTH, code_width=0, width=64, layers=2, heads=4, max_steps=1)
    stage = PPO(
        pruner=pruner,
        lvlm=lvlm,
        dataset=NeedleDataset(),
        reward=WeightedReward([LogLikelihood()]),
        served=ServedScore(lvlm, NeedleDataset("val"), [KEEP], 200),
        **(hyper_parameters() | options),
    )
    log = Rows()
    start = time.process_time()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[log], **quiet).fit(stage)
    episodes = options["prompts"] * options["group"]
    served = {round(seen / episodes): round(score, 3) for seen, score in stage.curves["served"]}
    row = {
        "tokens": tokens,
        "options": changes,
        "served": served,
        "clip_fraction": max(log.clipped),
        "kl": max(log.kl),
    }
    print(json.dumps(row | {"cpu_seconds": round(time.process_time() - start)}))


def hyper_parameters() -> dict[str, Any]:
    """Those of conf/stage/ppo.yaml."""
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stage" / "ppo.yaml").module)
    return {name: value for name, value in config.items() if name != "_target_"}


class Rows(pl.Callback):
    """The largest clip fraction and KL estimate of any iteration."""

    def __init__(self) -> None:
        self.clipped: list[float] = []
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.clipped.append(round(float(trainer.callback_metrics["ppo/clip_fraction"]), 4))
        self.kl.append(round(float(trainer.callback_metrics["ppo/kl"]), 5))


def parsed(text: str) -> tuple[str, Any]:
    name, value = text.split("=", 1)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(int(sys.argv[1]), dict(parsed(text) for text in sys.argv[2:]))
