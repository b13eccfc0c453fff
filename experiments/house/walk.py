"""The way from a typed command to `trainer.fit`: our own frames, and the files they are in.

    python experiments/house/walk.py stage=ppo model=toy dataset=toy policy.code_width=0 logger=none

Run it in the root of a clone; it stops where training would begin.
"""

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def stop(*arguments: Any, **options: Any) -> None:
    """In the place of `Trainer.fit`."""
    source = Path.cwd() / "src"
    frames = [
        frame
        for frame in traceback.extract_stack()[:-1]
        if Path(frame.filename).is_relative_to(source)
    ]
    for number, frame in enumerate(frames, 1):
        print(f"{number:2} {Path(frame.filename).relative_to(source)}:{frame.lineno} {frame.name}")
    print(f"{len(frames)} frames, {len({frame.filename for frame in frames})} files")
    sys.exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    pl.Trainer.fit = stop  # type: ignore[method-assign]
    runpy.run_module("src.train", run_name="__main__", alter_sys=True)
