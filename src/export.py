"""Write a folder that an engine serves: python -m src.export run=<directory> target=vllm."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.commands.entry import launch


def work(config: DictConfig, directory: Path) -> Path:
    from tprl.commands.export import export  # late: a mistyped option is answered before torch is imported

    return export(config, directory)


if __name__ == "__main__":
    launch("export", work)
