"""Samples out of a dataset, less its damaged rows, and what is said of those."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.types import Sample


class BadRow(Exception):
    """A row that makes no question.

    Args:
        reason: the same for all rows of its kind; they are counted under it.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def numbered(dataset: BaseDataset, indices: Iterable[int]) -> Iterator[tuple[int, Sample]]:
    """`taken`, each sample with its index."""
    for index in indices:
        try:
            yield index, dataset[index]
        except BadRow:  # the dataset has counted it, and raises where they are too many
            continue


def taken(dataset: BaseDataset, indices: Iterable[int]) -> Iterator[Sample]:
    """The samples at `indices` one by one, less those of damaged rows, which the dataset has
    counted."""
    return (sample for _, sample in numbered(dataset, indices))


def take(dataset: BaseDataset, indices: Iterable[int]) -> list[Sample]:
    """All of `taken`."""
    return list(taken(dataset, indices))


def numbered_batches(
    dataset: BaseDataset, indices: Iterable[int], size: int
) -> Iterator[list[tuple[int, Sample]]]:
    """`numbered`, `size` at a time."""
    stream = numbered(dataset, indices)
    while batch := list(islice(stream, size)):
        yield batch


def batches(
    dataset: BaseDataset, limit: int | None, size: int, first: int = 0
) -> Iterator[list[Sample]]:
    """The samples of rows `first` .. `limit` (None: all), `size` at a time."""
    # Rows, not samples: damaged ones count, so that a limit means the same questions everywhere.
    indices = range(first, min(limit or len(dataset), len(dataset)))
    for batch in numbered_batches(dataset, indices, size):
        yield [sample for _, sample in batch]


def passed_over(dataset: BaseDataset) -> str:
    """Damaged rows of this process so far in one sentence; empty where there are none."""
    damage = dataset.damage
    if not damage:
        return ""
    listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(damage.items()))
    name = f"{dataset.name}/{dataset.split}" if dataset.split else dataset.name
    count = sum(damage.values())
    return (
        f"{count} damaged row{'s were' if count > 1 else ' was'} passed over in {name} ({listed})"
    )


def nothing_left(
    dataset: BaseDataset, asked: int, purpose: str, counts: Mapping[str, int] | None = None
) -> UserError:
    """The error where not one of the `asked` rows makes a question.

    Args:
        purpose: what they were for, e.g. "to train on".
        counts: damaged rows by reason; None takes those that the dataset has counted.
    """
    damage = dataset.damage if counts is None else counts
    listed = (
        ", ".join(f"{reason}: {count}" for reason, count in sorted(damage.items()))
        or "no reason counted"
    )
    source = dataset.source or dataset.name
    rows = f"all {asked} rows" if asked > 1 else "the only row"
    were_read = "that were read are" if asked > 1 else "that was read is"
    return UserError(
        f"{rows} of {dataset.name} {were_read} damaged ({listed}), "
        f"so there is nothing {purpose}: mend {source}."
    )
