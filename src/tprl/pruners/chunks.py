"""Selections a few questions at a time, so that memory does not grow with the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tprl.errors import UserError
from tprl.runtime import memory
from tprl.types import Encoded, Pruner, TokenSelection

# 100 questions about 576 tokens are within the usual budget, and 3 about 3,328.
BUDGET = int(memory.WORKING * memory.GIB)


def select_in_chunks(
    pruner: Pruner, encoded: Encoded, keep_ratio: float | None, budget: int = BUDGET
) -> TokenSelection:
    """What `pruner.select` returns for the whole batch, from as many questions at a time as the
    budget holds; where GPU memory ends, from half as many. Selections do not depend on the batch (a
    contract of `Pruner`).

    Args:
        pruner, encoded, keep_ratio: see `Pruner.select`.
        budget: bytes, see `runtime.memory`.

    Raises:
        UserError: there is no memory for a single question, or the pruner's reasons.
    """
    # Similarities of all pairs are what fills the memory, V^2 numbers per question, and copies of
    # the tokens in float32.
    width = max(1, encoded.visual_mask.shape[1])
    each = memory.PER_PAIR * width**2 + 8 * width * encoded.embeds.shape[2]
    size = memory.how_many(budget, each, len(encoded))
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
        size = memory.half(size, f"questions that {pruner.name} selects for")


def _joined(parts: Sequence[TokenSelection]) -> TokenSelection:
    """Selections of consecutive questions as one."""

    def together(name: str) -> Tensor | None:
        # Chunks are of one kind: a field is None in all of them or in none.
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if name in ("keep", "merged", "core"):
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
    names = ("merged", "extra", "extra_at", "extra_mask", "extra_deep", "positions", "core")
    return TokenSelection(keep, *(together(name) for name in names))
