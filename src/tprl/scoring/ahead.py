"""Questions drawn and images prepared while the model works: threads beside the training or
evaluation loop.

Nothing depends on it but time. Questions are drawn by one thread in the order of the stream, and
what the processor makes of a batch does not depend on which thread asks it. A fault is raised where
its batch is due.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

from tprl.data.taking import numbered_batches
from tprl.types import LVLM, Dataset, Encoded, Sample


@runtime_checkable
class Preparing(Protocol):
    """An LVLM whose processor can run ahead of it, in `workers` threads."""

    workers: int

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

    def encode(self, lvlm: Any, extras: frozenset[str] = frozenset()) -> Encoded:
        """`lvlm.encode` of the batch."""
        if self.prepared is None:
            return lvlm.encode(self.samples, extras)
        return lvlm.encode(self.samples, extras, self.prepared)


def numbered_ready(
    dataset: Dataset,
    indices: Iterable[int],
    size: int,
    known: Callable[[Sequence[int]], bool] = lambda numbers: False,
) -> Iterator[Ready]:
    """`numbered_batches`; `known` says of their numbers which nobody will encode."""
    for batch in numbered_batches(dataset, indices, size):
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
        batch = drawn.result()
        if batch is None or batch.known:
            return batch
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
        for _ in range(lvlm.workers + 1):
            queue.append(preparing.submit(prepared, drawing.submit(next, stream, None)))
        while (batch := queue.popleft().result()) is not None:
            queue.append(preparing.submit(prepared, drawing.submit(next, stream, None)))
            yield batch
    finally:
        # Also where the loop ends early: what has not begun is given up.
        for pool in (drawing, preparing):
            pool.shutdown(wait=True, cancel_futures=True)
