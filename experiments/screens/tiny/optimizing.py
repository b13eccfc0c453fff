"""Optimizers of the two phases, and their learning rates."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

DECAY = 0.3  # last share of a phase, in which the rate falls to 0
WARM = 200  # steps, at most a twentieth of a phase


def rate(step: int, steps: int) -> float:
    """Linear warm-up, constant, linear to 0: a phase may be made longer before the rate falls."""
    warm = max(1.0, min(WARM, steps / 20))
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
        chosen.append(Muon(inner, lr=muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return chosen


def step(chosen: Iterable[Optimizer], share: float, parameters: Iterable[nn.Parameter]) -> float:
    """One step at `share` of the peak rate; the norm of the gradient, before it is clipped to 1."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)
