"""Kill runs at random moments, go on with them, and compare what comes out with a run that nobody
touched: `python kill.py [--quick] [--jobs N]` writes results.csv. Exit status 1 if anything
differs, or if a stage of the untouched run left the weights that it began with: then equal weights
would show nothing."""

import argparse
import csv
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SMALL = shlex.split("""stage=all trainer=cpu logger=csv
stage.autoencoder.images=60 stage.autoencoder.epochs=1
stage.lfd.demonstrations=320 stage.lfd.batch_size=16 stage.lfd.epochs=3 stage.lfd.save_every=4
stage.lfd.served.limit=24 stage.lfd.calibrate=null
stage.ppo.iterations=30 stage.ppo.prompts=6 stage.ppo.group=4 stage.ppo.minibatch=24
stage.ppo.save_every=3
stage.ppo.validate_every=10 stage.ppo.served.limit=24 stage.ppo.calibrate=null
stage.adapt.questions=100 +stage.adapt.epochs=2 stage.adapt.served.limit=24
stage.evaluation.limit=30 stage.evaluation.pruners=[random,divprune]
stage.evaluation.keep_ratios=[0.1111]""")
LOGGED = {
    "autoencoder": "autoencoder/",
    "mlp": "lfd/mlp/",
    "lfd": "lfd/",
    "ppo": "ppo/",
    "adapt": "adapt/",
}
WEIGHTS = ("autoencoder", "lfd", "mlp", "pruner")
# Stages by the folders before and after them. Adapt, which follows PPO, trains the budget head
# alone.
MOVES = {"lfd": ("autoencoder", "lfd"), "ppo": ("lfd", "pruner")}
FILES = (
    "results.csv",
    "samples.jsonl",
    "evaluation.json",
    "paired.json",
    "spreads.json",
    "pruner/config.json",
)
PATIENCE = 900  # seconds that a process may take


@dataclass
class Kill:
    """One row of the table. `row` is where in metrics.csv it is to come; `wanted` how the moment is
    chosen after that: "row" within half a second, "write" when a file is seen half-written, "start"
    in the seconds of a start."""

    run: int
    signal: str
    wanted: str
    row: int
    delay: float
    seconds: float = 0.0  # since the process began
    died_in: str = ""  # stage and iteration
    half_written: str = ""  # what it was about to write
    went_on_from: str = ""
    exit_code: int = 0
    message: str = ""
    same: str = ""  # whether everything that this run left is what the untouched one did


class Reference:
    """What the untouched run logged and left."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.rows = directory, metrics(directory)
        self.stages = [stage_of(row) for row in self.rows]
        self.startup = 8.0
        self.check_moved()

    def check_moved(self) -> None:
        """Every stage must have changed the policy, and logged something."""
        for stage, (before, after) in MOVES.items():
            start, end = (policy(self.directory / name) for name in (before, after))
            if start.keys() != end.keys() or not start:
                raise RuntimeError(f"{before} and {after} hold different policies, or none")
            if all(start[key].equal(end[key]) for key in start):
                raise RuntimeError(
                    f"{stage} kept the weights that it began with: the comparison would be empty"
                )
        silent = LOGGED.keys() - set(self.stages)
        if silent:
            raise RuntimeError(f"metrics.csv has no rows of {', '.join(sorted(silent))}")

    def place(self, rows: int) -> str:
        """The iteration that follows so many rows."""
        if rows >= len(self.rows):
            return "evaluation"
        stage = self.stages[rows]
        number = sum(
            other == stage and trains(row)
            for other, row in zip(self.stages[:rows], self.rows, strict=False)
        )
        return f"{stage} {number + 1}"

    def differs(self, directory: Path) -> list[str]:
        """Names of what is not the same to the last bit."""
        different = [
            name
            for name in FILES
            if (directory / name).read_bytes() != (self.directory / name).read_bytes()
        ]
        for name in WEIGHTS:
            first, other = (
                load_file(place / name / "model.safetensors")
                for place in (directory, self.directory)
            )
            if (
                not first
                or first.keys() != other.keys()
                or not all(first[key].equal(other[key]) for key in first)
            ):
                different.append(name)
        different += ["metrics.csv"] * (metrics(directory) != self.rows)
        return different + [str(path) for path in directory.rglob("*.part")]


def policy(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that LfD and PPO train."""
    weights = load_file(folder / "model.safetensors")
    heads = ("net.value_head", "net.budget_head")
    return {
        key: value
        for key, value in weights.items()
        if key.startswith("net.") and not key.startswith(heads)
    }


def metrics(directory: Path) -> list[dict[str, str]]:
    """The whole rows of metrics.csv, without columns that are empty or measure time."""
    path = directory / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    timed = ("time/", "ppo/evaluations_per_second")
    return [
        {name: value for name, value in row.items() if value and not name.startswith(timed)}
        for row in rows
    ]


def stage_of(row: dict[str, str]) -> str:
    return next(
        stage for stage, prefix in LOGGED.items() if any(name.startswith(prefix) for name in row)
    )


def trains(row: dict[str, str]) -> bool:
    """Whether a row is of a training step (others are of a validation)."""
    return any(name.endswith(("/loss", "/mse")) or name == "reward/return" for name in row)


def start(directory: Path, cache: Path) -> subprocess.Popen:
    """The command as it is typed first, or `resume=` once there is a run."""
    begun = (directory / "started.json").is_file()
    words = (
        [f"resume={directory}"]
        if begun
        else [*SMALL, f"hydra.run.dir={directory}", f"cache={cache}"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        (directory.parent / "err.log").open("w") as err,
        (directory.parent / "out.log").open("a") as out,
    ):
        command = [sys.executable, "-m", "src.train", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )


class Watch:
    """How far a process has got: rows of its metrics.csv, counted when the file changes."""

    def __init__(self, directory: Path) -> None:
        self.path, self.seen = directory / "metrics.csv", (0, 0)
        self.rows = self.first = self.look()
        self.grew = False

    def look(self) -> int:
        try:
            self.seen = (self.path.stat().st_mtime_ns, self.path.stat().st_size)
            return max(0, self.path.read_bytes().count(b"\n") - 1)
        except FileNotFoundError:
            return 0

    def changed(self) -> None:
        try:
            now = (self.path.stat().st_mtime_ns, self.path.stat().st_size)
        except FileNotFoundError:
            now = (0, 0)
        if now != self.seen:
            rows = self.look() if now != (0, 0) else 0
            self.seen = now
            self.grew |= rows > self.rows
            # a resumed run cuts the table first
            self.first = self.first if self.grew else min(self.first, rows)
            self.rows = rows


def until(process: subprocess.Popen, watch: Watch, kill: Kill, began: float) -> None:
    """Wait for the moment of a kill."""
    while process.poll() is None and time.monotonic() - began < PATIENCE:
        watch.changed()
        if kill.wanted == "start":
            if time.monotonic() - began >= kill.delay:
                return
        elif watch.grew and watch.rows >= kill.row:
            if kill.wanted == "row":
                time.sleep(kill.delay)
                return
            if halves := sorted(str(path.name) for path in watch.path.parent.rglob("*.part")):
                kill.half_written = re.sub(r"\.\d+\.part", "", halves[0])
                return
        time.sleep(0.0005)


def attempt(
    directory: Path,
    cache: Path,
    kill: Kill | None,
    reference: Reference | None,
    before: Kill | None,
) -> None:
    """Start or go on; up to the moment of `kill`, or to the end."""
    process, began = start(directory, cache), time.monotonic()
    watch = Watch(directory)
    try:
        if kill is not None:
            until(process, watch, kill, began)
            kill.seconds = round(time.monotonic() - began, 2)
            os.killpg(process.pid, signal.Signals[kill.signal])
        while process.poll() is None and time.monotonic() - began < PATIENCE:
            watch.changed()
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    watch.changed()
    lines = [
        line.strip()
        for line in (directory.parent / "err.log").read_text().splitlines()
        if line.strip()
    ]
    if kill is not None and reference is not None:
        kill.exit_code = process.returncode
        kill.message = (
            ""
            if kill.signal == "SIGKILL" or not lines
            else lines[-1].replace(str(directory), "<run>")
        )
        kill.died_in = reference.place(watch.rows) if watch.grew else "start-up"
    elif process.returncode:
        raise RuntimeError("\n".join(lines[-30:]))
    if before is not None and reference is not None:
        before.went_on_from = (
            reference.place(watch.first) if watch.grew else "(killed again before it did)"
        )


def survive(number: int, kills: list[Kill], reference: Reference, folder: Path) -> None:
    """One run with its kills, to its end, and whether it is the untouched one."""
    place = folder / f"run{number}"
    place.mkdir()
    directory, before = place / "run", None
    for kill in kills:
        attempt(directory, place / "cache", kill, reference, before)
        before = kill
    attempt(directory, place / "cache", None, reference, before)
    wrong = reference.differs(directory)
    for kill in kills:
        kill.same = f"no: {' '.join(wrong)}" if wrong else "yes"
        print(kill, flush=True)


def plan(reference: Reference, quick: bool, seed: int) -> list[list[Kill]]:
    """Which kills every run gets, in the order of their rows."""
    draw = random.Random(seed)

    def rows(*stages: str) -> list[int]:
        return [i for i, stage in enumerate(reference.stages) if stage in stages]

    def planned(run: int, sign: str, wanted: str, *stages: str) -> Kill:
        row = draw.choice(rows(*stages)[1:-1])
        return Kill(
            run,
            sign,
            wanted,
            row,
            round(draw.uniform(0, reference.startup if wanted == "start" else 0.5), 3),
        )

    kinds = (
        [("row", "lfd")] * 3
        + [("row", "mlp")]
        + [("row", "ppo")] * 8
        + [("write", "lfd")]
        + [("write", "ppo")] * 3
    )
    kinds += [("start", "lfd"), *[("start", "ppo")] * 3]
    draw.shuffle(kinds)
    if quick:
        return [
            sorted(
                (
                    planned(0, "SIGKILL", *kind)
                    for kind in (("row", "lfd"), ("write", "ppo"), ("row", "ppo"))
                ),
                key=lambda kill: kill.row,
            )
        ]
    runs = [[planned(run, "SIGKILL", *kind) for kind in kinds[run::5]] for run in range(5)]
    for run, signs in enumerate((("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")), len(runs)):
        first, second = signs
        runs.append(
            [
                planned(run, first, "row", "lfd"),
                planned(run, second, "row", "ppo"),
                planned(run, first, "row", "ppo"),
                planned(run, second, "start", "ppo"),
            ]
        )
    return [sorted(kills, key=lambda kill: kill.row) for kills in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 kills of one run; writes nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs, instead of a temporary one"
    )
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="survival-"))
    (folder / "untouched").mkdir(parents=True)
    began = time.monotonic()
    attempt(folder / "untouched" / "run", folder / "untouched" / "cache", None, None, None)
    reference = Reference(folder / "untouched" / "run")
    print(
        f"untouched: {time.monotonic() - began:.0f} s, {len(reference.rows)} rows of metrics.csv",
        flush=True,
    )
    runs = plan(reference, arguments.quick, arguments.seed)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda run: survive(run[0], run[1], reference, folder), enumerate(runs)))
    kills = [kill for run in runs for kill in run]
    if not arguments.quick:
        with (HERE / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, asdict(kills[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, kills))
    for sign in dict.fromkeys(kill.signal for kill in kills):
        some = [kill for kill in kills if kill.signal == sign]
        good = len({kill.run for kill in some if kill.same == "yes"})
        print(
            f"{sign}: {len(some)} in {len({kill.run for kill in some})} runs; {good} of these "
            "runs ended with the weights, metrics and results of the untouched one, bit for bit"
        )
    if arguments.keep is None:
        shutil.rmtree(folder)
    sys.exit(any(kill.same != "yes" for kill in kills))


if __name__ == "__main__":
    main()
