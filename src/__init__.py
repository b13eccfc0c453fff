"""Path shim: makes `import tprl` work from a bare clone and in its child processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
