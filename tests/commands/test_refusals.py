"""What train and eval refuse before they start, each in one sentence."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.commands.calls import FAST, refused

from tprl.commands import setup
from tprl.commands.setup import make_dataset, make_lvlm
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.base import make_pruner
from tprl.rewards import WeightedReward


class TestOneSentence:
    def test_devices_as_a_list_are_refused(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "CUDA_VISIBLE_DEVICES" in refused(
            capsys, "train", tmp_path, "trainer.devices=[1]", "logger=none"
        )

    @pytest.mark.parametrize(
        ("name", "words", "value"),
        [
            ("train", ["stage=lfd", "stage.keep_ratio=0"], "0"),
            ("train", ["stage=ppo", "stage.keep_ratio=1.7"], "1.7"),
            ("eval", ["pruner=random", "keep_ratios=[a]"], "a"),
        ],
    )
    def test_a_keep_ratio_out_of_range(
        self,
        name: str,
        words: list[str],
        value: str,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        sentence = refused(capsys, name, tmp_path, *words)
        key = words[1].partition("=")[0]
        assert f"{key} must be a number in (0, 1], got {value}" in sentence

    @pytest.mark.parametrize(
        ("name", "words", "key", "value"),
        [
            ("eval", ("pruner=random",), "limit", "0"),
            ("train", FAST, "stage.evaluation.limit", "-3"),
            ("train", FAST, "stage.ppo.served.limit", "few"),
        ],
    )
    def test_a_limit_that_leaves_no_question(
        self,
        name: str,
        words: tuple[str, ...],
        key: str,
        value: str,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        assert refused(capsys, name, tmp_path, f"{key}={value}", *words) == (
            f"error: {key} must be a whole number of at least 1, got {value}; use e.g. 1000, or "
            "null for the whole split."
        )
        assert not (tmp_path / "autoencoder").exists()

    def test_a_run_that_does_not_exist(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "/no/such/run does not exist" in refused(
            capsys, "eval", tmp_path, "run=/no/such/run"
        )
        sentence = refused(capsys, "train", tmp_path, "stage=ppo", "stage.init_from=/no/such/run")
        assert "/no/such/run does not exist" in sentence

    def test_adaptive_budgets_of_no_policy(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "needs a trained policy: give stage.init_from" in refused(
            capsys, "train", tmp_path, "stage=adapt"
        )
        options = ("stage=adapt", "stage.init_from=tprl_tiny_llava", "policy.select=topk")
        assert "leave policy out" in refused(capsys, "train", tmp_path / "other", *options)

    @pytest.mark.parametrize(
        ("stage", "option"),
        [
            ("all", "stage.adapt.budgets=[0.1,1.7]"),
            ("all", "stage.adapt.keep_ratios=[0.2,0]"),
            ("ppo", "stage.calibrate=[0.5,7]"),
            ("ppo", "stage.served.keep_ratios=[2]"),
        ],
    )
    def test_ratios_of_any_option_are_checked_before_training(
        self, stage: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        sentence = refused(capsys, "train", tmp_path, f"stage={stage}", option)
        assert sentence.startswith(f"error: {option.partition('=')[0]} must be a number in (0, 1]")
        assert not (tmp_path / "config.yaml").exists()

    def test_a_run_without_weights(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "old").mkdir()
        assert "holds no config.yaml" in refused(
            capsys, "eval", tmp_path / "new", f"run={tmp_path / 'old'}"
        )
        (tmp_path / "old" / "config.yaml").write_text("model: {}\ndataset: {}\n")
        sentence = refused(capsys, "eval", tmp_path / "new", f"run={tmp_path / 'old'}")
        assert "holds no trained pruner" in sentence

    def test_weights_out_of_reach(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        sentence = refused(capsys, "train", tmp_path, "stage=lfd", "model=llava")
        assert "model.pretrained=" in sentence
        assert "model=tiny_llava" in sentence

    def test_the_oracle_cannot_demonstrate(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        sentence = refused(
            capsys, "train", tmp_path, "stage=lfd", "pruner=oracle", "policy.code_width=0", *FAST
        )
        assert "cannot demonstrate" in sentence

    def test_a_read_only_folder(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        # root may write wherever a file system can be written
        folder = Path("/sys") if os.geteuid() == 0 else tmp_path
        if folder == tmp_path:
            tmp_path.chmod(0o500)
        assert "cannot write" in refused(capsys, "train", folder / "run", *FAST)

    def test_nothing_to_evaluate(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "nothing to evaluate" in refused(capsys, "eval", tmp_path)


def test_a_model_of_another_kind() -> None:
    config = OmegaConf.create({"_target_": "tprl.pruners.keep_all.KeepAll"})
    with pytest.raises(UserError, match=r"KeepAll does not derive from tprl\.lvlm\.base\.BaseLVLM"):
        make_lvlm(config)


def test_parts_that_lack_their_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"_target_": "tprl.lvlm.toy.ToyLVLM"})
    with pytest.raises(UserError, match=r"ToyLVLM does not derive from tprl\.pruners\.base\."):
        make_pruner(config)
    with pytest.raises(UserError, match=r"object does not derive from tprl\.rewards\.Term: derive"):
        WeightedReward([object()])
    monkeypatch.setattr(setup, "build", lambda config, split: object())
    with pytest.raises(UserError, match=r"ToyLVLM does not derive from tprl\.data\.base\."):
        make_dataset(config, ToyLVLM(), "val")
