"""Train a stage, or all of them: python -m src.train stage=ppo model=tiny_llava."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.commands.entry import launch


def work(config: DictConfig, directory: Path) -> Path:
    from tprl.commands.train import train  # late: a mistyped option is answered before torch is imported

    return train(config, directory)


if __name__ == "__main__":
    launch("train", work)
