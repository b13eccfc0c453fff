"""Optimizers of the two phases, and their learning rates."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

DECAY = 0.3  # last share of a phase, in which the rate falls to 0
WARM = 200  # steps unless a plan says otherwise; at most a twentieth of a phase


def grown(batch: int) -> float:
    """What learning rates are multiplied with for a larger batch: its root, as the noise of a mean
    gradient falls with it (Malladi et al. 2022, for Adam), from the eight pages they were chosen
    for up to 32."""
    return math.sqrt(min(4.0, max(1.0, batch / 8)))


def rate(step: float, steps: float, warm: float = WARM) -> float:
    """Linear warm-up, constant, linear to 0: a phase may be made longer before the rate falls."""
    warm = max(1.0, min(warm, steps / 20))
    return min(1.0, (step + 1) / warm, (steps - step) / max(1.0, DECAY * steps))


def optimizers(
    modules: Iterable[nn.Module], heads: nn.Module, lr: float, muon: float
) -> list[Optimizer]:
    """Muon for the matrices inside of `modules`, AdamW for all else.

    Args:
        modules: what outlives the training.
        heads: what is only trained for its gradient.
        lr: of AdamW.
        muon: learning rate of Muon; 0 trains everything by AdamW.
    """
    inner: list[nn.Parameter] = []
    outer = list(heads.parameters())
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head"))
            (inner if hidden and muon else outer).append(parameter)
    chosen: list[Optimizer] = [AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if inner:
        # One by one on a CPU, where results of earlier runs are to be met bit by bit.
        kind = BatchedMuon if inner[0].device.type == "cuda" else Muon
        chosen.append(kind(inner, lr=muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return chosen


class BatchedMuon(Muon):
    """Muon that makes all matrices of a size orthogonal at once: one by one, their small products
    would take a GPU's host longer than the model.

    Only for the adjustment "match_rms_adamw" and Nesterov momentum, as here.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step; there is no closure."""
        for group in self.param_groups:
            sizes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sizes[tuple(sorted(parameter.shape))].append(parameter)
            for parameters in sizes.values():
                self._move(parameters, group)

    def _move(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        # All lie, none stands, so that products with themselves are as small as can be.
        lying = [value.T if value.shape[0] > value.shape[1] else value for value in updates]
        even = orthogonal(torch.stack(lying), group["ns_coefficients"], group["ns_steps"])
        moves = [
            move.T if old.shape[0] > old.shape[1] else move
            for move, old in zip(even.float(), parameters, strict=True)
        ]
        length = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, moves, alpha=-length)


def orthogonal(matrices: Tensor, factors: tuple[float, float, float], steps: int) -> Tensor:
    """[M rows columns] with singular values near one: the quintic Newton-Schulz steps of
    `torch.optim.Muon`, in bfloat16."""
    a, b, c = factors
    now = matrices.bfloat16()
    now = now / now.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = now @ now.mT
        now = torch.baddbmm(now, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), now, beta=a)
    return now


def step(chosen: Iterable[Optimizer], share: float, parameters: Iterable[nn.Parameter]) -> Tensor:
    """One step at `share` of the peak rate; the norm of the gradient, before it is clipped to 1."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return norm
