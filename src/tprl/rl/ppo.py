"""The PPO loss and what is logged beside it."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_RANGE = 20.0  # exp stays finite; far beyond any clip range


class PPOLoss(NamedTuple):
    """Scalars of one minibatch. Only `total`, `policy`, `value` and `entropy` carry gradients."""

    total: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    value: Float[Tensor, ""]  # mean squared error, before its coefficient
    entropy: Float[Tensor, ""]  # mean, before its coefficient
    kl: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]


def ppo_loss(
    new_log_prob: Float[Tensor, "B A"],
    old_log_prob: Float[Tensor, "B A"],
    advantage: Float[Tensor, " B"] | Float[Tensor, "B A"],
    entropy: Float[Tensor, "B A"],
    new_value: Float[Tensor, " B"] | None,
    target: Float[Tensor, " B"] | None,
    decisions: Bool[Tensor, "B V"],
    *,
    clip: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    ratio: Literal["token", "joint"] = "token",
) -> PPOLoss:
    """Clipped surrogate (Schulman et al. 2017, equation 7) + value_coef * MSE - entropy_coef *
    entropy.

    Every term is a mean over a sample's decisions, then over the samples: coefficients, clip range
    and the KL target do not depend on the number of tokens, a sample counts the same alone, padded
    or in any batch, and losses of equal minibatches average to the loss of the whole. Samples
    without a decision count nowhere.

    Args:
        new_log_prob: with grad; A = V per-token (0 where not alive), or A = 1 for a set.
        old_log_prob: as stored by the rollout.
        advantage: one per sample, or one per log-probability.
        entropy: of the same shape as the log-probabilities.
        new_value: critic's output; None (GRPO) drops the value term.
        target: value target.
        decisions: entries of A = V that are decisions: all tokens that could be kept, or the tokens
            drawn one after the other. A set (A = 1) counts where there is any.
        clip: half-width of the clip range of the ratio.
        ratio: "token": one ratio per decision. "joint": one per sample, exp of the sum of the
            decisions' log-ratios divided by their number (Zheng et al. 2025, GSPO, equation 7). A
            set (A = 1) is one decision: both are the same, and nothing is divided.

    Returns:
        `kl` is Schulman's estimator mean((r - 1) - log r), never negative. Log-ratios are clamped
        to +-LOG_RATIO_RANGE, so the loss stays finite.

    Raises:
        ValueError: one of new_value and target is missing, a per-token advantage meets a joint
            ratio, or `ratio` is unknown.
    """
    if (new_value is None) != (target is None):
        raise ValueError("give both new_value and target, or neither.")
    if ratio not in ("token", "joint") or (ratio == "joint" and advantage.ndim == 2):
        raise ValueError(f"ratio={ratio} is unknown, or joint with per-token advantages.")
    # A set has one log-probability: it counts where anything was decided.
    per_token = new_log_prob.shape[1] == decisions.shape[1]
    mask = decisions if per_token else decisions.any(1, keepdim=True)
    # [B A] log-ratios; GSPO's equation 7 replaces them by their mean over a sample's decisions.
    difference = new_log_prob - old_log_prob.detach()
    counted = mask
    if ratio == "joint":
        difference = _per_sample(difference, mask).unsqueeze(1)
        counted = mask.any(1, keepdim=True)
    # [B A] ratio of the new policy to the one that sampled; exactly 1 before the first step.
    log_ratio = difference.masked_fill(~counted, 0.0).clamp(-LOG_RATIO_RANGE, LOG_RATIO_RANGE)
    r = log_ratio.exp()
    # The smaller of both surrogates: no reward for leaving the clip range.
    weight = (advantage.unsqueeze(1) if advantage.ndim == 1 else advantage).detach()
    clipped_surrogate = r.clamp(1 - clip, 1 + clip) * weight
    policy = -_mean(torch.minimum(r * weight, clipped_surrogate), counted)
    # The critic's error; GRPO and leave-one-out have no critic.
    value = policy.new_zeros(())
    if new_value is not None and target is not None:
        error = (new_value - target.detach()).square().unsqueeze(1)
        value = _mean(error, mask.any(1, keepdim=True))
    spread = _mean(entropy, mask)
    # What is only logged: Schulman's KL estimate is never negative.
    with torch.no_grad():
        kl = _mean(r - 1 - log_ratio, counted)
        clipped = _mean(((r - 1).abs() > clip).float(), counted)
        largest = r.masked_fill(~counted, 0.0).max()
    total = policy + value_coef * value - entropy_coef * spread
    return PPOLoss(total, policy, value, spread, kl, clipped, largest)


def normalize(
    advantage: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"] | None = None, eps: float = 1e-8
) -> Float[Tensor, "*N"]:
    """Shift and scale to mean 0 and (population) standard deviation 1 over the True entries; the
    others become 0."""
    valid = advantage.flatten() if mask is None else advantage[mask]
    if not valid.numel():
        return torch.zeros_like(advantage)
    normal = (advantage - valid.mean()) / (valid.std(correction=0) + eps)
    return normal if mask is None else normal.masked_fill(~mask, 0.0)


def explained_variance(
    value: Float[Tensor, "*N"], target: Float[Tensor, "*N"]
) -> Float[Tensor, ""]:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 one that knows the mean; NaN
    without variance."""
    variance = target.var(correction=0)
    explained = 1 - (target - value).var(correction=0) / variance
    return torch.where(variance > 0, explained, torch.nan)


def _per_sample(x: Tensor, mask: Tensor) -> Tensor:
    """[B A] -> [B]: mean over the True entries, 0 where there are none."""
    return x.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return _per_sample(x, mask).sum() / mask.any(1).sum().clamp(min=1)
