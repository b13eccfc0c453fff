"""The state of a training: what a checkpoint holds, and the log beside it.

A step is a function of the state and of the pages there are. The number of pages is looked up when
a checkpoint is written and is part of it, so that a run that was interrupted goes on exactly.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tprl.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What a training does; a run folder keeps it, and refuses another.

    Args:
        tower_steps, reader_steps: optimizer steps of the two phases.
        tower_batch, reader_batch: pages of a step.
        sheets: share of sheets among the pages of the first phase at its start; a tenth of it at
            its end.
        aligned: share of the first phase in which lines of sheets are moved off the rows of
            patches, a little further with every step; then they are anywhere.
        letters: share of the first phase in which only the layers up to that of the first look at
            characters learn, on sheets full of words; those above begin by changing nothing.
        warm: steps in which the rates of a phase rise.
        lr, muon: learning rates of AdamW and of Muon in the first phase.
        reader_lr, reader_muon: in the second.
        questions: at most so many of a page.
        minutes: of the clock that both phases take together, whatever the number of steps: their
            schedules follow the clock. 0: as many steps as above.
        tower_share: of these minutes, for the first phase.
        seed: of weights and data.
        init: folder of a model that `--export` wrote, whose weights the run begins with; letters
            should be 0 if all of its layers have learned.
        attention: on a CPU: "light" (see attention.py) or "sdpa".
        sizes: of `blueprint.build` where they differ from its defaults.
    """

    tower_steps: int = 6000
    reader_steps: int = 6000
    tower_batch: int = 8
    reader_batch: int = 8
    sheets: float = 0.9
    aligned: float = 0.08
    letters: float = 0.3
    warm: int = 50
    lr: float = 1e-3
    muon: float = 2e-3
    reader_lr: float = 1e-3
    reader_muon: float = 2e-3
    questions: int = 8
    seed: int = 0
    sizes: Mapping[str, int] | None = None
    minutes: float = 0.0
    tower_share: float = 0.5
    init: str = ""
    attention: str = "light"

    @property
    def steps(self) -> int:
        return self.tower_steps + self.reader_steps


class Run:
    """A folder with plan.json, last.ckpt and log.jsonl.

    Args:
        folder: made if it is missing.
        plan: of this call.

    Raises:
        UserError: the folder holds a run of another plan.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "plan.json"
        text = json.dumps(asdict(plan), indent=1)
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder} holds a run of another plan (see its plan.json): give another --out."
            )
        file.write_text(text, encoding="utf-8")
        self.log = folder / "log.jsonl"
        self.checkpoint = folder / "last.ckpt"

    def save(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: list[Optimizer],
        state: Mapping[str, Any],
    ) -> None:
        """Replace the checkpoint; an interruption leaves the old one or the new one."""
        part = self.checkpoint.with_suffix(".part")
        content = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "state": dict(state),
        }
        with part.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self.checkpoint)

    def load(self) -> dict[str, Any] | None:
        """What the last `save` wrote; None at the start."""
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{self.checkpoint} is damaged ({error}): remove it to start again."
            ) from error

    def write(self, row: Mapping[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Forget what was logged behind a checkpoint."""
        if not self.log.exists():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


class Meter:
    """Means of what steps report, and the seconds they took."""

    def __init__(self) -> None:
        self.terms: dict[str, list[Tensor | float]] = {}
        self.cpu, self.clock = time.process_time(), time.monotonic()

    def add(self, terms: Mapping[str, Tensor | float]) -> None:
        """Values stay where they are: reading one from a GPU makes the host wait."""
        for name, value in terms.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self.terms.setdefault(name, []).append(kept)

    def take(self) -> dict[str, float]:
        """Means since the last call; `cpu` is seconds of this process, `clock` of everybody."""
        row = {}
        for name, values in self.terms.items():
            numbers = [number for number in _numbers(values) if number == number]
            if numbers:  # else nothing of that kind was in the batches
                row[name] = round(sum(numbers) / len(numbers), 4)
        cpu, clock = time.process_time(), time.monotonic()
        row |= {"cpu": round(cpu - self.cpu, 1), "clock": round(clock - self.clock, 1)}
        self.terms, self.cpu, self.clock = {}, cpu, clock
        return row


def _numbers(values: list[Tensor | float]) -> list[float]:
    """Fetched from a GPU all at once."""
    tensors = [value.float() for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(fetched) if isinstance(value, Tensor) else float(value) for value in values]
