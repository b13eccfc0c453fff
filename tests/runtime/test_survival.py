"""The real command, killed and asked to stop: what it says, what it leaves, and that it goes on as
if nothing was."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tests.stages import toy_runs
from tests.stages.toy_runs import same

from tprl.commands.evaluate import Evaluation, _record
from tprl.data.toy import ToyDataset
from tprl.evaluation.evaluator import Entry
from tprl.runtime.run_directory import LAST

ROOT = Path(__file__).parents[2]
PPO = (
    "stage=ppo",
    "stage.prompts=4",
    "stage.group=2",
    "stage.served.limit=10",
    "stage.calibrate=null",
)
TOY = (
    "model=toy",
    "dataset=toy",
    "policy.code_width=0",
    "policy.select=topk",
    "logger=csv",
    "cache=null",
)
OFTEN = ("stage.iterations=80", "stage.validate_every=20", "stage.save_every=4")
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


class Command:
    """`python -m src.train` (or eval) with its ranks, a process group of its own."""

    def __init__(self, folder: Path, *words: str, name: str = "train") -> None:
        self.told, self.run = folder / "err.txt", folder / "run"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.told.open("w") as err:
            command = [sys.executable, "-m", f"src.{name}", *words]
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )

    def iteration(self) -> int:
        """Of the newest checkpoint."""
        path = self.run / LAST
        return torch.load(path, weights_only=True)["ppo"]["iteration"] if path.is_file() else 0

    def until(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.told.read_text()[-2000:]
            assert time.monotonic() < ends
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ranks(self) -> list[int]:
        """Process ids, rank by rank."""
        result = subprocess.run(
            ["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return sorted(map(int, result.stdout.split()))

    def end(self) -> tuple[int, str]:
        """Exit status and what was said; no process is left."""
        code = self.process.wait(timeout=300)
        for _ in range(100):
            if not subprocess.run(
                ["pgrep", "-g", str(self.process.pid)], capture_output=True
            ).stdout:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"ranks are left: {self.told.read_text()[-2000:]}")
        return code, self.told.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def begin(*words: str, **name: str) -> Command:
        started.append(Command(tmp_path, *words, **name))
        return started[-1]

    yield begin
    for item in started:
        if item.process.poll() is None:
            item.signal(signal.SIGKILL)
            item.process.wait()


Start = Callable[..., Command]


def left(run: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What is left of a run: weights, and what it logged."""
    weights = load_file(run / "pruner" / "model.safetensors")
    rows = (run / "metrics.csv").read_text().splitlines()
    timed = [
        i
        for i, name in enumerate(rows[0].split(","))
        if name.startswith("time/") or "per_second" in name
    ]
    kept = [[cell for i, cell in enumerate(row.split(",")) if i not in timed] for row in rows]
    return weights, "\n".join(map(",".join, kept))


@pytest.mark.slow
class TestOneRankOrTwo:
    @pytest.mark.parametrize("where", [("trainer=cpu",), DDP])
    def test_killed_it_ends_with_the_weights_and_metrics_of_a_run_that_was_not(
        self, where: tuple[str, ...], start: Start, tmp_path: Path
    ) -> None:
        words = (*PPO, *TOY, *OFTEN, *where)
        assert start(*words, f"hydra.run.dir={tmp_path / 'whole'}").end()[0] == 0
        rests = (
            "stage.iterations=1",
            "stage.lr_actor=1e-30",
            f"hydra.run.dir={tmp_path / 'still'}",
        )
        assert start(*words, *rests).end()[0] == 0
        # what PPO kept is not its start
        assert not same(left(tmp_path / "whole")[0], left(tmp_path / "still")[0])
        command = start(*words, f"hydra.run.dir={tmp_path / 'run'}")
        command.until(lambda: command.iteration() >= 20)
        command.signal(signal.SIGKILL)
        assert command.end()[0] == -signal.SIGKILL
        assert 20 <= command.iteration() < 80
        code, output = start(f"resume={tmp_path / 'run'}").end()
        assert code == 0
        assert "going on with the run in" in output
        item, other = left(tmp_path / "whole"), left(tmp_path / "run")
        assert same(item[0], other[0])
        assert item[1] == other[1]
        curves = [(tmp_path / name / "curves.json").read_text() for name in ("whole", "run")]
        assert "ppo, return" in curves[0]
        assert curves[0] == curves[1]
        assert not list((tmp_path / "run").rglob("*.part"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal(self, number: int, start: Start, tmp_path: Path) -> None:
        command = start(*PPO, *TOY, *OFTEN, "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}")
        command.until(lambda: command.iteration() > 0)
        command.signal(number)
        code, output = command.end()
        assert code == 128 + number
        name = signal.Signals(number).name
        done = command.iteration()
        assert (
            f"stopped by {name}: iteration {done} is finished and saved; "
            f"go on with `python -m src.train resume={tmp_path / 'run'}`\n"
        ) in output

    @pytest.mark.parametrize("to", ["first", "second", "all"])
    def test_a_signal_to_any_rank_stops_all(self, to: str, start: Start, tmp_path: Path) -> None:
        command = start(*PPO, *TOY, *OFTEN, *DDP, f"hydra.run.dir={tmp_path / 'run'}")
        command.until(lambda: command.iteration() > 0)
        first, second = command.ranks()
        for rank in {"first": [first], "second": [second], "all": [first, second]}[to]:
            os.kill(rank, signal.SIGTERM)
        code, output = command.end()
        assert code == 128 + signal.SIGTERM
        assert f"iteration {command.iteration()} is finished and saved" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_an_evaluation_goes_on_after_a_signal(start: Start, tmp_path: Path) -> None:
    words = ("pruners=[random]", "keep_ratios=[0.1111]", "limit=60", "batch_size=4", "logger=none")
    assert start(*words, f"hydra.run.dir={tmp_path / 'whole'}", name="eval").end()[0] == 0
    run = tmp_path / "run"
    command = start(*words, f"hydra.run.dir={run}", name="eval")
    command.until(
        lambda: (
            sum(len(path.read_bytes().splitlines()) for path in run.glob("answers-*.jsonl")) >= 3
        )
    )
    command.signal(signal.SIGTERM)
    code, output = command.end()
    assert code == 128 + signal.SIGTERM
    assert f"go on with `python -m src.eval resume={run}`" in output
    assert start(f"resume={run}", name="eval").end()[0] == 0
    for name in ("results.csv", "samples.jsonl", "evaluation.json", "paired.json", "spreads.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(run.glob("answers-*"))


def test_answers_belong_to_the_weights_that_gave_them(tmp_path: Path) -> None:
    lvlm, pruner = toy_runs.lvlm(), toy_runs.policy()

    def place(limit: int = 10) -> Path | None:
        settings, entries = {"batch_size": 4, "limit": limit}, [Entry("tprl", pruner, (0.5,))]
        return _record(
            Evaluation(lvlm, ToyDataset(), entries, settings, OmegaConf.create({}), tmp_path)
        ).path

    before = place()
    assert place() == before
    assert place(limit=11) != before
    with torch.no_grad():
        next(pruner.parameters()).add_(1)
    assert place() != before
