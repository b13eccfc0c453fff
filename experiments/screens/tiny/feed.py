"""Batches on their way to the model: drawn in place, or by processes beside it.

What a step shows is a function of its `When`, so that any number of processes gives the same run.
Batches pass through memory that parent and child share; only their layout is sent.
"""

import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pace import Pace, When
from .pages import SHEET_STEPS
from .source import Source

PAGE_BYTES = 700_000  # room for a page: its picture takes 307,200, labels and masks the rest
MORE_BYTES = 1 << 24
SLOTS = 2 * SHEET_STEPS  # batches that a process may be ahead
LINE = 64  # bytes to which tensors are aligned; as many before them hold the generation


class Leaf(NamedTuple):
    """Where a tensor lies in shared memory."""

    start: int
    shape: tuple[int, ...]
    kind: str


class Direct:
    """Draws a batch when it is asked for, and puts it on a device."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device

    def take(self, pace: Pace, count: int) -> Any:
        batch = self.source(pace.when(0, count))
        return mapped(batch, lambda tensor: placed(tensor, self.device))

    def forget(self) -> None:
        """Nothing is drawn ahead."""

    def close(self) -> None:
        pass


class Drawers:
    """Processes that draw batches ahead.

    Args:
        source: what they draw from, each its own copy.
        device: where batches go.
        processes: how many; they must start before CUDA does.
    """

    def __init__(self, source: Source, device: torch.device, processes: int) -> None:
        plan = source.plan
        self.device = device
        self.size = PAGE_BYTES * max(plan.tower_batch, plan.reader_batch) + MORE_BYTES
        self.drawers = [Drawer(source, self.size) for _ in range(processes)]
        self.asked: deque[tuple[Drawer, int]] = deque()  # in the order of steps; and the slot

    def take(self, pace: Pace, count: int) -> Any:
        """The batch of this step."""
        while len(self.asked) < SLOTS * len(self.drawers):
            when = pace.when(len(self.asked), count)
            drawer = self.drawers[when.step // SHEET_STEPS % len(self.drawers)]
            if drawer.waiting == SLOTS:
                break
            self.asked.append((drawer, drawer.ask(when)))
        drawer, slot = self.asked.popleft()
        return mapped(drawer.answer(), lambda leaf: self._loaded(leaf, drawer, slot))

    def _loaded(self, leaf: Leaf, drawer: "Drawer", slot: int) -> Tensor:
        start = LINE + slot * self.size + leaf.start
        values = np.ndarray(leaf.shape, leaf.kind, drawer.memory, start)
        return placed(torch.from_numpy(values), self.device, shared=True)

    def forget(self) -> None:
        """Drop what was drawn ahead: the phase has changed before its time."""
        for drawer in self.drawers:
            drawer.generation[0] += 1
        while self.asked:
            self.asked.popleft()[0].answer()

    def close(self) -> None:
        for drawer in self.drawers:
            drawer.close()


class Drawer:
    """A process that draws, and memory for what it has drawn."""

    def __init__(self, source: Source, size: int) -> None:
        # Anonymous memory, which a child shares: /dev/shm may be small.
        self.memory = mmap.mmap(-1, LINE + SLOTS * size)
        # What was asked for in an earlier generation is no longer wanted.
        self.generation = np.ndarray(1, np.int64, self.memory)
        context = multiprocessing.get_context("fork")
        self.line, other = context.Pipe()
        self.process = context.Process(
            target=_draw, args=(source, other, self.memory, size), daemon=True
        )
        self.process.start()
        other.close()
        self.waiting = self.turn = 0

    def ask(self, when: When) -> int:
        """Have a batch drawn; the slot it will lie in."""
        slot = self.turn % SLOTS
        self.line.send((slot, int(self.generation[0]), when))
        self.waiting, self.turn = self.waiting + 1, self.turn + 1
        return slot

    def answer(self) -> Any:
        """The layout of the batch asked for first."""
        try:
            layout = self.line.recv()
        except EOFError as error:
            raise RuntimeError("a process that draws pages has ended: out of memory?") from error
        self.waiting -= 1
        if isinstance(layout, Exception):
            raise layout
        return layout

    def close(self) -> None:
        self.line.close()
        self.process.terminate()
        self.process.join()


def _draw(source: Source, line: Connection, memory: mmap.mmap, size: int) -> None:
    """What a process does until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    now = np.ndarray(1, np.int64, memory)
    while True:
        try:
            slot, generation, when = line.recv()
        except (EOFError, OSError):
            return
        try:
            wanted = generation == now[0]
            batch = source(when) if wanted else None
            line.send(Writer(memory, LINE + slot * size, size).write(batch))
        except Exception as error:  # the parent raises it
            line.send(error)


class Writer:
    """Lays the tensors of a batch into shared memory, from `start` on."""

    def __init__(self, memory: mmap.mmap, start: int, size: int) -> None:
        self.memory, self.start, self.size, self.used = memory, start, size, 0

    def write(self, batch: Any) -> Any:
        return mapped(batch, self._leaf)

    def _leaf(self, tensor: Tensor) -> Leaf:
        values = np.ascontiguousarray(tensor.numpy())
        if values.dtype == np.int64:  # numbers of patches, tokens, classes
            values = values.astype(np.int32)
        place = self.used
        self.used += -(-values.nbytes // LINE) * LINE
        if self.used > self.size:
            raise RuntimeError(f"a batch takes more than {self.size:,} bytes: raise PAGE_BYTES.")
        np.ndarray(values.shape, values.dtype, self.memory, self.start + place)[...] = values
        return Leaf(place, values.shape, values.dtype.str)


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with another thing in the place of each tensor, or of each `Leaf`."""
    if isinstance(tree, Tensor | Leaf):
        return change(tree)
    if isinstance(tree, dict):
        return {name: mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, tuple):
        values = [mapped(value, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def placed(tensor: Tensor, device: torch.device, shared: bool = False) -> Tensor:
    """A tensor where the model is; on a GPU the host does not wait for its way.

    Args:
        tensor: in the CPU's memory.
        device: of the model.
        shared: its memory will soon hold another batch.
    """
    if device.type == "cpu":
        whole = tensor.long() if tensor.dtype == torch.int32 else tensor
        return whole.clone() if shared and whole is tensor else whole
    there = tensor.pin_memory().to(device, non_blocking=True)
    return there.long() if there.dtype == torch.int32 else there
