"""`python -m src.export`: the folder, what to type next, and refusals of one sentence."""

import json
import sys
from pathlib import Path

import pytest

from tprl.commands import export as command
from tprl.commands.entry import launch


def status(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *options])
    try:
        launch("export", command.export)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_folder_and_the_command_that_serves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        status(monkeypatch, "pruner=divprune", "keep_ratio=0.25", f"hydra.run.dir={tmp_path}") == 0
    )
    folder = tmp_path / "vllm"
    server = "python -m vllm.entrypoints.openai.api_server --model"
    assert capsys.readouterr().out == f"run: {tmp_path}\nnext: {server} {folder} --dtype float32\n"
    config = json.loads((folder / "config.json").read_text())
    assert (config["tprl_keep_ratio"], config["tprl_positions"]) == (0.25, "keep")
    assert config["tprl_pruner"] == {"_target_": "tprl.pruners.divprune.DivPrunePruner"}
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["target=tensorrt"], "target must be vllm or openvino, got tensorrt."),
        (["positions=some"], "positions must be keep or compact, got some."),
        (["keep_ratio=1.7"], "keep_ratio must be a number in (0, 1], got 1.7"),
        (
            ["weights=int8"],
            "weights is not read: target=vllm writes them in model.dtype; leave it out.",
        ),
        (
            ["run=/nowhere"],
            "run=/nowhere does not exist: give the directory that src.train printed as `run:`.",
        ),
        (["run=/nowhere", "pruner=random"], "run and pruner both name the pruner: leave one out."),
        (["pruner=tprl_adaptive"], "pruner tprl_adaptive gives every question its own budget"),
        (
            ["pruner=vispruner"],
            "pruner vispruner reads cls_attention, vision_features of the vision tower",
        ),
        (["model=toy"], "model=toy has no weights of a stock class to export"),
        (
            ["model=smolvlm2", "model.pretrained=null", "pruner=divprune"],
            "model=smolvlm2 is a smolvlm",
        ),
    ],
)
def test_one_sentence(
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert status(monkeypatch, *options, f"hydra.run.dir={tmp_path}") == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {sentence}")
    assert line.count("\n") == 1
    assert not (tmp_path / "vllm").exists()


def test_an_engine_that_was_not_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tprl.serving.versions.vllm_version", lambda: "0.9.1")
    monkeypatch.setattr(command, "vllm_version", lambda: "0.9.1")
    assert status(monkeypatch, f"hydra.run.dir={tmp_path}") == 2
    assert capsys.readouterr().err.startswith(
        "error: vLLM 0.9.1 was not tried with this plugin: use 0.32.0"
    )


def test_a_missing_openvino_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert status(monkeypatch, "target=openvino", f"hydra.run.dir={tmp_path}") == 2
    assert capsys.readouterr().err.startswith(
        "error: target=openvino converts here, and openvino is not installed"
    )
