"""PPO on the embedded LVLM for some iterations; rank 0 writes the seconds of each: `torchrun ...
worker.py BASE ITERATIONS OUT`."""

import json
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from tprl.build import build, conf_dir, load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.llava import Llava
from tprl.pruners.learned import load_pruner
from tprl.runtime import distributed
from tprl.scoring.validation import ServedScore


class Clock(pl.Callback):
    """When each iteration ended; all ranks end an update together."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())


def main(base: str, iterations: int, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.join()
    pl.seed_everything(0, verbose=False)
    options = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stage" / "ppo.yaml").module)
    # The first iteration and the last, which validate, are not counted.
    options |= {"iterations": iterations + 2, "validate_every": 10**9}
    lvlm, clock = Llava("tiny_llava", device="cpu"), Clock()
    served = ServedScore(lvlm, Scenes("val"), [0.1111], 10)
    reward = load_component("reward", "log_likelihood")
    live = {
        "pruner": load_pruner(base),
        "lvlm": lvlm,
        "dataset": Scenes("train"),
        "reward": reward,
        "served": served,
    }
    stage = build(options, seed=0, **live)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=distributed.count(),
        strategy="ddp" if distributed.count() > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage)
    if distributed.rank() == 0:
        seconds = [b - a for a, b in pairwise(clock.ends)][:iterations]
        result = {
            "ranks": distributed.count(),
            "episodes": options["prompts"] * options["group"],
            "seconds": seconds,
        }
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
