"""Where metrics go."""

import netrc
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from tprl.evaluation.results import COLUMNS, Row


def wandb_logger(save_dir: str | Path, project: str = "tprl", **options: Any) -> WandbLogger:
    """A W&B logger that writes below `save_dir`, and stays offline when this machine has no key.

    WANDB_MODE, where set, decides instead.
    """
    offline = "WANDB_MODE" not in os.environ and not _has_key()
    return WandbLogger(save_dir=str(save_dir), project=project, offline=offline, **options)


def log_results(logger: object, rows: Sequence[Row]) -> None:
    """Put an evaluation's rows beside the curves of its training: every metric, and `flops_ratio`, of every pruner over
    `kept_tokens`, and the table `eval/results`. Other loggers than W&B get nothing: `results.csv` holds the same."""
    if not isinstance(logger, WandbLogger):
        return
    import wandb  # late, for runs that log elsewhere

    points: dict[tuple[str, int, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        name = f"eval/{row.pruner}" + (f"/seed{row.seed}" if row.seed else "")
        point = points[row.pruner, row.seed, row.kept_tokens]
        point |= {f"{name}/{row.metric}": row.value, f"{name}/flops_ratio": row.flops_ratio}
    run: Any = logger.experiment
    run.define_metric("kept_tokens")
    for name in {name for point in points.values() for name in point}:
        run.define_metric(name, step_metric="kept_tokens")  # by its exact name: globs win in random order
    for (_, _, kept), point in points.items():
        run.log({"kept_tokens": kept, **point})
    run.log({"eval/results": wandb.Table(columns=list(COLUMNS), data=[list(astuple(row)) for row in rows])})


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
