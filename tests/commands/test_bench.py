"""`python -m src.bench <what>`: the benchmarks under a name of their own, with the options of
src.eval."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["src.bench", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "src/bench.py"), run_name="__main__")
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_unknown_benchmarks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = f"hydra.run.dir={tmp_path}"
    assert output(monkeypatch, capsys, place).startswith(
        "error: mode=accuracy is not a benchmark: use latency, parity, sel"
    )
    assert output(monkeypatch, capsys, "speed", place).startswith("error: mode must be ")
    line = output(monkeypatch, capsys, "latency", "limit=3", place)
    assert line.startswith("error: limit is not read: mode=latency reads ")


def test_modes_of_src_eval_still_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = output(
        monkeypatch,
        capsys,
        "mode=parity",
        "model=toy",
        "dataset=toy",
        "limit=1",
        f"hydra.run.dir={tmp_path}",
    )
    error = "error: model=toy has no stock class to compare with: use model=tiny_llava.\n"
    assert line.endswith(error)
