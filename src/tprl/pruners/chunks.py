"""Selections a few questions at a time, so that memory does not grow with the batch."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tprl.errors import UserError
from tprl.types import Encoded, Pruner, TokenSelection

# Numbers that a selector may hold at once: similarities of all pairs of tokens are 4 bytes each,
# and several of them are alive. 64 questions about 576 tokens are within it, and 2 about 3,328.
AT_ONCE = 1 << 25
log = logging.getLogger(__name__)


def select_in_chunks(
    pruner: Pruner, encoded: Encoded, keep_ratio: float | None, at_once: int = AT_ONCE
) -> TokenSelection:
    """What `pruner.select` returns for the whole batch, from as many questions at a time as
    `at_once` allows; where GPU memory ends, from half as many. Selections do not depend on the
    batch (a contract of `Pruner`).

    Args:
        pruner, encoded, keep_ratio: see `Pruner.select`.
        at_once: pairs of visual tokens.

    Raises:
        UserError: there is no memory for a single question, or the pruner's reasons.
    """
    # Similarities of all pairs are what fills the memory: V^2 numbers per question.
    width = max(1, encoded.visual_mask.shape[1])
    size = max(1, min(len(encoded), at_once // width**2))
    while True:
        try:
            if size >= len(encoded):
                return pruner.select(encoded, keep_ratio)
            parts = []
            for start in range(0, len(encoded), size):
                chunk = range(start, min(start + size, len(encoded)))
                parts.append(pruner.select(encoded.rows(chunk), keep_ratio))
            return _joined(parts)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise UserError(
                    f"{pruner.name} has no memory to select among {width} visual "
                    "tokens of a single question: bound them with model.max_pixels "
                    "or model.max_tiles, or use a pruner that compares no pairs."
                ) from error
        # Here and not above: while an error is handled, its frames hold on to what filled the
        # memory.
        size = (size + 1) // 2
        torch.cuda.empty_cache()
        log.warning("out of memory: %s selects for %d questions at a time", pruner.name, size)


def _joined(parts: Sequence[TokenSelection]) -> TokenSelection:
    """Selections of consecutive questions as one."""

    def together(name: str) -> Tensor | None:
        # Chunks are of one kind: a field is None in all of them or in none.
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if name in ("keep", "merged"):
            return torch.cat(values)
        # Extra tokens: as many as the question with most has. Positions have an axis before that of
        # questions.
        axis = 2 if name == "positions" else 1
        behind = [0, 0] if name in ("extra", "extra_deep") else []
        width = max(value.shape[axis] for value in values)
        padded = [pad(value, [*behind, 0, width - value.shape[axis]]) for value in values]
        return torch.cat(padded, axis - 1)

    keep = together("keep")
    assert keep is not None
    names = ("merged", "extra", "extra_at", "extra_mask", "extra_deep", "positions")
    return TokenSelection(keep, *(together(name) for name in names))
