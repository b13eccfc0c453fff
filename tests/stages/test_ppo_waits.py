"""PPO on an emulated GPU: nothing mixes devices, and how often an iteration waits for the GPU."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from tests.devices import Machine, cut, device_of
from tests.stages.toy_runs import ppo

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.pruners.tprl import TPRL
from tprl.scoring.validation import ServedScore

# 50 as measured, of two epochs with two minibatches each and 8 prompts; texts have two tokens.
# 198 before counts of tokens were plain numbers. Ten are the stock class's while it writes, and
# four the emulation's: clip_grad_norm_ asks where gradients truly are.
CEILING = 55


class Emulated(CPUAccelerator):
    """Lets Lightning move a stage to a GPU that is not there."""

    def setup_device(self, device: torch.device) -> None:
        pass


class Waits(pl.Callback):
    """What each iteration adds to the machine's count, and where the policy was."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.before = machine, 0
        self.counts: list[int] = []
        self.places: list[torch.device] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.machine.waits.total()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.counts.append(self.machine.waits.total() - self.before)
        self.places.append(next(pl_module.net.parameters()).device)


def test_an_iteration_waits_seldom_and_mixes_no_devices() -> None:
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=2)
    torch.manual_seed(0)
    pruner = TPRL(
        lvlm.width, select="topk", width=16, layers=1, heads=2, code_width=0, positions=False
    )
    with Machine() as machine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut(lvlm, 1)
        served = ServedScore(lvlm, Scenes("val"), (0.3,), 2)
        sizes: dict[str, Any] = {"prompts": 8, "group": 2, "minibatch": 8, "keep_ratio": 0.3}
        stage = ppo(
            pruner,
            lvlm=lvlm,
            dataset=Scenes("train"),
            served=served,
            iterations=3,
            validate_every=3,
            **sizes,
        )
        counter = Waits(machine)
        trainer = pl.Trainer(
            max_epochs=1,
            strategy=SingleDeviceStrategy(device_of(0), accelerator=Emulated()),
            callbacks=[counter],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(stage)
    assert counter.places == [device_of(0)] * 3
    # The first iteration validates and scores all tokens, the last one validates.
    assert 20 < counter.counts[1] <= CEILING
