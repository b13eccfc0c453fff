"""Stages and an evaluation, on two ranks and on one: `python -m tests.stages.rank_runs <folder>
<stage> ...` writes what came of each."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from tests.stages.plain import build_stage
from tests.stages.toy_runs import fit, lvlm, policy, ppo, served, weights

from tprl.commands.evaluate import Evaluation, evaluate_entries
from tprl.data.scenes import Scenes
from tprl.data.taking import BadRow
from tprl.data.toy import ToyDataset
from tprl.evaluation.evaluator import Entry
from tprl.lvlm.llava import Llava
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.random import RandomPruner
from tprl.pruners.tprl import TPRL
from tprl.runtime import distributed
from tprl.stages.adapt import Adapt
from tprl.stages.autoencoder import AutoencoderStage
from tprl.stages.distill import Distill
from tprl.stages.lfd import LfD

RANKS = 2
FAST: dict[str, Any] = {"lr_actor": 0.5, "lr_critic": 0.5}


def lfd() -> LfD:
    """21 demonstrations in batches of 5: four that two ranks cannot halve, and one of a single
    row."""
    options: dict[str, Any] = {
        "demonstrations": 21,
        "keep_ratio": [0.25, 0.5],
        "steps": 2,
        "epochs": 2,
    }
    live = {
        "pruner": policy(),
        "lvlm": lvlm(),
        "dataset": ToyDataset(),
        "demonstrator": ClsAttentionPruner(),
    }
    return build_stage(LfD, **live, served=served(), batch_size=5, **options)


def autoencoder() -> AutoencoderStage:
    """432 tokens in batches of 53, the last of 8."""
    pruner = policy(code_width=8, hidden=16)
    return build_stage(
        AutoencoderStage,
        pruner=pruner,
        lvlm=lvlm(),
        dataset=ToyDataset(),
        images=20,
        epochs=1,
        batch_size=53,
    )


def adapt() -> Adapt:
    """54 questions in batches of 7, the last of 5."""
    budgets = [1 / 24, 0.25, 0.5]
    live = {
        "pruner": policy(select="dpp"),
        "lvlm": lvlm(),
        "dataset": ToyDataset(),
        "served": served(),
    }
    chosen = {
        "questions": 60,
        "budgets": budgets,
        "keep_ratios": [0.3],
        "epochs": 1,
        "batch_size": 7,
    }
    return build_stage(Adapt, **live, **chosen)


def distill() -> Distill:
    torch.manual_seed(0)
    tiny = Llava("tiny_llava", device="cpu")
    pruner = TPRL(tiny.width, code_width=0, width=16, layers=1, heads=2, select="topk")
    live = {"pruner": pruner, "lvlm": tiny, "dataset": Scenes()}
    live["served"] = lambda _: {"accuracy": 0.0, "log_prob": 0.0}
    return build_stage(Distill, **live, iterations=2, prompts=4, keep_ratio=[0.1111, 0.3333])


STAGES: dict[str, Callable[[], Any]] = {
    # Eight prompts, in minibatches of 3, 3 and 2, or of one: some of them are all one rank's.
    "gae": lambda: ppo(minibatch=3, **FAST),
    "lagrange": lambda: ppo(
        minibatch=3, steps=2, budget="lagrange", keep_ratio=[0.25, 0.5], **FAST
    ),
    "rloo": lambda: ppo(advantage="rloo", group=2, minibatch=6, budget="lagrange", **FAST),
    "grpo": lambda: ppo(policy(select="dpp"), advantage="grpo", group=4, minibatch=4, **FAST),
    "lfd": lfd,
    "autoencoder": autoencoder,
    "adapt": adapt,
    "distill": distill,
}


class Report(pl.Callback):
    """The first gradient that an optimizer sees, the weights and metrics at the end, and what the
    stage counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gradient: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.start = weights(pl_module.pruner)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.pruner.named_parameters()
        self.gradient = self.gradient or {
            name: p.grad.clone() for name, p in named if p.grad is not None
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        result = {
            "gradient": self.gradient,
            "start": self.start,
            "weights": weights(pl_module.pruner),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "best": getattr(pl_module, "best_state", {}),
            "curves": getattr(pl_module, "curves", {}),
        }
        torch.save(result, self.path)


class Scratched(Scenes):
    """The questions of `Scenes`, two of which are damaged."""

    def __getitem__(self, index: int) -> Any:
        if index in (3, 8):
            self.damage = {**getattr(self, "damage", {}), f"row {index}": 1}
            raise BadRow("scratched")
        return super().__getitem__(index)


def evaluation(directory: Path) -> None:
    tiny = Llava("tiny_llava", device="cpu")
    entries = [
        Entry("random", RandomPruner(), (0.3333, 0.1111)),
        Entry("cls_attention", ClsAttentionPruner(), (0.3333,)),
    ]
    directory.mkdir(exist_ok=True)
    settings = {"batch_size": 4, "limit": 11}
    table = Evaluation(tiny, Scratched("test"), entries, settings, OmegaConf.create({}), directory)
    evaluate_entries(table, False)


def everything(folder: Path, stages: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in stages:
        report = Report(folder / f"{name}.{distributed.count()}.{distributed.rank()}.pt")
        state: dict[str, Any] = (
            {"strategy": "ddp", "devices": RANKS} if distributed.count() > 1 else {}
        )
        fit(STAGES[name](), report, use_distributed_sampler=False, **state)
    evaluation(folder / f"evaluation.{distributed.count()}")


def one_rank(number: int, port: int, folder: Path, stages: Sequence[str]) -> None:
    """What torchrun says to the processes that it starts."""
    environment = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": RANKS,
        "LOCAL_WORLD_SIZE": RANKS,
        "GROUP_RANK": 0,
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    distributed.join()
    everything(folder, stages)


def main(folder: Path, stages: Sequence[str]) -> None:
    # Plain gradient descent: Adam would turn rounding errors of gradients that are zero into steps.
    def plain(parameters: Any, **_: Any) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.5)

    torch.optim.Adam = torch.optim.AdamW = plain  # type: ignore[misc]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [
        get_context("fork").Process(target=one_rank, args=(n, port, folder, stages))
        for n in range(RANKS)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join()
    if any(process.exitcode for process in several):
        sys.exit("a rank failed")
    everything(folder, stages)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
