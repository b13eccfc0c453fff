"""Runs that are the same bit for bit on a GPU, too, where PyTorch has kernels for it."""

import os

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tprl.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SIZES = (":4096:8", ":16:8")  # with any other one cuBLAS may add up in another order each time


def use_deterministic(wanted: bool) -> None:
    """Have PyTorch choose deterministic kernels, or stop where an operation has none; before
    anything runs on a GPU. Without `wanted` everything stays as it is.

    Raises:
        UserError: the environment gives cuBLAS a workspace with which it is not deterministic.
    """
    if not wanted:
        return
    size = os.environ.setdefault(WORKSPACE, SIZES[0])
    if size not in SIZES:
        raise UserError(
            f"deterministic=true needs {WORKSPACE} to be {' or '.join(SIZES)}, got {size}: "
            f"unset it, or set {WORKSPACE}={SIZES[0]}."
        )
    torch.use_deterministic_algorithms(True)
    # Timing kernels against each other would choose others in another run.
    torch.backends.cudnn.benchmark = False


def running_sum(x: Float[Tensor, "*S"], axis: int) -> Float[Tensor, "*S"]:
    """`torch.cumsum`, whose kernel for floats on a GPU adds in an order that varies: where
    deterministic ones are asked for, by doublings."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return doubled_sum(x, axis)
    return x.cumsum(axis)


def doubled_sum(x: Float[Tensor, "*S"], axis: int) -> Float[Tensor, "*S"]:
    """The running sum in log2(n) additions, each of a number to the one `step` places before it
    (Hillis and Steele 1986)."""
    total, step = x.movedim(axis, -1), 1
    while step < total.shape[-1]:
        total = total + pad(total[..., :-step], (step, 0))
        step *= 2
    return total.movedim(-1, axis)
