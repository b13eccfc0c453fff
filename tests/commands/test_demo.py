"""`python -m src.demo` up to the page: what it refuses, and which pruners it offers."""

import importlib.util
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tests import test_api_retention as calibrations
from tests.commands.calls import call

from tprl.build import conf_dir, load_component
from tprl.commands.demo import demo, make_pruners, starting_ratio
from tprl.errors import UserError
from tprl.pruners.random import RandomPruner


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        call("demo", demo, directory, *overrides)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("demo", overrides=list(overrides))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["keep_ratio=1.5"], "keep_ratio must be a number in (0, 1], got 1.5"),
        (["keep_ratio=0"], "keep_ratio must be a number in (0, 1], got 0"),
        (["examples=0"], "examples must be a whole number of at least 1, got 0"),
        (["port=70000"], "port must be a whole number from 1 to 65535, got 70000"),
        (["host=256.1.1.1"], "host=256.1.1.1 is not an address"),
        (["port=http"], "port must be a whole number from 1 to 65535, got http"),
        (["run=a", "pruner=random"], "leave one out"),
        (["run=/no/such/run"], "/no/such/run does not exist"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert sentence in refused(capsys, tmp_path, *words)


def test_without_gradio_the_error_names_the_install_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    assert "needs gradio, which is not installed: `make demo-page`" in refused(capsys, tmp_path)


def test_a_retention_says_where_the_slider_starts(tmp_path: Path) -> None:
    lvlm, rule = load_component("model", "llava", pretrained=None), RandomPruner()
    calibrations.calibration(lvlm, rule).save(tmp_path / "retention.json")
    cfg = config("retention=0.95", f"calibration={tmp_path}")
    assert starting_ratio(cfg, lvlm, rule, "scenes") == 1 / 3
    assert starting_ratio(config("keep_ratio=0.2"), lvlm, rule, "scenes") == 0.2
    with pytest.raises(UserError, match="on questions of scenes, and these are of crowd"):
        starting_ratio(cfg, lvlm, rule, "crowd")


class TestPruners:
    def test_the_chosen_pruner_comes_first_without_duplicates(self) -> None:
        lvlm = load_component("model", "tiny_llava")
        assert list(make_pruners(config(), lvlm)) == ["tprl", *config().pruners]
        chosen = make_pruners(config("pruner=divprune", "pruners=[random,divprune]"), lvlm)
        assert list(chosen) == ["divprune", "random"]

    def test_those_that_the_model_cannot_serve_are_left_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        lvlm = load_component("model", "qwen2_5_vl", pretrained=None)
        with caplog.at_level("INFO"):
            chosen = make_pruners(
                config("pruner=random", "pruners=[divprune,visionzip,tome]"), lvlm
            )
        assert list(chosen) == ["random", "divprune", "visionzip"]
        assert "left out: tome" in caplog.text
        with pytest.raises(UserError, match="qwen2_5_vl makes its tokens of patches"):
            make_pruners(config("pruner=tome"), lvlm)

    def test_a_run_selects_its_own_pruner(self, tmp_path: Path) -> None:
        lvlm = load_component("model", "tiny_llava")
        load_component("pruner", "mlp").save_pretrained(tmp_path / "pruner")
        assert next(iter(make_pruners(config(f"run={tmp_path}"), lvlm))) == "mlp"
