"""How a command starts and ends: its words, its status, and the files that tell how it went."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig
from tests.processes import ROOT, started

from tprl.build import choices
from tprl.commands.entry import addable, command_line, launch
from tprl.errors import UserError


class TestCommandLine:
    @pytest.mark.parametrize(
        ("word", "seen"),
        [
            ("model.placement=shard", "++model.placement=shard"),
            ("pruner.published=true", "++pruner.published=true"),
            ("model=llava", "model=llava"),
            ("stage.keep_ratio=0.3", "stage.module.keep_ratio=0.3"),
            ("+model.attention=sdpa", "+model.attention=sdpa"),
            ("--help", "--help"),
        ],
    )
    def test_any_argument_of_a_component_can_be_set(self, word: str, seen: str) -> None:
        assert addable(word) == seen

    @pytest.mark.parametrize("entry", ["train", "eval", "demo", "export"])
    def test_a_process_ends_with_one_line_and_status_2(self, entry: str) -> None:
        done = started("-m", f"src.{entry}", "model=foo")
        assert done.returncode == 2
        assert (
            done.stderr
            == f"error: model=foo does not exist; choose one of: {', '.join(choices('model'))}.\n"
        )

    @pytest.mark.parametrize(
        ("option", "sentence"),
        [
            (
                "stage=foo",
                (
                    "stage=foo does not exist; choose one of: adapt, "
                    "all, alternate, autoencoder, distill, lfd, ppo, pretrain, tune, turns."
                ),
            ),
            ("pruner=foo", "pruner=foo does not exist; choose one of: attention_color, "),
            ("experiment=foo", "experiment=foo does not exist; choose one of: crowd, demo, "),
            (
                "stage.foo=1",
                (
                    "stage.foo is not a key here, because stage=all "
                    "runs several stages: name the stage, as in "
                ),
            ),
            (
                "stage.reward=fidelity",
                "stage.reward is a group of its own: write reward=<choice>, one of: fidelity, ",
            ),
            ("foo=1", "foo is not a key here; there are: cache, dataset, "),
            ("seed", "the option 'seed' cannot be read ("),
            ("hydra.run.dir=/proc/tprl", "cannot write to /proc/tprl ("),
            (
                f"hydra.run.dir={ROOT}/LICENSE/x",
                f"cannot write to {ROOT}/LICENSE/x (Not a directory); choose another",
            ),
        ],
    )
    def test_bad_options_are_one_sentence(
        self,
        option: str,
        sentence: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.status(monkeypatch, option) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {sentence}")
        assert line.count("\n") == 1

    def test_a_bad_choice_in_a_sweep_stops_it_before_its_first_job(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "-m", "stage=lfd,foo", f"hydra.sweep.dir={tmp_path}") == 2
        assert "error: stage=foo does not exist" in capsys.readouterr().err
        assert not list(tmp_path.glob("*/done.json"))

    def test_a_run_prints_its_directory(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, f"hydra.run.dir={tmp_path}") == 0
        assert (
            capsys.readouterr().out == f"run: {tmp_path}\nnext: python -m src.demo run={tmp_path}\n"
        )
        assert (tmp_path / "done.json").exists()

    def test_a_user_error_of_the_work_is_one_sentence_and_leaves_failed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "seed=13", f"hydra.run.dir={tmp_path}") == 2
        assert capsys.readouterr().err == "error: 13 is unlucky.\n"
        assert "13 is unlucky" in (tmp_path / "FAILED").read_text()
        assert not (tmp_path / "done.json").exists()

    def test_a_bug_keeps_its_traceback(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            self.status(monkeypatch, "seed=99", f"hydra.run.dir={tmp_path}")
        assert "ZeroDivisionError" in (tmp_path / "FAILED").read_text()

    def test_a_full_disk_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "seed=28", f"hydra.run.dir={tmp_path}") == 2
        assert capsys.readouterr().err.startswith(
            "error: cannot write to /x/y (No space left on device); "
        )

    def test_a_sweep_goes_on_after_a_failure_and_skips_what_is_done(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        sweep = ("-m", "seed=1,13,2", f"hydra.sweep.dir={tmp_path}")
        assert self.status(monkeypatch, *sweep) == 2
        assert (self.ran(tmp_path), (tmp_path / "1/FAILED").exists()) == (
            {"0": "1\n", "2": "2\n"},
            True,
        )
        assert capsys.readouterr().err.endswith("error: 13 is unlucky.\n")

        monkeypatch.setattr(self, "unlucky", 14, raising=False)
        assert self.status(monkeypatch, *sweep) == 0
        # one line each: none ran twice
        assert self.ran(tmp_path) == {"0": "1\n", "1": "13\n", "2": "2\n"}
        assert not (tmp_path / "1/FAILED").exists()

    def test_another_sweep_does_not_overwrite_finished_jobs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}") == 0
        assert self.status(monkeypatch, "-m", "seed=3,1,2", f"hydra.sweep.dir={tmp_path}") == 2
        assert "holds a finished job with other settings (seed=1)" in capsys.readouterr().err
        assert self.ran(tmp_path) == {"0": "1\n", "1": "2\n", "2": "2\n"}

    def test_a_sweep_refuses_ddp(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert (
            self.status(monkeypatch, "-m", "seed=1,2", "trainer=ddp", f"hydra.sweep.dir={tmp_path}")
            == 2
        )
        assert "error: a sweep cannot run trainer.strategy=ddp" in capsys.readouterr().err

    unlucky = 13

    def work(self, config: DictConfig, directory: Path) -> None:
        if config.seed == self.unlucky:
            raise UserError(f"{config.seed} is unlucky.")
        if config.seed == 28:
            raise OSError(28, "No space left on device", "/x/y")
        if config.seed == 99:
            raise ZeroDivisionError
        with (directory / "ran").open("a") as file:
            file.write(f"{config.seed}\n")

    def status(self, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", *options])
        try:
            launch("train", self.work)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    @staticmethod
    def ran(directory: Path) -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in sorted(directory.glob("*/ran"))}


class TestWandbRunsEnd:
    """A run that stays open is continued by the next job of a sweep; one that failed must not look
    finished."""

    @pytest.mark.parametrize(("fails", "status"), [(False, 0), (True, 1)])
    def test_with_the_status_of_the_job(
        self, fails: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        closed: list[int] = []
        fake = SimpleNamespace(run=object(), finish=lambda exit_code: closed.append(exit_code))
        monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "argv", ["train", f"hydra.run.dir={tmp_path}"])

        def work(config: DictConfig, directory: Path) -> None:
            if fails:
                raise RuntimeError("broken")

        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                launch("train", work)
        else:
            launch("train", work)
        assert closed == [status]
        assert (tmp_path / "FAILED").exists() == fails
        assert (tmp_path / "done.json").exists() == (not fails)


def test_done_json_names_the_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "seed=5", f"hydra.run.dir={tmp_path}"])
    launch("train", lambda config, directory: None)
    assert json.loads((tmp_path / "done.json").read_text())["overrides"] == ["seed=5"]


def test_a_job_knows_its_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []

    def work(config: DictConfig, directory: Path) -> None:
        found.append(command_line())

    assert command_line() == ""
    words = [
        "stage=ppo",
        "seed=5",
        "model.placement=replicate",
        "stage.keep_ratio=[0.5,0.1]",
        f"hydra.run.dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    launch("train", work)
    shell = shlex.split(found[0])
    assert shell[:3] == ["python", "-m", "src.train"]
    assert [word.lstrip("+") for word in shell[3:]] == words
