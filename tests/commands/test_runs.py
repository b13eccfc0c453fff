"""What runs share, whatever their stages train."""

from typing import Any

import pytest

from tprl.commands import runs
from tprl.stages.base import Stage


def test_a_stage_of_a_run_with_a_model_goes_on_with_the_logger_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second tracker would be a second run in W&B."""
    loggers: list[Any] = []
    monkeypatch.setattr(runs, "make_logger", lambda *settings: loggers.append(settings))
    run = object.__new__(runs.ModelRun)
    run.logger = "the one that the run began with"
    stage = object.__new__(Stage)
    monkeypatch.setattr(run, "module_of", lambda config: stage)
    assert run.built({}) is stage
    assert run.logger == "the one that the run began with"
    assert loggers == []
