"""Python processes of their own, as a shell starts them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def started(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
