"""How much one activity may hold on the device beside the weights: one budget in bytes, from which
encoding, observing, selecting and splicing take the sizes of their batches. Results do not depend
on it but for rounding."""

import logging
from typing import Any

import torch

GIB = 1 << 30
WORKING = 2.0  # GiB, where a model's settings say nothing
# Bytes of hidden states and of one layer's work per pixel value that the vision side gets at once,
# of a tower whose sizes are not known; 135 of LLaVA-1.5 in bfloat16.
PER_PIXEL_VALUE = 128
PER_PAIR = 64  # of visual tokens that a selector compares: 4 bytes each, and several such arrays
log = logging.getLogger(__name__)


def working_bytes(lvlm: Any) -> int:
    """The budget of a model."""
    return int(lvlm.working_gib * GIB)


def how_many(budget: int | float, each: int | float, most: int) -> int:
    """Things of `each` bytes that the budget holds; one at least, `most` at most."""
    return max(1, min(most, int(budget // max(each, 1))))


def half(size: int, what: str) -> int:
    """Half of what did not fit, once it is let go. Call it after the `except`: while an error is
    handled, its frames hold on to what filled the memory."""
    torch.cuda.empty_cache()
    smaller = (size + 1) // 2
    log.warning("out of memory with %d %s: from here on %d at a time", size, what, smaller)
    return smaller
