"""What train and eval refuse before they start, each in one sentence."""

import os
from pathlib import Path

import pytest
from tests.commands.calls import FAST, refused


class TestOneSentence:
    def test_cards_are_chosen_elsewhere(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "CUDA_VISIBLE_DEVICES" in refused(
            capsys, "train", tmp_path, "trainer.devices=[1]", "logger=none"
        )

    @pytest.mark.parametrize("value", ["0", "1.7", "a"])
    def test_a_keep_ratio_that_is_none(
        self, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for stage in ("lfd", "ppo"):
            sentence = refused(
                capsys, "train", tmp_path, f"stage={stage}", f"stage.keep_ratio={value}"
            )
            assert f"keep_ratio must be a number in (0, 1], got {value}" in sentence
        assert f"keep_ratios must be a number in (0, 1], got {value}" in refused(
            capsys, "eval", tmp_path, "pruner=random", f"keep_ratios=[{value}]"
        )

    @pytest.mark.parametrize("value", ["0", "-3", "few"])
    def test_a_limit_that_leaves_no_question(
        self, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        bound = "a whole number of at least 1"
        sentence = (
            f"limit must be {bound}, got {value}; use e.g. 1000, or null for the whole split."
        )
        assert (
            refused(capsys, "eval", tmp_path, "pruner=random", f"limit={value}")
            == f"error: {sentence}"
        )
        for key in ("stage.evaluation.", "stage.ppo.served."):
            assert (
                refused(capsys, "train", tmp_path, f"{key}limit={value}", *FAST)
                == f"error: {key}{sentence}"
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

    @pytest.mark.parametrize("name", ["budgets=[0.1,1.7]", "keep_ratios=[0.2,0]"])
    def test_bad_ratios_of_any_kind_before_anything_is_trained(
        self, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        sentence = refused(capsys, "train", tmp_path, "stage=all", f"stage.adapt.{name}")
        assert sentence.startswith(f"error: stage.adapt.{name.partition('=')[0]} must be")
        assert "must be a number in (0, 1]" in sentence
        assert not (tmp_path / "config.yaml").exists()
        for words in ("stage.calibrate=[0.5,7]", "stage.served.keep_ratios=[2]"):
            assert "must be a number in (0, 1]" in refused(
                capsys, "train", tmp_path, "stage=ppo", words
            )

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

    def test_the_oracle_teaches_nobody(
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
