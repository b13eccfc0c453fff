"""Losses of stage `pretrain` on coordinates that are read and written as classes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def soft_cross_entropy(
    logits: Float[Tensor, "... bins"],
    target: Int[Tensor, "..."],
    sigma: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy against a Gaussian over neighboring pixels: a coordinate one pixel off is
    nearly right."""
    bins = torch.arange(logits.shape[-1], device=logits.device)
    # [... bins] a Gaussian over the bins, normalized.
    soft = torch.softmax(-((bins - target.unsqueeze(-1)) ** 2) / (2 * sigma**2), -1)
    loss = -(soft * logits.log_softmax(-1)).sum(-1)
    return loss.mean() if reduction == "mean" else loss


def outside_loss(
    logits: Float[Tensor, "N vocab"], numbers: Int[Tensor, " M"]
) -> Float[Tensor, " N"]:
    """Minus the log of the probability that goes to any number at all."""
    return logits.logsumexp(-1) - logits[:, numbers].logsumexp(-1)
