"""What the README says works: its Python runs, its commands compose."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tprl.build import choices, conf_dir
from tprl.commands.entry import addable

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"python -m src\.(train|eval|demo)([^#\n`]*)", README)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(("entry", "options"), COMMANDS)
def test_its_commands_compose(entry: str, options: str) -> None:
    words = [w.replace("<", "").replace(">", "").replace(" ", "_") for w in shlex.split(options) if "=" in w]
    words = [re.sub(r"^([^\[,]+),.*", r"\1", word) for word in words]  # the first job of a sweep
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose(entry, overrides=[addable(word) for word in words], return_hydra_config=True)
    for key, _, value in (word.partition("=") for word in words):
        landed = config.hydra.runtime.choices.get(key), OmegaConf.select(config, key)
        assert value in landed or landed[1] is not None, key


GROUPS = ["stage", "model", "pruner", "policy", "reward", "dataset", "trainer", "logger", "experiment"]


@pytest.mark.parametrize("group", GROUPS)
def test_its_table_lists_every_choice(group: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}` |"))
    assert set(choices(group)) <= set(re.findall(r"`([a-z0-9_]+)`", row))
