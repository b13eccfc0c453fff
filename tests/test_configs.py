"""Every choice of every group composes."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tests.configs import GROUPS, composed

from tprl.build import choices, conf_dir

CHANGES_OTHERS = ("stage", "experiment", "debug")  # each choice of these is composed alone
EVAL_GROUPS = ("model", "pruner", "dataset", "logger")


def side_by_side(groups: Iterable[str]) -> list[list[str]]:
    """Command lines that choose something of every group, until each choice was made once:
    composing takes 0.15 s, however many groups are chosen from."""
    rows = zip_longest(*([f"{group}={name}" for name in choices(group)] for group in groups))
    return [[word for word in row if word is not None] for row in rows]


TRAIN_LINES = side_by_side(group for group in GROUPS if group not in CHANGES_OTHERS)
TRAIN_LINES += [line for group in CHANGES_OTHERS for line in side_by_side([group])]


def targets(node: object) -> list[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    names = [node["_target_"]] if isinstance(node, dict) and "_target_" in node else []
    return names + [target for child in children for target in targets(child)]


class TestConfigs:
    def test_every_group_is_a_directory_with_choices(self) -> None:
        assert all(choices(group) for group in GROUPS)

    def test_a_group_is_listed_sorted(self) -> None:
        assert choices("stage") == [
            "adapt",
            "all",
            "alternate",
            "autoencoder",
            "distill",
            "lfd",
            "ppo",
            "pretrain",
            "tune",
            "turns",
        ]

    @pytest.mark.parametrize("line", TRAIN_LINES, ids=" ".join)
    def test_every_choice_composes_for_training(self, line: list[str]) -> None:
        plain = OmegaConf.to_container(composed("train", *line), resolve=True)
        assert isinstance(plain, dict)
        assert {"stage", "model", "dataset", "policy", "reward", "trainer", "seed"} <= plain.keys()
        allowed = ("tprl.", "torch.optim.", "lightning.pytorch.")
        for group in (word.partition("=")[0] for word in line):
            # these change others, or are nothing
            assert group in plain or group in ("experiment", "debug", "logger")
            assert all(target.startswith(allowed) for target in targets(plain.get(group)))

    @pytest.mark.parametrize("line", side_by_side(EVAL_GROUPS), ids=" ".join)
    def test_every_choice_composes_for_evaluation(self, line: list[str]) -> None:
        plain = OmegaConf.to_container(composed("eval", *line), resolve=True)
        assert isinstance(plain, dict)
        assert {"model", "dataset", "keep_ratios", "split"} <= plain.keys()
        for group in (word.partition("=")[0] for word in line):
            assert group in plain or group == "logger"

    @pytest.mark.parametrize("stage", choices("stage"))
    def test_debug_fast_changes_settings_that_the_stage_has(self, stage: str) -> None:
        def keys(node: Any) -> set[str]:
            below = {
                f"{key}.{name}"
                for key, value in node.items()
                if isinstance(value, DictConfig)
                for name in keys(value)
            }
            return {str(key) for key in node} | below

        usual, fast = (
            composed("train", f"stage={stage}"),
            composed("train", f"stage={stage}", "debug=fast"),
        )
        assert keys(fast) == keys(usual)
        assert fast.stage != usual.stage

    @pytest.mark.parametrize("name", ["train", "eval", "demo"])
    def test_the_defaults_are_the_embedded_model_and_dataset(self, name: str) -> None:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = compose(name, return_hydra_config=True)
        chosen = config.hydra.runtime.choices
        assert (chosen.model, chosen.dataset) == ("tiny_llava", "scenes")
