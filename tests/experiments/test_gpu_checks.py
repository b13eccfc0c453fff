"""The script of checks for a GPU: its commands compose, it goes on where it was cut off, and says what failed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir

from tprl.build import conf_dir
from tprl.commands.entry import addable
from tprl.commands.options import checked
from tprl.commands.unread import check_read

FILE = Path(__file__).parents[2] / "experiments" / "gpu_checks" / "run.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_checks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_its_commands_are_ones(script: ModuleType) -> None:
    for check in script.CHECKS:
        for words in (check.words, check.small):
            if words is None:
                continue
            if words[0] != "-m":
                assert (FILE.parents[2] / words[0]).is_file()
                continue
            entry = {"src.eval": "eval", "src.train": "train", "src.check": "train"}[words[1]]
            with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
                config = compose(entry, overrides=[addable(word) for word in words[2:]])
            checked(config, entry)
            check_read(entry, config, [word.partition("=")[0] for word in words[2:]])


def python(code: str) -> tuple[str, ...]:
    return ("-c", code)


def test_results_are_kept_and_what_is_finished_is_not_run_again(script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write('x'); print('| value 7 |')"
    checks = [
        script.Check("good", "seven", python(note), pattern=r"value \d"),
        script.Check("bad", "never", python("raise SystemExit('no device')")),
        script.Check("slow", "never", python("import time; time.sleep(60)"), minutes=0.02),
        script.Check("foreign", "never", python(""), package="no_such_package"),
    ]
    rows = script.run(checks, tmp_path / "out")
    assert [row["state"] for row in rows] == ["ok", "failed", "timeout", "skipped"]
    assert [row["result"] for row in rows[:2]] == ["value 7", "no device"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(rows))
    assert "| bad | failed |" in (tmp_path / "out" / "table.md").read_text()
    script.run(checks[:1], tmp_path / "out")
    assert log.read_text() == "x"
    script.run(checks[:1], tmp_path / "out", again=True)
    assert log.read_text() == "xx"


def test_without_a_gpu_what_says_nothing_there_is_skipped(script: ModuleType, tmp_path: Path) -> None:
    rows = script.run([script.Check("gpu", "speed", python("raise SystemExit(1)"))], tmp_path, small=True)
    assert rows[0]["state"] == "skipped"
    assert rows[0]["result"] == "needs a GPU"


@pytest.mark.slow
def test_the_dry_run_on_a_cpu(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--small", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"] for row in rows if row["state"] == "ok"} == {"chain", "parity", "latency", "forecast"}
