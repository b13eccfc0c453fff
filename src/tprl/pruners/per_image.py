"""Pruners that choose the tokens of every image for themselves: budgets, rows and padding in one
place."""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Int
from torch import Tensor

from tprl.budget import Rows, need_ratio, rows_of
from tprl.pruners.base import BasePruner
from tprl.types import Encoded, TokenSelection


class PerImage(BasePruner, ABC):
    """A rule is one function of the tokens of each image; the number to keep is exact."""

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        # One row per image, whatever sample it belongs to: batch size and padding change nothing.
        images = rows_of(encoded)
        keep = self.choose(images, encoded, images.budgets(ratio))
        return TokenSelection(keep=images.join(keep, encoded.visual_mask))

    @abstractmethod
    def choose(self, images: Rows, encoded: Encoded, k: Int[Tensor, " I"]) -> Bool[Tensor, "I W"]:
        """k[i] valid tokens of each of the I images, at most W tokens wide."""
