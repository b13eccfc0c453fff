"""Optimizer and learning rates of stage `pretrain`: one warm-up and one cosine per phase."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn


def two_phase_optimizer(
    tower: Sequence[nn.Parameter],
    bridge: Sequence[nn.Parameter],
    language: Sequence[nn.Parameter],
    lr: tuple[float, float],
    steps: tuple[int, int],
) -> OptimizerLRScheduler:
    """AdamW over the tower (first phase), the projector (both) and the language model (second).

    Args:
        tower, bridge, language: parameters.
        lr: peak learning rates of vision (tower and bridge) and of language.
        steps: of the two phases.
    """
    lr_vision, lr_language = lr
    first, second = steps
    # One group per schedule: the projector learns in both phases.
    groups = [
        {"params": tower, "lr": lr_vision},
        {"params": bridge, "lr": lr_vision},
        {"params": language, "lr": lr_language},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)

    def vision(step: int) -> float:
        return ramp(step, first)

    def reading(step: int) -> float:
        return ramp(step - first, second)

    def both(step: int) -> float:
        return vision(step) if step < first else reading(step)

    # One rate per group, in their order.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [vision, both, reading])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def ramp(step: int, total: int, warmup: int = 200, floor: float = 0.01) -> float:
    """Linear warm-up, then cosine to `floor`; 0 outside [0, total]."""
    if not 0 <= step <= total or total == 0:
        return 0.0
    # A short phase warms up over a fifth of itself.
    warm = min(1.0, (step + 1) / min(warmup, max(1, total // 5)))
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total)))
