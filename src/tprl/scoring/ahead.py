"""Questions drawn and images prepared while the model works: threads beside the training or
evaluation loop.

Nothing depends on it but time. Questions are drawn by one thread in the order of the stream, and
what the processor makes of a batch does not depend on which thread asks it. A fault is raised where
its batch is due.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from tprl.data.base import BaseDataset
from tprl.data.taking import numbered_batches, take
from tprl.errors import UserError
from tprl.runtime import memory
from tprl.scoring.joining import joined_encodings
from tprl.types import LVLM, Encoded, Sample

T = TypeVar("T")
PROBED = 4  # questions whose length tells that of the others


@runtime_checkable
class Preparing(Protocol):
    """An LVLM whose processor can run ahead of it, in `workers` threads."""

    workers: int
    width: int
    model: Any

    def twin(self) -> Any:
        """The same with a processor of its own, for another thread."""
        ...

    def processed(self, samples: Sequence[Sample]) -> Any:
        """What `encode` takes as `prepared`."""
        ...


class Ready:
    """A batch of questions, perhaps with what the processor made of them. No sequence, so that
    Lightning hands it on as it is.

    Args:
        samples: of the batch.
        numbers: their places in the dataset, for who needs them.
        known: nobody will encode it: nothing is prepared.
    """

    def __init__(
        self, samples: list[Sample], numbers: Sequence[int] = (), known: bool = False
    ) -> None:
        self.samples, self.numbers, self.known = samples, numbers, known
        self.prepared: Any = None  # see `Preparing.processed`; None: `encode` asks the processor

    def part(self, rows: slice) -> "Ready":
        """Some of the questions, not prepared."""
        return Ready(self.samples[rows], self.numbers[rows], self.known)

    def encode(self, lvlm: Any, extras: frozenset[str] = frozenset()) -> Encoded:
        """`lvlm.encode` of the batch."""
        if self.prepared is None:
            return lvlm.encode(self.samples, extras)
        return lvlm.encode(self.samples, extras, self.prepared)

    def encode_in_parts(self, lvlm: Any, extras: frozenset[str] = frozenset()) -> Encoded:
        """The same, where GPU memory ends in halves that are put together: what encoding works
        with is then of a part alone.

        Raises:
            UserError: there is no memory for a single question.
        """
        return joined_encodings(in_parts(lambda part: part.encode(lvlm, extras), self, lvlm.name))


def questions_at_once(lvlm: LVLM, dataset: BaseDataset, most: int) -> int:
    """How many questions are encoded together, from the longest of the dataset's first ones; the
    same on every rank and in a resumed run."""
    if not isinstance(lvlm, Preparing):
        return most
    # From the first questions alone, so that every rank computes the same number.
    samples = take(dataset, range(min(PROBED, len(dataset))))
    if not samples:
        return most
    inputs, _ = lvlm.processed(samples)
    # Embeddings and visual tokens out of them, and copies in float32 for codes and the kernel.
    number = lvlm.model.dtype.itemsize
    each = inputs["input_ids"].shape[1] * lvlm.width * (2 * number + 2 * 4)
    return memory.how_many(memory.working_bytes(lvlm), each, most)


def in_parts(work: Callable[[Ready], T], batch: Ready, name: str) -> list[T]:
    """`work` on a batch, or where GPU memory ends, on its halves and theirs.

    Args:
        work: encodes the batch; it leaves nothing behind that a second try would find.
        name: of the model.

    Raises:
        UserError: there is no memory for a single question.
    """
    try:
        return [work(batch)]
    except torch.OutOfMemoryError as error:
        if len(batch.samples) == 1:
            # Nothing left to halve.
            raise UserError(
                f"{name} has no memory for sample {batch.samples[0].uid} alone: use "
                "model.max_pixels or model.max_tiles, model.load_in=4bit, "
                "model.placement=shard or a GPU with more memory."
            ) from error
    # Outside the handler: its traceback would keep the tensors of the failed try alive.
    middle = memory.half(len(batch.samples), "questions that are encoded")
    halves = (batch.part(slice(0, middle)), batch.part(slice(middle, None)))
    return list(chain.from_iterable(in_parts(work, half, name) for half in halves))


def numbered_ready(
    dataset: BaseDataset,
    indices: Iterable[int],
    size: int,
    known: Callable[[Sequence[int]], bool] = lambda numbers: False,
) -> Iterator[Ready]:
    """`numbered_batches`; `known` says of their numbers which nobody will encode."""
    for batch in numbered_batches(dataset, indices, size):
        # [(number, sample)] -> two lists.
        numbers, samples = (list(part) for part in zip(*batch, strict=True))
        yield Ready(samples, numbers, known(numbers))


def ahead(lvlm: LVLM, batches: Iterable[Ready]) -> Iterator[Ready]:
    """The batches in their order, as many prepared ahead as the LVLM has `workers`, and one drawn.

    Raises:
        UserError: whatever drawing or preparing a batch raises, when it is its turn.
    """
    if not isinstance(lvlm, Preparing) or not lvlm.workers:
        yield from batches
        return
    # Fast tokenizers refuse two threads at a time: each has a copy.
    twins: SimpleQueue[Any] = SimpleQueue()
    for _ in range(lvlm.workers):
        twins.put(lvlm.twin())

    def prepared(drawn: Future[Ready | None]) -> Ready | None:
        # A fault of drawing is raised here and travels with the batch to its turn.
        batch = drawn.result()
        if batch is None or batch.known:
            return batch
        # There are as many twins as threads, so this never waits.
        twin = twins.get()
        try:
            batch.prepared = twin.processed(batch.samples)
        finally:
            twins.put(twin)
        return batch

    # One thread draws, because datasets keep the latest picture and count damaged rows.
    stream, queue = iter(batches), deque[Future[Ready | None]]()
    drawing, preparing = ThreadPoolExecutor(1), ThreadPoolExecutor(lvlm.workers)
    try:
        # Every worker has a batch at hand, and a further batch is drawn.
        for _ in range(lvlm.workers + 1):
            queue.append(preparing.submit(prepared, drawing.submit(next, stream, None)))
        while (batch := queue.popleft().result()) is not None:
            queue.append(preparing.submit(prepared, drawing.submit(next, stream, None)))
            yield batch
    finally:
        # Also where the loop ends early: what has not begun is given up.
        for pool in (drawing, preparing):
            pool.shutdown(wait=True, cancel_futures=True)
