"""The script of checks for a GPU: its commands compose, it goes on where it was cut off, and says
what failed."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tprl.build import conf_dir
from tprl.commands.entry import addable
from tprl.commands.options import checked
from tprl.commands.unread import check_read

FILE = Path(__file__).parents[2] / "experiments" / "gpu_checks" / "run.py"


def loaded(file: Path, name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded(FILE, "gpu_checks")


def bench(script: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The script behind a check, and the arguments that it reads."""
    (check,) = (check for check in script.CHECKS if check.name == name)
    file = FILE.parents[2] / check.words[0]
    monkeypatch.syspath_prepend(str(file.parent))
    module = loaded(file, f"bench_of_{name}")
    return module, module.options([word.replace(script.OUT, "/out") for word in check.words[1:]])


def test_the_selectors_bench_reads_its_words_and_prints_the_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, options = bench(script, "selectors", monkeypatch)
    assert vars(options) == {"rounds": 20, "path": Path("/out/selectors.csv"), "device": "cuda"}
    rows = [
        {"pruner": "divprune", "kept_tokens": 64, "tokens": 576, "ratio_x": gain}
        for gain in (4.0, 3.25)
    ]
    pattern = next(check.pattern for check in script.CHECKS if check.name == "selectors")
    assert re.findall(pattern, module.least(rows)) == [
        "least gain: 3.2 times the published form (divprune, 64 of 576 tokens)"
    ]


def test_the_ppo_bench_reads_its_words_and_prints_the_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = bench(script, "ppo", monkeypatch)
    assert (options.device, options.out) == ("cuda", Path("/out"))  # not over the committed tables
    module.row("scoring", "float32", 24, [40.0], [2.0])
    pattern = next(check.pattern for check in script.CHECKS if check.name == "ppo")
    assert (
        "40.0 against    2.0 evaluations/s, ratio  20.0"
        in re.findall(pattern, capsys.readouterr().out)[-1]
    )


def test_its_commands_compose(script: ModuleType) -> None:
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


def test_results_are_kept_and_what_is_finished_is_not_run_again(
    script: ModuleType, tmp_path: Path
) -> None:
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
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(rows)
    )
    assert "| bad | failed |" in (tmp_path / "out" / "table.md").read_text()
    script.run(checks[:1], tmp_path / "out")
    assert log.read_text() == "x"
    script.run(checks[:1], tmp_path / "out", again=True)
    assert log.read_text() == "xx"


def test_without_a_gpu_meaningless_checks_are_skipped(script: ModuleType, tmp_path: Path) -> None:
    rows = script.run(
        [script.Check("gpu", "speed", python("raise SystemExit(1)"))], tmp_path, small=True
    )
    assert rows[0]["state"] == "skipped"
    assert rows[0]["result"] == "needs a GPU"


def test_a_dry_run_on_a_busy_cpu_has_more_time(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PATIENCE", 100)
    sleep = python("import time; time.sleep(1.5); print('awake')")
    check = script.Check("chain", "it ends", sleep, sleep, minutes=0.02)
    assert script.run([check], tmp_path)[0]["state"] == "timeout"
    assert script.run([check], tmp_path, small=True)[0]["state"] == "ok"


def test_a_dry_run_does_not_count_as_the_run(script: ModuleType, tmp_path: Path) -> None:
    check = script.Check("gpu", "speed", python("print('whole')"), python("print('small')"))
    assert script.run([check], tmp_path, small=True)[0]["result"] == "small"
    assert script.run([check], tmp_path)[0]["result"] == "whole"
    same = script.Check("chain", "runs", python("print(1)"), python("print(1)"))
    script.run([same], tmp_path, small=True)
    assert not (tmp_path / "chain").exists()


def test_what_was_skipped_or_changed_is_run(script: ModuleType, tmp_path: Path) -> None:
    skipped = script.Check("flash", "speed", python("print(1)"), package="no_such_package")
    assert script.run([skipped], tmp_path)[0]["state"] == "skipped"
    installed = script.Check("flash", "speed", python("print(1)"), package="json")
    assert script.run([installed], tmp_path)[0]["state"] == "ok"
    changed = script.Check("flash", "speed", python("print(2)"))
    assert script.run([changed], tmp_path)[0]["result"] == "2"


def test_an_output_without_the_line_is_a_failure(script: ModuleType, tmp_path: Path) -> None:
    (row,) = script.run(
        [script.Check("chain", "a run", python("print('nothing')"), pattern="run: .*")], tmp_path
    )
    assert (row["state"], row["result"]) == ("failed", "the output holds nothing like run: .*")


@pytest.mark.slow
def test_the_dry_run_on_a_cpu(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--small", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "small" / "results.json").read_text())
    assert {row["name"] for row in rows if row["state"] == "ok"} == {
        "chain",
        "parity",
        "latency",
        "forecast",
    }
