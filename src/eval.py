"""Evaluate a run or a pruner: python -m src.eval run=<directory>, python -m src.eval pruner=random."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.commands.entry import launch


def work(config: DictConfig, directory: Path) -> Path:
    from tprl.commands.evaluate import evaluate  # late: a mistyped option is answered before torch is imported

    return evaluate(config, directory)


if __name__ == "__main__":
    launch("eval", work)
