"""Random tokens: the baseline that a pruner must beat to have learned anything."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.budget import keep_top_per_image, need_ratio
from tprl.cost import LVLMShape
from tprl.pruners.base import BasePruner
from tprl.seeding import stable_seed
from tprl.types import Encoded, TokenSelection


class RandomPruner(BasePruner):
    """A uniformly random subset of each image's tokens, in raster order.

    Source: folklore; the rule of docs/baselines.md#random, k of a seeded permutation. Complexity
    O(V log V), nothing of the model is read. Ours differs in where chance comes from: token v of a
    sample has the score hash(seed, uid, v), so batch size, order and device change nothing, and at
    the same seed a smaller budget keeps a subset of a larger one.
    """

    name = "random"
    extras: frozenset[str] = frozenset()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` random tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        # Counting valid tokens instead of columns keeps padding out of the score.
        token = (encoded.visual_mask.long().cumsum(1) - 1).clamp(min=0)
        # One score per (seed, uid, token): neither batch nor device plays a part.
        seeds = torch.tensor([stable_seed(uid, self.seed) for uid in encoded.uids]).to(token)
        return TokenSelection(keep=keep_top_per_image(_uniform(seeds, token), encoded, ratio))

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing: scores are drawn."""
        return 0


def _uniform(seed: Int[Tensor, " B"], token: Int[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Uniforms in [0, 1) with 24 bits, one per (seed, token): the SplitMix64 generator (Steele et
    al. 2014, fig. 18).

    Written in wrapping int64 arithmetic, so that every sample of the batch is drawn at once.
    """
    # The counter of SplitMix64, then its two rounds of shift and multiply.
    z = seed.unsqueeze(1) + (token + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    # The upper 24 bits, which float32 holds exactly.
    return (_shift(z ^ _shift(z, 31), 40)).float() / 2**24


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)
