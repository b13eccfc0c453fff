"""What a rank works on, and how a command gets its ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from tprl.errors import UserError
from tprl.runtime import distributed

ROOT = Path(__file__).parents[2]
TOY = ("model=toy", "dataset=toy", "policy.code_width=0", "policy.select=topk", "logger=csv")
PPO = (
    "stage=ppo",
    "stage.iterations=2",
    "stage.prompts=4",
    "stage.group=2",
    "stage.served.limit=10",
    "stage.calibrate=null",
)
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def as_rank(rank: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tprl.runtime.distributed.rank", lambda: rank)
    monkeypatch.setattr("tprl.runtime.distributed.count", lambda: count)


class TestShares:
    @pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
    def test_the_mean_over_ranks_of_weighted_means_is_the_mean(
        self, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch, means = torch.randn(size, dtype=torch.float64), []
        for rank in range(3):
            as_rank(rank, 3, monkeypatch)
            means.append(distributed.share(batch).mean() * distributed.weight(size))
        assert float(torch.stack(means).mean()) == pytest.approx(float(batch.mean()), abs=1e-12)

    def test_every_rank_gets_something_of_every_batch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = BatchSampler(SequentialSampler(range(7)), 3, drop_last=False)
        result = []
        for rank in range(2):
            as_rank(rank, 2, monkeypatch)
            assert len(distributed.Shares(sampler)) == 3
            result.append(list(distributed.Shares(sampler)))
        assert result == [[[0, 2], [3, 5], [6]], [[1], [4], [6]]]
        assert distributed.weight(1) == 0

    def test_alone_nothing_changes(self) -> None:
        values = torch.randn(4)
        assert torch.equal(distributed.stacked(values)[0], values)
        assert torch.equal(distributed.gathered_rows(values), values)
        assert (
            distributed.rank(),
            distributed.count(),
            distributed.gathered("a"),
            distributed.weight(7),
        ) == (
            0,
            1,
            ["a"],
            1,
        )


class TestLaunch:
    def test_ranks_that_cannot_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not torch.cuda.is_available():
            with pytest.raises(
                UserError,
                match=r"ranks cannot start with trainer.accelerator=gpu, trainer.devices=-1 .*=cpu",
            ):
                distributed.launch_ranks({"strategy": "ddp", "accelerator": "gpu", "devices": -1})
        as_rank(0, 2, monkeypatch)
        with pytest.raises(
            UserError,
            match="2 processes were started, and this trainer is for one: set trainer=ddp",
        ):
            distributed.launch_ranks({"accelerator": "cpu", "devices": 1})


def environment(**more: object) -> dict[str, str]:
    result = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in more.items()
    }
    return os.environ | result


def only_run(folder: Path) -> Path:
    """The one run directory that all ranks agreed on."""
    (result,) = (folder / "runs").iterdir()
    assert json.loads((result / "done.json").read_text())
    return result


@pytest.mark.slow
class TestCommands:
    """The launchers, on two CPU processes; `runs/` is below the directory that the command is
    called in."""

    def call(self, folder: Path, *command: str) -> str:
        variables = environment(PYTHONPATH=ROOT)
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def test_torchrun_trains_in_one_directory_and_evaluates_there_as_one_process_does(
        self, tmp_path: Path
    ) -> None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
        out = self.call(tmp_path, *torchrun, "src.train", *PPO, *TOY, *DDP)
        run = only_run(tmp_path)
        assert out.count("run: ") == 1
        assert (run / "pruner" / "model.safetensors").is_file()
        options = (
            "pruners=[random,cls_attention]",
            "keep_ratios=[0.1111]",
            "limit=11",
            "batch_size=4",
            "logger=none",
        )
        for name, command in (("two", torchrun), ("one", ("-m",))):
            self.call(tmp_path, *command, "src.eval", *options, f"hydra.run.dir={tmp_path / name}")
        assert (tmp_path / "two" / "results.csv").read_bytes() == (
            tmp_path / "one" / "results.csv"
        ).read_bytes()

    def test_lightning_starts_the_other_rank(self, tmp_path: Path) -> None:
        out = self.call(tmp_path, "-m", "src.train", *PPO, *TOY, *DDP)
        assert out.count("run: ") == 1
        assert (only_run(tmp_path) / "pruner" / "model.safetensors").is_file()

    def test_srun(self, tmp_path: Path) -> None:
        """What srun tells two tasks on one node."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {
            "SLURM_JOB_ID": 4242,
            "SLURM_JOB_NAME": "tprl",
            "SLURM_NTASKS": 2,
            "SLURM_NTASKS_PER_NODE": 2,
        }
        job |= {
            "SLURM_NNODES": 1,
            "SLURM_NODEID": 0,
            "SLURM_NODELIST": "127.0.0.1",
            "MASTER_PORT": port,
        }
        tasks = [
            subprocess.Popen(
                [sys.executable, "-m", "src.train", *PPO, *TOY, *DDP],
                cwd=tmp_path,
                env=environment(**job, SLURM_PROCID=task, SLURM_LOCALID=task, PYTHONPATH=ROOT),
            )
            for task in range(2)
        ]
        assert [task.wait(timeout=300) for task in tasks] == [0, 0]
        assert (only_run(tmp_path) / "pruner" / "model.safetensors").is_file()

    def test_a_rank_too_many_is_refused_in_one_sentence(self, tmp_path: Path) -> None:
        command = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "src.train",
        )
        variables = environment(PYTHONPATH=ROOT)
        done = subprocess.run(
            [sys.executable, *command, *PPO, *TOY, "trainer=cpu"],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode != 0
        assert done.stderr.count("error: 2 processes were started") == 1
