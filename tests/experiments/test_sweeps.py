"""experiments/sweeps: every W&B sweep file gives command lines that Hydra composes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.commands.test_wandb_run import DOCS
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tprl.build import conf_dir
from tprl.commands.entry import addable

STUDIES = Path(__file__).parents[2] / "experiments"
SWEEPS = sorted((STUDIES / "sweeps").glob("*.yaml"))


def grid(parameters: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What `${args_no_hyphens}` becomes, by W&B's own code, in runs of a sweep that show every
    value at least once."""
    values = {key: item.get("values", [item.get("value")]) for key, item in parameters.items()}
    runs = [
        {key: {"value": v[i % len(v)]} for key, v in values.items()}
        for i in range(max(map(len, values.values())))
    ]
    return [create_sweep_command_args({"args": run})["args_no_hyphens"] for run in runs]


def test_every_study_has_one() -> None:
    assert {path.parent.name for path in STUDIES.glob("*/run.sh")} <= {path.stem for path in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_composes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    sweep = yaml.safe_load(path.read_text())
    entry, place = sweep["command"][3], sweep["command"][5]
    assert sweep["command"] == [
        "${env}",
        "${interpreter}",
        "-m",
        entry,
        "${args_no_hyphens}",
        place,
    ]
    assert sweep.get("metric", {"name": "ppo/served"})["name"] in DOCS.read_text()
    result = []
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        for words in grid(sweep["parameters"]):
            overrides = [addable(word) for word in (*words, place)]
            config = compose(entry.removeprefix("src."), overrides, return_hydra_config=True)
            folder = config.hydra.run.dir
            config.hydra = None
            result.append(str(OmegaConf.to_container(config, resolve=True)))
            assert folder == f"runs/sweeps/{path.stem}/r1"
    assert len(set(result)) == len(result) > 1  # every parameter changes the run


def test_a_policy_starts_from_the_base_of_its_own_seed() -> None:
    sweep = yaml.safe_load((STUDIES / "sweeps/ablation_budget.yaml").read_text())
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        starts = [
            compose("train", [addable(word) for word in words]).stage.init_from
            for words in grid(sweep["parameters"])
        ]
    assert starts == [f"runs/study/base/{seed}/lfd" for seed in range(3)]
