"""Where numbers come from: code, machine, versions, date. Shown at the end of every report."""

import os
import platform
import subprocess
import time
from pathlib import Path

import lightning
import torch
import transformers

import tprl

CPUINFO = Path("/proc/cpuinfo")


def origin() -> dict[str, str]:
    """`date`, `commit` (where this code is a git clone), `hardware` and `versions`, in words."""
    modules = {"tprl": tprl, "torch": torch, "transformers": transformers, "lightning": lightning}
    versions = [f"Python {platform.python_version()}", *(f"{name} {m.__version__}" for name, m in modules.items())]
    commit = _commit(Path(__file__).parents[3])
    known = {"commit": commit} if commit else {}
    date = time.strftime("%Y-%m-%d %H:%M %Z")
    return {"date": date, **known, "hardware": _hardware(), "versions": ", ".join(versions)}


def _commit(root: Path) -> str | None:
    """The commit of the clone at `root`, with a word if files differ from it; None where there is no clone."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    if not (root / ".git").exists():  # installed from a wheel, perhaps within somebody else's clone
        return None
    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + (" with local changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, somebody else's files
        return None


def _hardware() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = f"{_cpu_name()}, {cores} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return cpu
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}; {cpu}"


def _cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
