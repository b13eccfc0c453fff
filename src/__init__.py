"""Path shim: makes `import tprl` work from a bare clone and in its child processes."""

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [HERE, *(path for path in paths if path not in ("", HERE))]
)
