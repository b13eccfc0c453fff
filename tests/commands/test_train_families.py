"""Training, from demonstrations to PPO, on every family of LVLMs."""

import json
from pathlib import Path

import pytest
from tests.commands.calls import call, refused
from tests.lvlm.small import families, save_folder

from tprl.build import load_component
from tprl.commands.evaluate import evaluate
from tprl.commands.train import train
from tprl.pruners.folder import CONFIG


class TestFamilies:
    """Training runs on every family; the rest of the chain is shared."""

    def test_parity_is_a_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = (
            "model.pretrained=null",
            "model.dtype=float32",
            "model.attention=eager",
            "logger=none",
            "limit=3",
        )
        run = call(
            "eval", evaluate, tmp_path / "parity", "mode=parity", "model=qwen2_5_vl", *options
        )
        table = (run / "parity.md").read_text()
        assert "| `qwen2_5_vl` | masked | 0 | " in table
        assert table.rstrip().endswith("| yes |")
        assert table in capsys.readouterr().out + "\n"

    def test_an_infeasible_evaluation_refuses_the_whole_chain(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tprl.cost.shapes.LANGUAGE_MODELS", frozenset({"llama"}))
        options = ("model=qwen2_5_vl", "model.pretrained=null", "model.dtype=float32", "debug=fast")
        line = refused(capsys, "train", tmp_path / "run", *options)
        assert (
            "the cost model does not know the language model 'qwen2_5_vl_text' (it knows llama): "
            in line
        )
        assert not (tmp_path / "run" / "lfd").exists()

    @pytest.mark.parametrize(
        ("model", "reason"),
        [("toy", "toy cannot provide"), ("gemma3", "word_attention reads layers of the language")],
    )
    def test_a_demonstrator_that_the_model_cannot_serve_is_refused_before_any_training(
        self, model: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        small = ("dataset=toy",) if model == "toy" else ("model.pretrained=null",)
        options = (f"model={model}", *small, "debug=fast", "pruner=attention_words")
        line = refused(capsys, "train", tmp_path / "run", *options)
        assert line.startswith(f"error: {reason}")
        assert "e.g. pruner=" in line
        assert not (tmp_path / "run" / "autoencoder").exists()

    def test_weights_from_a_local_folder(self, tmp_path: Path) -> None:
        """The path that a downloaded checkpoint takes."""
        save_folder(
            load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32"),
            tmp_path / "weights",
        )
        options = (f"model.pretrained={tmp_path / 'weights'}", "model.dtype=float32", "logger=none")
        arguments = (
            "stage=lfd",
            "stage.demonstrations=4",
            "stage.epochs=1",
            "dataset.limit=4",  # of every split
            "stage.served.limit=null",  # the whole split, after which the calibration begins again
        )
        run = call(
            "train",
            train,
            tmp_path / "lfd",
            *arguments,
            "model=qwen2_5_vl",
            "policy.code_width=0",
            *options,
        )
        config = json.loads((run / "pruner" / CONFIG).read_text())
        about = config["trained_on"]
        assert (about["family"], about["pretrained"]) == ("qwen2_5_vl", str(tmp_path / "weights"))
        assert config["trained_to"] == pytest.approx(0.3333)  # it was calibrated

    @pytest.mark.parametrize(
        "model",
        [
            "llava",
            "qwen2_5_vl",
            *(
                pytest.param(m, marks=pytest.mark.slow)
                for m in families()
                if m not in ("llava", "qwen2_5_vl")
            ),
        ],
    )
    def test_demonstrations_and_ppo_on_a_small_random_model(
        self, model: str, tmp_path: Path
    ) -> None:
        model_options = (
            f"model={model}",
            "model.pretrained=null",
            "model.dtype=float32",
            "logger=csv",
        )
        options = (
            *model_options,
            "policy.code_width=0",
            "stage.calibrate=null",
            "stage.served.limit=4",
        )
        # The default demonstrator reads layers of the language model, which these refuse.
        teacher = "attention_dpp" if model in ("gemma3", "gemma4", "qwen3_5") else "attention_words"
        arguments = (
            "stage=lfd",
            f"pruner={teacher}",
            "stage.demonstrations=8",
            "stage.epochs=1",
        )
        lfd = call("train", train, tmp_path / "lfd", *arguments, *options)
        arguments = (
            "stage=ppo",
            "stage.iterations=1",
            "stage.prompts=2",
            "stage.group=2",
            "stage.keep_ratio=0.3",
        )
        ppo = call("train", train, tmp_path / "ppo", *arguments, *options, f"stage.init_from={lfd}")
        about = json.loads((ppo / "pruner" / CONFIG).read_text())
        assert about["trained_on"]["model"] == model
        assert about["trained_on"]["stages"] == ["lfd", "ppo"]
        logged = (ppo / "metrics.csv").read_text()
        assert "ppo/kl" in logged.splitlines()[0]
