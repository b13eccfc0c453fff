"""Where numbers come from: code, machine, versions, date; for the config of a W&B run and the end
of a report."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers

import tprl

LIBRARIES = {"tprl": tprl, "torch": torch, "transformers": transformers, "lightning": lightning}
CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    """What a run's numbers depend on besides its config: `git` (commit, dirty; empty outside of a
    clone) and `environment`."""
    # All that can change a number: code, libraries, device, and how many threads add up sums.
    cuda = torch.cuda.is_available()
    environment = {
        **{name: module.__version__ for name, module in LIBRARIES.items()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "devices": torch.cuda.device_count() if cuda else 1,
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
    return {"git": _git(Path(__file__).parents[3]), "environment": environment}


def origin() -> dict[str, str]:
    """`date`, `commit` (where this code is a git clone), `hardware` and `versions`, in words."""
    git, machine = provenance().values()
    changed = " with local changes" if git.get("dirty") else ""
    known = {"commit": git["commit"][:10] + changed} if git else {}
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if torch.cuda.is_available():
        hardware = f"{machine['devices']} × {machine['device']}; {hardware}"
    versions = ", ".join(
        [f"Python {machine['python']}", *(f"{name} {machine[name]}" for name in LIBRARIES)]
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        **known,
        "hardware": hardware,
        "versions": versions,
    }


def _git(root: Path) -> dict[str, Any]:
    """`commit` of the clone at `root`, and `dirty`: whether files differ from it; empty where there
    is no clone."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    if not (root / ".git").exists():  # installed from a wheel, perhaps within somebody else's clone
        return {}
    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, somebody else's files
        return {}


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
