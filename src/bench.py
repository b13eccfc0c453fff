"""Measure speed and exactness: python -m src.bench latency, or parity model=qwen2_5_vl."""

import sys

from tprl.commands.entry import launch

if __name__ == "__main__":
    # The first word says what to measure; the options are those of src.eval.
    if sys.argv[1:] and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"mode={sys.argv[1]}"
    launch("eval", "tprl.commands.bench:bench")
