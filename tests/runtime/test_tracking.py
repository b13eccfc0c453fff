"""What W&B gets, read back from the files of offline runs; and that no failure of it stops a
run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tests.wandb_files import OfflineRun, offline_runs
from wandb.errors import CommError

from tprl.commands.entry import launch, run_names
from tprl.commands.setup import make_logger
from tprl.commands.train import train
from tprl.evaluation.results import Row
from tprl.evaluation.tracked import log_results
from tprl.runtime.tracking import Tracker, log_weights


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [
        (None, None, "offline"),
        (None, "k", "online"),
        ("online", None, "online"),
        ("disabled", "k", "disabled"),
    ],
)
def test_offline_without_a_key(
    mode: str | None, key: str | None, offline: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("WANDB_MODE", mode), ("WANDB_API_KEY", key)):
        if value:
            monkeypatch.setenv(name, value)
    assert Tracker(tmp_path)._wandb_init["mode"] == offline


def the_run(folder: Path) -> OfflineRun:
    (offline,) = offline_runs(folder)
    return offline


class TestMetrics:
    def test_each_has_the_axis_of_its_row(self, tmp_path: Path) -> None:
        tracker = Tracker(tmp_path)
        tracker.log_metrics({"ppo/kl": 0.1, "samples_seen": 8.0}, step=0)
        tracker.log_metrics({"ppo/kl": 0.2, "ppo/served": 0.5, "samples_seen": 16.0}, step=1)
        tracker.log_row({"keep_ratio": 0.5, "eval/tprl/accuracy": 0.7}, axis="keep_ratio")
        offline = the_run(tmp_path)
        assert offline.axes == {
            "ppo/kl": "samples_seen",
            "ppo/served": "samples_seen",
            "eval/tprl/accuracy": "keep_ratio",
            **dict.fromkeys(["samples_seen", "keep_ratio", "trainer/global_step"]),
        }
        assert [row.get("ppo/kl") for row in offline.rows] == [0.1, 0.2, None]
        assert offline.rows[1]["samples_seen"] == 16

    def test_a_stage_does_not_overwrite_the_arguments_of_another(self, tmp_path: Path) -> None:
        tracker = Tracker(tmp_path)
        tracker.describe({"stage": {"name": "all"}}, name="demo", group=None, job_type="all")
        tracker.log_row({"a": 1.0})
        tracker.log_hyperparams({"lr": 1.0})
        tracker.describe({"arguments/lfd": {"lr": 2.0}})
        offline = the_run(tmp_path)
        assert {key: offline.config[key] for key in ("stage", "arguments/lfd")} == {
            "stage": {"name": "all"},
            "arguments/lfd": {"lr": 2},
        }
        assert "lr" not in offline.config
        assert (offline.about["display_name"], offline.about["job_type"]) == ("demo", "all")

    def test_names_from_outside_win(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("WANDB_NAME", "mine")
        tracker = Tracker(tmp_path, group="ours")
        tracker.describe({}, name="demo", group="sweep")
        tracker.log_row({"a": 1.0})
        about = the_run(tmp_path).about
        assert (about["display_name"], about["run_group"]) == ("mine", "ours")


def row(
    pruner: str, ratio: float | None, kept: float, metric: str, value: float, seed: int = 0
) -> Row:
    return Row("toy", "toy", pruner, seed, ratio, kept, metric, value, 0.0, 1.0, 1e6, kept / 20)


class TestEvaluations:
    def test_are_curves_over_the_keep_ratio_and_a_table(self, tmp_path: Path) -> None:
        rows = [
            row("keep_all", 1.0, 16.0, "accuracy", 0.9),
            row("random", 0.25, 4.0, "accuracy", 0.25, seed=1),
        ]
        rows += [row("tprl", 0.5, 8.0, "accuracy", 0.75), row("tprl", 0.5, 8.0, "mean_iou", 0.5)]
        rows += [
            row("tprl", 0.25, 4.0, "accuracy", 0.5),
            row("tprl_threshold", None, 6.0, "accuracy", 0.6),
        ]
        log_results(Tracker(tmp_path), rows)
        offline = the_run(tmp_path)
        curve = {item["keep_ratio"]: item for item in offline.rows if "eval/tprl/accuracy" in item}
        assert list(curve) == [0.25, 0.5]
        assert curve[0.5]["eval/tprl/mean_iou"] == 0.5
        assert (curve[0.25]["eval/tprl/flops_ratio"], curve[0.25]["eval/tprl/kept_tokens"]) == (
            0.2,
            4,
        )
        alone = next(item for item in offline.rows if "eval/tprl_threshold/accuracy" in item)
        assert alone["keep_ratio"] == 6 / 16
        assert {axis for name, axis in offline.axes.items() if name.startswith("eval/")} == {
            "keep_ratio"
        }
        assert "eval/random/seed1/accuracy" in offline.axes
        assert offline.rows[-1]["eval/results"]["nrows"] == len(rows)

    def test_other_loggers_get_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[Any] = []
        monkeypatch.setattr(wandb, "init", lambda **options: started.append(options))
        log_results(False, [row("tprl", 0.5, 8.0, "accuracy", 0.75)])
        assert not started


class TestFailures:
    """W&B fails: the run goes on, and one line says how to upload what it logged."""

    def test_no_connection_at_the_start(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        real = wandb.init

        def unreachable(**options: Any) -> Any:
            if options["mode"] == "online":
                raise CommError("no route to host\nsecond line")
            return real(**options)

        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr(wandb, "init", unreachable)
        tracker = Tracker(tmp_path)
        tracker.describe({"seed": 3})
        for value in (1.0, 2.0):
            tracker.log_row({"a": value})
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        assert self.output(caplog) == [
            (
                "W&B failed (CommError: no route to host): offline "
                f"from here; upload with: wandb sync {folder}"
            )
        ]
        offline = the_run(tmp_path)
        assert [item["a"] for item in offline.rows] == [1, 2]
        assert (offline.config["seed"], offline.axes["a"]) == (3, "samples_seen")

    def test_logging_fails_in_the_middle(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        tracker = Tracker(tmp_path)
        tracker.describe({"seed": 3})
        tracker.log_row({"a": 1.0})

        def broken(row: Any) -> None:
            raise ConnectionResetError("peer")

        monkeypatch.setattr(tracker.experiment, "log", broken)
        for value in (2.0, 3.0):
            tracker.log_row({"a": value})
        runs = offline_runs(tmp_path)
        # the row that failed is there
        assert [[item["a"] for item in offline.rows] for offline in runs] == [[1], [2, 3]]
        assert [offline.config["seed"] for offline in runs] == [3, 3]
        (line,) = self.output(caplog)
        assert all(str(path) in line for path in (tmp_path / "wandb").glob("offline-run-*"))

    def test_the_process_behind_it_is_killed(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        tracker = Tracker(tmp_path)
        tracker.log_row({"a": 1.0})
        children = subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True
        )
        for child in children.stdout.split():
            os.kill(int(child), signal.SIGKILL)
        # Rows that are sent before the death is noticed are lost with the process, however many
        # they are.
        for value in range(2, 1002):
            tracker.log_row({"a": float(value)})
            if self.output(caplog):
                break
            time.sleep(0.01)
        tracker.log_row({"a": 2000.0})
        assert children.stdout
        assert len(self.output(caplog)) == 1
        assert [item["a"] for item in offline_runs(tmp_path)[-1].rows][-1] == 2000

    def test_nothing_works(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        def broken(**options: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(wandb, "init", broken)
        tracker = Tracker(tmp_path, artifacts=True)
        tracker.log_metrics({"a": 1.0}, step=1)
        tracker.describe({"b": 1})
        log_weights(tracker, tmp_path)
        assert tracker.name == "tprl"
        (line,) = self.output(caplog)
        assert "no space left" in line
        assert "nothing more is logged" in line

    @staticmethod
    def output(caplog: pytest.LogCaptureFixture) -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "tprl.runtime.tracking"
        ]


def test_disabled_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(tmp_path)
    tracker.log_row({"a": 1.0})
    log_results(tracker, [row("tprl", 0.5, 8.0, "accuracy", 0.75)])
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    "none", [pytest.param("overlay_every", marks=pytest.mark.slow), "overlays"]
)
def test_no_pictures_where_none_are_asked_for(
    none: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = (
        "stage=ppo",
        "model=toy",
        "dataset=toy",
        "policy.code_width=0",
        "debug=fast",
        f"logger.{none}=0",
    )
    options += ("stage.served.limit=4", "stage.calibrate=null")
    monkeypatch.setattr(
        sys, "argv", ["train", *options, "policy.select=topk", f"hydra.run.dir={tmp_path}/run"]
    )
    launch("train", train)
    names = {name for item in the_run(tmp_path / "run").rows for name in item}
    assert "ppo/kl" in names
    assert "ppo/overlays" not in names


def test_the_pruner_is_an_artifact_if_asked(tmp_path: Path) -> None:
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner/config.json").write_text("{}")
    (tmp_path / "last.ckpt").write_text("weights")
    for asked in (False, True):
        log_weights(Tracker(tmp_path / str(asked), artifacts=asked), tmp_path)
    assert not (tmp_path / "False").exists()
    records = the_run(tmp_path / "True").records
    (artifact,) = (record["artifact"] for record in records if record["type"] == "artifact")
    assert artifact["type"] == "model"
    assert {item["path"] for item in artifact["manifest"]["contents"]} == {
        "pruner/config.json",
        "last.ckpt",
    }


def test_the_jobs_of_a_sweep_are_runs_of_one_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(config: DictConfig, directory: Path) -> None:
        make_logger(config, directory).log_row(
            {f"only/{config.seed}": 1.0, "samples_seen": config.seed}
        )

    monkeypatch.setattr(
        sys, "argv", ["train", "-m", "stage=ppo", "seed=1,2", f"hydra.sweep.dir={tmp_path}/night"]
    )
    launch("train", work)
    runs = [the_run(tmp_path / "night" / str(job)) for job in (0, 1)]
    assert [[*item.rows[0]] for item in runs] == [
        ["only/1", "samples_seen"],
        ["only/2", "samples_seen"],
    ]
    assert [item.about["run_group"] for item in runs] == ["night", "night"]
    assert [item.about["display_name"] for item in runs] == ["seed=1", "seed=2"]
    assert {item.about["job_type"] for item in runs} == {"ppo"}
    assert runs[0].about["run_id"] != runs[1].about["run_id"]
    assert [item.config["seed"] for item in runs] == [1, 2]
    assert runs[0].config["stage"]["module"]["group"] == 16
    assert runs[0].config["directory"] == str(tmp_path / "night/0")


LONG = "seed=" + "2" * 200


@pytest.mark.parametrize(
    ("swept", "job", "name"),
    [
        (["stage=ppo", "+seed=0,1"], ["stage=ppo", "+seed=1"], "+seed=1"),
        (["seed=1"], ["seed=1"], "3"),  # one job: its folder
        ([f"{LONG},1"], [LONG], LONG[:128]),
    ],
)
def test_a_job_of_a_sweep_is_called_by_what_tells_it_from_the_others(
    swept: list[str], job: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OmegaConf.save({"hydra": {"overrides": {"task": swept}}}, tmp_path / "multirun.yaml")
    hydra = {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(tmp_path)}, "overrides": {"task": job}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    assert run_names(tmp_path / "3") == (name, tmp_path.name)
