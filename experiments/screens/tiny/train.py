"""python -m experiments.screens.tiny.train --pages <train folder> --out <run folder>: make
`tiny_screens`.

First the tower with dense supervision, on sheets and more and more on rendered pages, then
projector and language model on questions. The same command goes on where it was stopped. See
README.md.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tprl.errors import UserError
from tprl.pretraining import tiny_llava

from .run import Meter, Plan, Run
from .source import FEW
from .training import LIMIT, Training

__all__ = ["FEW", "LIMIT", "Training", "checkpoint", "export", "work"]
REPORT = 20  # steps between two lines of the log
VALIDATE = 200  # steps between two validations


def work(training: Training, every: float, until: int | None = None) -> None:
    """Steps up to `until` or the plan's end, a checkpoint every so many minutes of the clock, a
    last one at the end or at SIGTERM."""
    stop: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    meter, saved = Meter(), time.monotonic()
    while not stop and not training.pace.over and (until is None or training.done < until):
        meter.add(training.advance())
        if training.done % REPORT == 0:
            row = meter.take()
            training.cpu += row["cpu"]
            training.run.write({"step": training.done, "pages": training.count, **row})
            _say(training, row)
        if training.done % VALIDATE == 0:
            validated(training)
        if time.monotonic() - saved > 60 * every:
            checkpoint(training)
            saved = time.monotonic()
    checkpoint(training)


def validated(training: Training) -> None:
    row = training.validate()
    if row:
        training.run.write({"step": training.done, **row})
        _say(training, row)


def checkpoint(training: Training) -> None:
    """Look for new pages and save."""
    training.grow()
    training.save()


def _say(training: Training, row: dict[str, float]) -> None:
    metrics = {
        name: value
        for name, value in row.items()
        if "accuracy" in name or ("/" in name and "loss/" not in name)
    }
    words = " ".join(
        f"{name.replace('_accuracy', '')} {value:.3f}" for name, value in metrics.items()
    )
    print(f"{_where(training)}{_cost(training, row)}: {words}", file=sys.stderr, flush=True)


def _where(training: Training) -> str:
    """How far the run is."""
    plan, pace = training.plan, training.pace
    if not plan.minutes:
        return f"step {pace.done} of {plan.steps}"
    phase = "first" if pace.tower else "second"
    return f"step {pace.done}, {100 * pace.at / pace.steps:.0f} % of the {phase} phase's time"


def _cost(training: Training, row: dict[str, float]) -> str:
    """Loss and speed of the last steps; nothing for a validation."""
    if "loss" not in row:
        return ""
    plan, left = training.plan, ""
    if not plan.minutes:
        hours = (plan.steps - training.done) * row["cpu"] / REPORT / 3600
        left = f", {hours:.1f} CPU h left"
    speed = f"{row['cpu'] / REPORT:.2f} CPU s/step, {row['clock'] / REPORT:.2f} s/step"
    return f"{left}, loss {row['loss']:.3f}, {speed}"


def export(training: Training, folder: Path) -> None:
    """Write the stock folder that Auto classes load, in fp16; the run itself stays as it is."""
    training.parts.llava.set_attn_implementation("sdpa")
    tiny_llava.save(folder, training.parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pages",
        type=Path,
        help="folder of rendered pages, such as train-0; without it sheets only",
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that draw pages; 0: none (default on a CPU), else all cores but one",
    )
    parser.add_argument("--every", type=float, default=10, help="minutes between two checkpoints")
    parser.add_argument(
        "--until", type=int, help="stop at this step; the same command without it goes on"
    )
    parser.add_argument("--export", type=Path, help="write the model there and stop")
    for field in dataclasses.fields(Plan):
        kind = json.loads if field.name == "sizes" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    options = arguments()
    plan = Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)})
    workers = options.workers
    if workers is None:
        workers = 0 if options.device == "cpu" else max(1, len(os.sched_getaffinity(0)) - 1)
    try:
        run = Run(options.out, plan)
        if options.export is not None:
            export(Training(run, options.pages), options.export)
            return
        training = Training(run, options.pages, options.device, workers)
        work(training, options.every, options.until)
        training.feed.close()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
