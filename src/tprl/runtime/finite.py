"""What is not finite stops a run before an optimizer steps on it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from tprl.errors import UserError
from tprl.runtime import distributed

SHOWN = 5
REMEDY = "Look at these samples, lower the learning rate, or use model.dtype=float32."


def check_finite(
    values: Mapping[str, Tensor],
    uids: Sequence[str],
    when: str,
    axis: int = 0,
    alone: bool = False,
    remedy: str = REMEDY,
) -> None:
    """Look once at the device, whatever the number of values. All ranks stop with the same
    sentence.

    Args:
        values: tensors by the names they are logged under, the samples along `axis`; a scalar
            belongs to all of them.
        uids: the samples of this rank; several rows of one sample repeat it.
        when: which step this is, e.g. "iteration 12".
        alone: not all ranks look, or not equally often.
        remedy: what the user can do.

    Raises:
        UserError: nan or inf; names the value and the samples.
    """
    if bool(all_finite(values, alone)):
        return
    # Only now, when the run ends anyway: which values and which samples, of all ranks.
    local = _not_finite(values, uids, axis)
    reports = [local] if alone else distributed.gathered(local)
    broken = set().union(*reports)
    name = next(name for name in values if name in broken)
    kinds, bad = zip(*(report[name] for report in reports if name in report), strict=True)
    raise UserError(
        f"{when}: {name} is {kinds[0]} for {_names(sorted(set().union(*bad)))}; stopped "
        f"before the optimizer used it, and the last checkpoint stays as it was. {remedy}"
    )


def all_finite(values: Mapping[str, Tensor], alone: bool = False) -> Bool[Tensor, ""]:
    """Whether `check_finite` would pass, on the device: who needs other numbers too reads them in
    the same wait."""
    # One number of all values, and so one exchange.
    finite = torch.stack([value.detach().isfinite().all() for value in values.values()]).all()
    return finite if alone else distributed.stacked(finite.float()).all()


def check_logits(pruner: str, logits: Tensor, mask: Tensor, uids: Sequence[str]) -> None:
    """Refuse keep logits [B, V] that are not finite where `mask` is True; looks at the device once.

    Raises:
        UserError: one is not; names the pruner and the samples.
    """
    bad = ~logits.detach().isfinite() & mask
    if not bool(bad.any()):
        return
    samples = [uid for uid, wrong in zip(uids, bad.any(1).tolist(), strict=True) if wrong]
    raise UserError(
        f"pruner {pruner}: its keep logits are not finite for "
        f"{_names(samples)} in {str(logits.dtype).removeprefix('torch.')}, "
        "so it cannot choose: copy its weights again, or train it anew."
    )


def compact(values: Tensor) -> Tensor:
    """Finite numbers in float16, or in float32 where one is too large for that (bfloat16 holds
    larger ones)."""
    half = values.half()
    fits = bool((half.isfinite() | ~values.isfinite()).all())
    return half if fits else values.float()


def _not_finite(
    values: Mapping[str, Tensor], uids: Sequence[str], axis: int
) -> dict[str, tuple[str, list[str]]]:
    """(what it is, the samples) of every value that is not finite."""
    problems = {}
    for name, value in values.items():
        bad = ~value.detach().isfinite()
        if bool(bad.any()):
            # A scalar, such as a loss, is of all samples.
            rows = [True] * len(uids)
            if bad.ndim:
                rows = bad.movedim(axis, 0).flatten(1).any(1).tolist()
            samples = [uid for uid, wrong in zip(uids, rows, strict=True) if wrong]
            problems[name] = (_kind(value), samples)
    return problems


def _kind(value: Tensor) -> str:
    return "not a number" if bool(value.isnan().any()) else "infinite"


def _names(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - SHOWN} more" if len(uids) > SHOWN else ""
    return f"{'sample' if len(uids) == 1 else 'samples'} {', '.join(uids[:SHOWN])}{more}"
