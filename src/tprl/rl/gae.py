"""Advantages: generalized advantage estimation, and the group baseline of GRPO."""

import torch
from jaxtyping import Float
from torch import Tensor


def gae(
    reward: Float[Tensor, "T B"], value: Float[Tensor, "T B"], gamma: float, lam: float
) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T B"]]:
    """(advantage, value target) of episodes that all end after T steps.

    A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t, with V and A zero
    after the end (Schulman et al. 2016, equation 16). The target is A_t + V_t. Columns are separate
    episodes.
    """
    # Backwards through the episode: each step needs the advantage of the next.
    value = value.detach()
    advantage = torch.zeros_like(reward)
    running = torch.zeros_like(reward[0])
    following = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        # delta_t, then A_t = delta_t + gamma lam A_{t+1}.
        delta = reward[t] + gamma * following - value[t]
        running = delta + gamma * lam * running
        advantage[t] = running
        following = value[t]
    return advantage, advantage + value


def group_advantage(
    returns: Float[Tensor, " B"], group: int, eps: float = 1e-4
) -> Float[Tensor, " B"]:
    """(return - group mean) / (group standard deviation + eps); `group` consecutive rows are one
    prompt.

    Shao et al. 2024 (GRPO, section 4.1.2), with the population standard deviation: a group of
    equals gets 0.

    Raises:
        ValueError: the rows are not whole groups.
    """
    if group < 1 or len(returns) % group:
        raise ValueError(f"{len(returns)} returns are not whole groups of {group}.")
    rows = returns.reshape(-1, group)
    centered = rows - rows.mean(1, keepdim=True)
    # eps: in a group of equals 0 / eps is 0, not 0 / 0.
    spread = rows.std(1, correction=0, keepdim=True)
    return (centered / (spread + eps)).reshape(-1)


def leave_one_out(returns: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """return - mean of the other returns of its group; `group` consecutive rows are one prompt.

    Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free!"). Not divided by the
    group's spread: with a dense reward that division makes the prompts on which the selection
    hardly matters as loud as those on which it decides.

    Raises:
        ValueError: the rows are not whole groups of at least two.
    """
    if group < 2 or len(returns) % group:
        raise ValueError(f"{len(returns)} returns are not whole groups of {group}.")
    rows = returns.reshape(-1, group)
    # r_i - mean of the others = (r_i - mean of all) G / (G - 1).
    centered = rows - rows.mean(1, keepdim=True)
    return (centered * group / (group - 1)).reshape(-1)
