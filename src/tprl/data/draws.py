"""Random draws that are the same on every machine and with every version of NumPy."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Stream:
    """Random draws from the raw 64-bit outputs of a counter-based generator.

    NumPy promises stable raw streams across versions, but not stable `Generator` methods; hence our
    own few draws.
    """

    def __init__(self, *key: object) -> None:
        # 128 bits of key: streams of different names do not meet.
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both inclusive."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        """Array of uniform int64 in [low, high]."""
        # The remainder favors low values by less than 1 in 2^50 for ranges as small as ours.
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64)
        return (raw % np.uint64(high - low + 1)).astype(np.int64).reshape(shape) + low

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A permutation (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(0, i)
            out[i], out[j] = out[j], out[i]
        return out
