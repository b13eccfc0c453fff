"""Commands as a shell would start them, in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tprl.commands.entry import launch
from tprl.commands.evaluate import evaluate
from tprl.commands.train import train

FAST = ("debug=fast", "logger=csv")


def call(name: str, work: Callable[..., Path], directory: Path, *overrides: str) -> Path:
    """What `python -m src.<name> ...` does, in this process."""
    before = sys.argv
    sys.argv = [f"src.{name}", *overrides, f"hydra.run.dir={directory}"]
    try:
        launch(name, work)
    finally:
        sys.argv = before
    return directory


def refused(capsys: pytest.CaptureFixture[str], name: str, directory: Path, *overrides: str) -> str:
    """The one sentence on stderr of a command that must end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        call(name, train if name == "train" else evaluate, directory, *overrides)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]
