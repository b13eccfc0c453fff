"""Nothing is pruned: the reference row of every table."""

from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.splice import keep_all
from tprl.types import Encoded, TokenSelection


class KeepAll(BasePruner):
    """Keeps every visual token at any `keep_ratio`, which it ignores: a table's reference row, not
    a method."""

    name = "keep_all"
    extras: frozenset[str] = frozenset()

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep all tokens."""
        del keep_ratio
        return keep_all(encoded)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: nothing is chosen."""
        return 0
