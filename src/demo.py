"""Try pruners in a browser: python -m src.demo, python -m src.demo run=<directory>."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.commands.entry import launch


def work(config: DictConfig, directory: Path) -> Path:
    from tprl.commands.demo import demo  # late: a mistyped option is answered before torch is imported

    return demo(config, directory)


if __name__ == "__main__":
    launch("demo", work)
