"""What docs/scaling.md says: its commands compose, its numbers of parameters are the policy's."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tprl.build import conf_dir, load_component
from tprl.commands.entry import addable

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
COMMANDS = re.findall(r"-m src\.(train|eval)([^#\n`\";]*)", PAGE)


@pytest.mark.parametrize(("entry", "options"), COMMANDS)
def test_its_commands_compose(entry: str, options: str) -> None:
    words = [word.replace("<", "").replace(">", "") for word in shlex.split(options) if "=" in word]
    words = [re.sub(r"^seed=.*", "seed=0", word) for word in words]
    # Hydra's Optuna sweeper is not installed here; its search spaces are overrides of the grammar
    # all the same.
    words = [
        word
        for word in words
        if "sweeper" not in word and "interval(" not in word and "choice(" not in word
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose(
            entry, overrides=[addable(word) for word in words], return_hydra_config=True
        )
    assert len(config.hydra.overrides.task) + len(config.hydra.overrides.hydra) == len(words)


def test_there_is_one_for_every_launcher() -> None:
    assert len(COMMANDS) == 11
    assert all(
        f"hydra/launcher={name}" in PAGE
        for name in ("joblib", "submitit_local", "submitit_slurm", "ray")
    )


@pytest.mark.parametrize(("width", "column"), [(192, 2), (4096, 3)])
def test_its_bytes(width: int, column: int) -> None:
    policy = load_component("policy", "transformer", token_width=width)

    def trained(part: str, without: str | tuple[str, ...] = ()) -> int:
        policy.train_only(part, without)
        return sum(p.numel() for p in policy.parameters() if p.requires_grad)

    def cell(row: str) -> str:
        return (
            next(line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
            .split(" | ")[column]
            .strip(" |")
        )

    def megabytes(count: int) -> str:
        return f"{count * 4 / 1e6:.2f} MB"

    both = sum(p.numel() for p in policy.parameters())
    assert cell("once per stage") == megabytes(both)
    actor, whole = trained("net.", "net.value_head"), trained("net.")
    assert cell("every optimizer step") == f"{actor:,} parameters, {megabytes(actor)}"
    assert cell("the same of PPO") == f"{whole:,} parameters, {megabytes(whole)}"
    assert cell("every step of the autoencoder") == megabytes(trained("autoencoder."))
