"""One value where a list may stand."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tprl.data.scenes import Scenes
from tprl.data.values import name_list, several
from tprl.errors import UserError
from tprl.evaluation.entries import compared_entries, named_entries

SETTINGS = {"keep_ratios": [0.3], "seeds": [0]}


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("yes", ["yes"]),
        (["yes"], ["yes"]),
        (("a", "b"), ["a", "b"]),
        (0.3, [0.3]),
        (0, [0]),
        (None, []),
        ("", [""]),
        ({"a": 1}, [{"a": 1}]),
        (OmegaConf.create([1, 2]), [1, 2]),
    ],
)
def test_a_value_is_a_list_of_one(value: Any, values: list[Any]) -> None:
    assert several(value) == values


@pytest.mark.parametrize("value", [3, [3], ["a", None], "", [" "], {"a": 1}])
def test_invalid_names_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"pruners=.* is not a name: write pruners=<name>"):
        name_list("pruners", value)


def test_one_pruner_without_brackets() -> None:
    assert [entry.name for entry in named_entries("uniform", SETTINGS)] == ["keep_all", "uniform"]


def test_one_family_without_brackets() -> None:
    assert Scenes("test", families="count").families == ("count",)


def test_an_arm_without_a_run() -> None:
    with pytest.raises(UserError, match=r"runs\.a=\[\] holds no run"):
        compared_entries({"a": []}, SETTINGS)
    with pytest.raises(UserError, match=r"runs\.a=3 holds 3, which is not a name"):
        compared_entries({"a": 3}, SETTINGS)


def test_one_path_is_one_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):  # and not "a"
        compared_entries({"a": str(tmp_path / "absent")}, SETTINGS)
