"""What is printed can be pasted: through bash, then through Hydra, every value arrives as it
was."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tprl.build import conf_dir
from tprl.commands.entry import addable, launch
from tprl.commands.shell import command, option, value_of
from tprl.commands.terminal import next_command
from tprl.pruners.card import model_card
from tprl.runtime.quoting import escaped, quoted

NAMES = [
    "mit leer",
    "seed=0,stage=x",
    "o'brien",
    'say "hi"',
    "übung",
    "日本",
    "a(b)[c]{d:e}",
    "run#1",
    "~x",
    "$HOME",
    "${model.name}",
    "\\${x}\\",
    "a\\\\",
    "\\'",
    "`id`;&|<>*?!",
    " both ",
    "null",
    "1e3",
    "two\nlines\tand a tab",
    "no\udcffbreak\xa0space",
]
# a run's directory cannot have ${...}: Hydra resolves it twice
ALL = 'it\'s "a" = [1], {ü}: ~#$HOME \\ `id`'
RUNS = ["mit leer", "o'brien", ALL, "two\nlines\\", "no\udcffbreak\xa0space"]
Paste = Callable[[str], list[str]]


@pytest.fixture
def paste(tmp_path: Path) -> Paste:
    """The words that a `python` on the path gets when bash reads a line."""
    folder = tmp_path / "it's a $PATH"
    folder.mkdir()
    fake = folder / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    fake.chmod(0o755)
    place = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def pasted(line: str) -> list[str]:
        out = subprocess.run(
            ["bash", "-c", line], env=place, capture_output=True, check=True
        ).stdout
        return [os.fsdecode(word) for word in out.split(b"\0")[:-1]]

    return pasted


def read(entry: str, words: list[str]) -> Any:
    assert words[:2] == ["-m", f"src.{entry}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose(entry, overrides=[addable(word) for word in words[2:]])
    return OmegaConf.to_container(config, resolve=True)


class TestOption:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_value_survives_bash_and_hydra(self, name: str, paste: Paste) -> None:
        values = {"run": name, "pruners": [name, "x"], "runs": {"arm": [name]}}
        words = paste(command("eval", *(option(key, value) for key, value in values.items())))
        config = read("eval", words)
        assert {key: config[key] for key in values} == values
        assert value_of(words[2]) == name

    def test_plain_values_are_not_quoted(self) -> None:
        assert option("run", "runs/2026-01-02_x") == "run=runs/2026-01-02_x"
        assert option("pruners", ["a", "b"]) == "pruners=[a,b]"
        assert [option("x", value) for value in (None, True, 3, 0.5)] == [
            "x=null",
            "x=true",
            "x=3",
            "x=0.5",
        ]

    def test_what_stdout_cannot_show_is_written_in_bytes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert quoted("ü") == "'ü'"
        monkeypatch.setattr(
            "tprl.runtime.quoting.sys",
            type("S", (), {"stdout": type("O", (), {"encoding": "ascii"})}),
        )
        assert quoted("ü") == r"$'\xc3\xbc'"

    def test_an_interpolation_in_a_text_stays_text_in_a_config(self) -> None:
        plain = {"a": ["${b}", "\\${b}", "c\\"], "d": 1}
        assert OmegaConf.to_container(OmegaConf.create(escaped(plain)), resolve=True) == plain


class TestPrintedCommands:
    @pytest.mark.parametrize(
        ("stage", "entry", "key", "below"),
        [
            ("lfd", "train", ("stage", "init_from"), ""),
            ("ppo", "eval", ("run",), ""),
            ("all", "demo", ("run",), ""),
            ("pretrain", "train", ("model", "pretrained"), "/model"),
        ],
    )
    def test_next(
        self, stage: str, entry: str, key: tuple[str, ...], below: str, paste: Paste
    ) -> None:
        name = f"{ALL} ${{x}}"
        config = OmegaConf.create(
            {
                "stage": OmegaConf.load(conf_dir() / "stage" / f"{stage}.yaml"),
                "model": {"name": "llava"},
            }
        )
        source = f"++{option('dataset.source', name)}"
        line = next_command("train", config, [source], Path("/runs") / name)
        value = read(entry, paste(line or ""))
        if stage == "lfd":
            assert value["dataset"]["source"] == name
        for part in key:
            value = value[part]
        assert value == f"/runs/{name}{below}"

    @pytest.mark.parametrize("name", RUNS)
    def test_go_on_names_the_directory(self, name: str, paste: Paste, tmp_path: Path) -> None:
        """A second command in the directory of an interrupted run says how to go on, and that can
        be pasted too."""
        run = tmp_path / name
        run.mkdir()
        (run / "last.ckpt").touch()
        (run / "started.json").write_text('{"overrides": ["seed=1"]}')
        sentence = ended("train", option("hydra.run.dir", str(run)), "seed=2")
        (line,) = re.findall("go on with it by `(.*)`, delete it", sentence, re.DOTALL)
        assert value_of(paste(line)[2]) == str(run)

    @pytest.mark.parametrize("name", RUNS)
    def test_the_pasted_line_resumes_that_run(
        self, name: str, paste: Paste, tmp_path: Path
    ) -> None:
        run = tmp_path / name
        run.mkdir()
        (run / "started.json").write_text('{"overrides": ["seed=1"]}')
        words = paste(command("train", option("resume", str(run))))[2:]
        seen = []

        def work(config: Any, directory: Path) -> None:
            seen.append((config.resume, config.seed, directory))

        launched("train", work, *words)
        assert seen == [(str(run), 1, run)]


def test_a_model_card_names_its_folder_in_python() -> None:
    for name in NAMES:
        (text,) = re.findall(r"from_pretrained\((.*)\)", model_card("tprl", {}, name))
        assert eval(text) == name


def launched(entry: str, work: Callable[[Any, Path], Path], *words: str) -> None:
    before = sys.argv
    sys.argv = [f"src.{entry}", *words]
    try:
        launch(entry, work)
    finally:
        sys.argv = before


def ended(entry: str, *words: str) -> str:
    """The sentence of a command that ends with status 2."""
    lines: list[str] = []

    def leave(sentence: str) -> None:
        lines.append(sentence)
        sys.exit(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tprl.commands.entry._exit", leave)
        with pytest.raises(SystemExit):
            launched(entry, lambda config, directory: None, *words)
    return lines[0]
