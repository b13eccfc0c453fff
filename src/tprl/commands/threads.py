"""How many threads torch computes with on the CPU.

Threads of one operation wait for each other at its end. In a small model an operation takes
microseconds, and where another process is busy the wait is a turn of the scheduler, thousands of
times as long: on two cores beside one busy process, two threads answered a tenth of what one did.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tprl.runtime import distributed
from tprl.runtime.run_directory import write_settings

SMALL = 50_000_000  # parameters; below, an operation is too short to be shared
SET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what torch reads when it starts
DEFAULT = torch.get_num_threads()  # what it then took
log = logging.getLogger(__name__)


def use_threads(config: DictConfig, directory: Path, lvlm: Any = None) -> int:
    """Set torch's threads for a run, and note their number in its `config.yaml`, where a resumed
    run finds it.

    A number in the config counts first, then the environment, then the size of the LVLM, if it
    computes on the CPU.

    Args:
        config: of the run; gets the number as `threads`.
        directory: of the run.
        lvlm: the model; without one, all threads are used.
    """
    asked = config.get("threads")
    known = next((name for name in SET if os.environ.get(name)), None)
    size = None if lvlm is None or lvlm.device.type != "cpu" else parameters(lvlm)
    if asked is not None:
        count, why = asked, "as when the run began" if config.get("resume") else f"threads={asked}"
    elif known is not None:
        # a list has a number for every level of nesting
        value = os.environ[known].partition(",")[0]
        count = int(value) if value.isdigit() and int(value) else torch.get_num_threads()
        why = f"{known}={os.environ[known]}"
    elif size is not None and size < SMALL:
        count, why = 1, f"the LVLM has {size / 1e6:.1f} M parameters, too few to share"
    else:
        count, why = DEFAULT, "torch's default"
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    OmegaConf.update(config, "threads", count, force_add=True)
    if not distributed.rank():
        write_settings(directory, config)
    log.info("threads: %d (%s; threads=<n> sets another number)", count, why)
    return count


def parameters(lvlm: Any) -> int:
    """How many numbers the modules among an object's attributes hold."""
    return sum(p.numel() for module in _modules(lvlm) for p in module.parameters())


def _modules(owner: Any) -> Iterator[nn.Module]:
    parts = (owner, *vars(owner).values())
    return (part for part in parts if isinstance(part, nn.Module))
