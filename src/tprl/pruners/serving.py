"""How the logits of a learned pruner become a kept set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.errors import UserError
from tprl.policy.action import Select
from tprl.seeding import stable_seed


@dataclass(frozen=True)
class Serving:
    """How logits become a kept set.

    Args:
        select: "topk", "gumbel", "dpp" or "threshold" (see `policy.action.serve`).
        tau: probability threshold of select=threshold; calibrated on validation data.
        quality: weight of relevance against diversity, select=dpp only.
        trained_to: largest keep ratio of the training.
        fade: above it the quality served is quality * (trained_to / keep_ratio)^fade; calibrated on
            validation data.
        prices: (mean keep ratio, price of the whole image in answer probability) pairs of the
            adaptive mode (see `pruners.adaptive`), calibrated too.
        kernel: what two tokens are alike in, select=dpp only: "codes" (the network's own input) or
            "tokens" (the projected tokens, as pruners of 0.1 had it). Codes are narrower, so that a
            step costs less.

    Raises:
        UserError: an unknown way to select, or an unknown kernel.
    """

    select: str = "dpp"
    tau: float | None = None
    quality: float = 2.0
    trained_to: float = 1.0
    fade: float = 0.0
    prices: Sequence[Sequence[float]] = ()
    kernel: str = "codes"

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise UserError(
                f"policy.select must be one of {', '.join(get_args(Select))}, got {self.select}."
            )
        if self.kernel not in ("codes", "tokens"):
            raise UserError(f"policy.kernel must be codes or tokens, got {self.kernel}.")
        # Lists, where they come from yaml or json.
        pairs = tuple(sorted((float(ratio), float(price)) for ratio, price in self.prices))
        object.__setattr__(self, "prices", pairs)

    def quality_at(self, keep_ratio: float) -> float:
        """Weight of relevance against diversity when that fraction is kept."""
        return self.quality * min(1.0, self.trained_to / keep_ratio) ** self.fade


def uniforms(uids: Sequence[str], seed: int, width: int) -> Float[Tensor, "B N"]:
    """Uniforms in [0, 1), a row per sample that depends on (uid, seed) alone."""
    rows = []
    for uid in uids:
        generator = torch.Generator().manual_seed(stable_seed(uid, seed))
        rows.append(torch.rand(width, generator=generator))
    return torch.stack(rows) if rows else torch.zeros(0, width)
