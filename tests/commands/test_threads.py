"""How many threads a run computes with, who decides, and that a resumed run has as many."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tprl.build import load_component
from tprl.commands import threads
from tprl.commands.option_kinds import KINDS
from tprl.commands.threads import SET, parameters, use_threads
from tprl.errors import UserError
from tprl.kinds import typed
from tprl.runtime.run_directory import SETTINGS, read_yaml


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four cores, and nothing in the environment."""
    before = torch.get_num_threads()
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "DEFAULT", 4)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def model(millions: float, device: str = "cpu") -> Any:
    layer = torch.nn.Linear(1000, int(millions * 1000), bias=False, device="meta")
    return SimpleNamespace(name="m", device=torch.device(device), model=layer)


def used(directory: Path, lvlm: Any, **settings: Any) -> int:
    config = OmegaConf.create({"seed": 0, "threads": None} | settings)
    count = use_threads(config, directory, lvlm)
    assert config.threads == torch.get_num_threads() == count
    return count


class TestChoice:
    def test_one_for_the_embedded_model(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        assert used(tmp_path, load_component("model", "tiny_llava")) == 1
        assert (
            "threads: 1 (the LVLM has 3.6 M parameters, too few to share; threads=<n> sets"
            in caplog.text
        )

    @pytest.mark.parametrize(
        ("lvlm", "count"),
        [(model(49), 1), (model(51), 4), (model(3, "cuda"), 4), (None, 4)],
        ids=str,
    )
    def test_the_number_follows_size_and_device(
        self, lvlm: Any, count: int, tmp_path: Path
    ) -> None:
        assert used(tmp_path, lvlm) == count

    @pytest.mark.parametrize("name", SET)
    def test_the_environment_counts_more_than_the_size(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, "3,1")
        assert used(tmp_path, model(1)) == 3

    def test_an_option_counts_most(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SET[0], "3")
        assert used(tmp_path, model(1), threads=2) == 2

    def test_a_small_job_of_a_sweep_leaves_the_next_its_threads(self, tmp_path: Path) -> None:
        assert [used(tmp_path, model(size)) for size in (1, 60)] == [1, 4]


@pytest.mark.parametrize("value", [0, -1, "two", 1.5, True])
def test_invalid_numbers_are_refused(value: Any) -> None:
    sentence = (
        rf"threads must be a whole number .*, got {re.escape(typed(value))}; use e\.g\. 1, or null"
    )
    with pytest.raises(UserError, match=sentence):
        KINDS["threads"]("threads", value)


def test_the_run_records_its_threads(tmp_path: Path) -> None:
    """`resume` starts from config.yaml (see test_entry), where the number counts as an option."""
    use_threads(OmegaConf.create({"seed": 0, "threads": None}), tmp_path, model(1))
    again: DictConfig = read_yaml(tmp_path / SETTINGS, "")
    assert again.threads == 1
    torch.set_num_threads(4)
    assert use_threads(again, tmp_path, model(60)) == 1


def test_parameters_of_objects_without_modules_are_zero() -> None:
    assert parameters(load_component("model", "toy")) == 0
