"""No network: every process that a test starts, and this one, reads local files only."""

import os
import sys
from pathlib import Path
from types import ModuleType

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
}

# A dependency of lmms-eval installs a package called `tests`, which would hide ours.
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(Path(__file__).parents[1] / "tests")]
