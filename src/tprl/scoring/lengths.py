"""Whether the reference answers of a dataset can be written within `model.max_new_tokens`."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tprl.data.base import BaseDataset
from tprl.errors import UserError

log = logging.getLogger(__name__)
# stands for one to three bytes that are no text, and so for one token or more
UNREADABLE = "\ufffd"


@runtime_checkable
class Referenced(Protocol):
    """A dataset that lists its reference answers without opening images, see
    `benchmark.Benchmark`."""

    def references(self, limit: int | None) -> Iterator[tuple[str, ...]]: ...


class Lengths(NamedTuple):
    """Of `rows` reference answers `too_long` need more new tokens than there are; the longest needs
    `needed`."""

    rows: int
    too_long: int
    needed: int


def fit_length(lvlm: Any, dataset: BaseDataset) -> None:
    """Let an LVLM whose `max_new_tokens` nobody has set write as much as answers of this dataset
    usually need."""
    usual = dataset.answer_tokens
    if not lvlm.length_is_set and usual > lvlm.max_new_tokens:
        lvlm.max_new_tokens = usual
        log.info("model.max_new_tokens=%d: what answers of %s usually need", usual, dataset.name)


def reference_lengths(
    lvlm: Any, dataset: Referenced, limit: int | None, first_only: bool
) -> Lengths:
    """Count the questions of which no reference answer can be written; `first_only` looks at the
    first answer alone, which is the one that teaches."""
    bound, rows, too_long, needed = lvlm.max_new_tokens, 0, 0, 0
    # A question can be answered where the shortest of its references fits.
    for answers in dataset.references(limit):
        rows += 1
        texts = answers[:1] if first_only else answers
        length = min(_tokens(lvlm, text, bound) for text in texts)
        needed = max(needed, length)
        too_long += length > bound
    return Lengths(rows, too_long, needed)


def _tokens(lvlm: Any, text: str, bound: int) -> int:
    """New tokens that a text takes, end token not included."""
    text = text.strip().replace(UNREADABLE, "?")
    # No tokenizer makes more tokens than bytes, but for one at the beginning: short texts need not
    # be read.
    size = len(text.encode(errors="replace"))
    return size if size < bound else lvlm.answer_length(text) - 1


def check_lengths(
    lvlm: Any, dataset: BaseDataset, limit: int | None = None, training: bool = False
) -> None:
    """Say how many reference answers cannot be written within `model.max_new_tokens`, before
    anything is computed.

    Args:
        limit: questions that will be read; None is all.
        training: the first answer of each question is meant, and not any of them.

    Raises:
        UserError: not one of them can be written.
    """
    bound = lvlm.max_new_tokens
    if not bound:  # it generates nothing
        return
    # Without a list of references only what the dataset says of its answers is known.
    if not isinstance(dataset, Referenced):
        usual = dataset.answer_tokens
        if usual > bound:
            log.warning(
                "answers of %s may need up to %d tokens, and model.max_new_tokens=%d",
                dataset.name,
                usual,
                bound,
            )
        return
    # Silent where all fit, an error where none does, a warning between.
    rows, too_long, needed = reference_lengths(lvlm, dataset, limit, training)
    if not too_long:
        return
    if too_long == rows:
        raise UserError(
            f"none of the {rows} reference answers of {dataset.name} can "
            f"be written within model.max_new_tokens={bound}, the longest "
            f"needs {needed} tokens: set model.max_new_tokens={needed}."
        )
    effect = (
        "their score stays 0, and only their likelihood teaches"
        if training
        else "they count as wrong"
    )
    log.warning(
        (
            "%d of %d reference answers of %s cannot be written within model.max_new_tokens=%d, "
            "so %s: set model.max_new_tokens=%d to let all be written."
        ),
        *(too_long, rows, dataset.name, bound, effect, needed),
    )
