"""Episodes of T pruning steps: how many tokens each step keeps, sampling them, and scoring them again with grad."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.budget import budget
from tprl.errors import UserError
from tprl.policy.action import ActionRule, act
from tprl.policy.networks import PolicyInput, PolicyNet


class Rollout(NamedTuple):
    """What PPO stores of a batch of episodes. A: V for per-token rules, 1 for exact-k ones."""

    alive: Bool[Tensor, "T B V"]  # before the step
    action: Bool[Tensor, "T B V"]  # after it: the mask that was executed
    log_prob: Float[Tensor, "T B A"]
    value: Float[Tensor, "T B"]

    def rows(self, index: Tensor | slice) -> "Rollout":
        """The episodes at `index`, in its order."""
        return Rollout(*(part[:, index] for part in self))


def step_ratios(keep_ratio: float, steps: int) -> list[float]:
    """Kept fraction of the *original* tokens after each step: every step keeps the same share of what is alive, and
    the last entry is exactly `keep_ratio`.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"{steps} pruning steps: an episode needs at least 1.")
    return [keep_ratio ** ((t + 1) / steps) for t in range(steps - 1)] + [keep_ratio]


def step_budgets(keep_ratio: Float[Tensor, " B"], mask: Bool[Tensor, "B V"], steps: int, t: int) -> Int[Tensor, " B"]:
    """Tokens left after step `t` (0-based) of `steps`; never rising with t, and `budget` itself at the last step.

    Pass float64 ratios: in float32 a ratio such as 0.7 falls below itself, and 0.7 of 5 tokens would round to 3
    instead of 4. A float32 ratio is therefore read to 7 significant digits.
    """
    double = keep_ratio.dtype == torch.float64
    ratios = [r if double else float(f"{r:.7g}") for r in keep_ratio.tolist()]
    counts = [budget(step_ratios(r, steps)[t], n) for r, n in zip(ratios, mask.sum(1).tolist(), strict=True)]
    return torch.tensor(counts, dtype=torch.long, device=mask.device)


@torch.no_grad()
def collect(
    policy: PolicyNet,
    x: PolicyInput,
    rule: ActionRule,
    steps: int,
    keep_ratio: Float[Tensor, " B"],
    noise: Float[Tensor, "T B N"],
    group: int = 1,
) -> Rollout:
    """Sample `steps` pruning steps per row, in eval mode and without grad.

    Args:
        policy: the actor-critic.
        x: the batch.
        rule: the action distribution; Bernoulli ignores the budget (the network still sees the ratio).
        steps: T.
        keep_ratio: kept fraction of the original tokens at the end of the episode, float64 (see `step_budgets`).
        noise: uniforms in [0, 1), N >= `noise_width`; seeded per sample by the caller.
        group: runs of `group` consecutive rows are the same prompt at the same ratio; the first step then computes
            network and decomposition once per prompt. Later steps differ from row to row.

    Raises:
        ValueError: the number of rows is not a multiple of `group`.
    """
    training = policy.training
    policy.eval()
    alive, parts = x.mask, []
    for t in range(steps):
        action, log_prob, _, value = _step(policy, x, rule, alive, t, steps, keep_ratio, group, noise=noise[t])
        parts.append((alive, action, log_prob, value))
        alive = action
    policy.train(training)
    return Rollout(*(torch.stack(part) for part in zip(*parts, strict=True)))


def evaluate_actions(
    policy: PolicyNet,
    x: PolicyInput,
    rule: ActionRule,
    rollout: Rollout,
    keep_ratio: Float[Tensor, " B"],
    t: int,
    group: int = 1,
) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B A"], Float[Tensor, " B"]]:
    """(log-probability, entropy, value) of the stored actions of step `t` under the present policy, with grad.

    Arguments as for `collect`. Before the first update these are the numbers that `collect` stored: the same
    function computes both. The policy has no dropout, so its mode does not matter.
    """
    steps = len(rollout.alive)
    _, log_prob, entropy, value = _step(
        policy, x, rule, rollout.alive[t], t, steps, keep_ratio, group, action=rollout.action[t]
    )
    return log_prob, entropy, value


def _step(
    policy: PolicyNet,
    x: PolicyInput,
    rule: ActionRule,
    alive: Tensor,
    t: int,
    steps: int,
    keep_ratio: Tensor,
    group: int,
    action: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pruning step, sampled or evaluated: (action, log-probability, entropy, value)."""
    if len(alive) % group:
        raise ValueError(f"{len(alive)} rows are not whole groups of {group}.")
    shared = group if t == 0 else 1
    if shared > 1:
        x, alive, keep_ratio = x.rows(slice(None, None, shared)), alive[::shared], keep_ratio[::shared]
    logits, value = policy(x, alive, t, keep_ratio)
    action, log_prob, entropy = act(
        logits,
        alive,
        rule,
        t,
        k=step_budgets(keep_ratio, x.mask, steps, t) if rule.exact else None,
        similarity=x.similarity,
        action=None if action is None else action.unflatten(0, (-1, shared)),
        noise=None if noise is None else noise.unflatten(0, (-1, shared)),
    )
    flat = [part.flatten(0, 1) for part in (action, log_prob, entropy)]
    return flat[0], flat[1], flat[2], value.repeat_interleave(shared)
