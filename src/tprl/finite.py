"""What is not finite stops a run before an optimiser steps on it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tprl.errors import UserError

SHOWN = 5


def check_finite(values: Mapping[str, Tensor], uids: Sequence[str], when: str, axis: int = 0) -> None:
    """Look once at the device, whatever the number of values.

    Args:
        values: tensors by the names they are logged under, the samples along `axis`; a scalar belongs to all of them.
        uids: the samples; several rows of one sample repeat it.
        when: which step this is, e.g. "iteration 12".

    Raises:
        UserError: nan or inf; names the value and the samples.
    """
    if bool(torch.stack([value.detach().isfinite().all() for value in values.values()]).all()):
        return
    for name, value in values.items():
        bad = ~value.detach().isfinite()
        if bool(bad.any()):
            rows = bad.movedim(axis, 0).flatten(1).any(1).tolist() if bad.ndim else [True] * len(uids)
            found = sorted({uid for uid, wrong in zip(uids, rows, strict=True) if wrong})
            raise UserError(
                f"{when}: {name} is {_kind(value)} for {_names(found)}; stopped before the optimiser used it, and the "
                "last checkpoint stays as it was. Look at these samples, lower the learning rate, or use "
                "model.dtype=float32."
            )


def _kind(value: Tensor) -> str:
    return "not a number" if bool(value.isnan().any()) else "infinite"


def _names(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - SHOWN} more" if len(uids) > SHOWN else ""
    return f"{'sample' if len(uids) == 1 else 'samples'} {', '.join(uids[:SHOWN])}{more}"
