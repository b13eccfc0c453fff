"""README.md, docs/options.md and docs/api.md: their Python runs, their commands compose, their
counts hold."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.configs import GROUPS

from tprl.build import choices, conf_dir
from tprl.commands.entry import addable
from tprl.commands.stages import in_full

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text() for name in ("README.md", "docs/options.md", "docs/api.md")
}
COMMANDS = re.findall(
    r"python -m src\.(train|eval|bench|demo|export)([^#\n`]*)", "\n".join(PAGES.values())
)
CONTROLS = {"attention_dpp", "question_dpp", "mmr_attention", "keyword_budget"}
CONTROLS |= {"word_attention", "attention_words"}
CONTROLS |= {"keyword_color", "attention_color", "core_focus"}
LEARNED, ORACLES = {"mlp", "tprl", "tprl_adaptive", "scorer_mmr"}, {"oracle", "oracle_dpp"}
EMBEDDED = {"scenes", "crowd", "screens", "toy", "custom"}


def prose(page: str) -> list[str]:
    """The sentences of a page, without code, tables and pictures."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<img[^>]*>|^\|.*$|^#.*$", "", text, flags=re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n- ", text)
    return [
        s for block in blocks for s in re.split(r"(?<=[.;:!?])\s+", " ".join(block.split())) if s
    ]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_no_sentence_has_more_than_thirty_words() -> None:
    assert [sentence for sentence in prose(README) if len(sentence.split()) > 30] == []


@pytest.mark.parametrize(("page", "lines"), [("README.md", 1), ("docs/api.md", 4)])
def test_its_python_runs(page: str, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize(("entry", "options"), sorted(set(COMMANDS)))
def test_its_commands_compose(entry: str, options: str) -> None:
    words = [
        w.replace("<", "").replace(">", "").replace(" ", "_")
        for w in shlex.split(options)
        if "=" in w
    ]
    words = [re.sub(r"^([^\[,]+),.*", r"\1", word) for word in words]  # the first job of a sweep
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        name = "eval" if entry == "bench" else entry
        config = compose(
            name, overrides=[addable(word) for word in words], return_hydra_config=True
        )
    for key, _, value in (in_full(word).partition("=") for word in words):
        landed = config.hydra.runtime.choices.get(key), OmegaConf.select(config, key)
        assert value in landed or landed[1] is not None, key


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "debug"])
def test_the_table_of_options_lists_every_choice(group: str) -> None:
    row = next(
        line for line in PAGES["docs/options.md"].splitlines() if line.startswith(f"| `{group}` |")
    )
    assert set(choices(group)) <= set(re.findall(r"`([a-z0-9_]+)`", row))


def test_its_counts_are_those_of_the_listings() -> None:
    plain = set(choices("pruner")) - CONTROLS - LEARNED - ORACLES - {"keep_all"}
    assert f"{len(plain)} published or simple ones, {len(CONTROLS)} controls" in README
    assert f"{len(LEARNED)} learned, {len(ORACLES)} oracles" in README
    assert f"{len(set(choices('dataset')) - EMBEDDED)} benchmarks" in README
