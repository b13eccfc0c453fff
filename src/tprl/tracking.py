"""Where metrics go."""

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger


def wandb_logger(save_dir: str | Path, project: str = "tprl", **options: Any) -> WandbLogger:
    """A W&B logger that writes below `save_dir`, and stays offline when this machine has no key.

    WANDB_MODE, where set, decides instead.
    """
    offline = "WANDB_MODE" not in os.environ and not _has_key()
    return WandbLogger(save_dir=str(save_dir), project=project, offline=offline, **options)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
