"""Episodes of T pruning steps: how many tokens each step keeps, sampling them, and scoring them
again with grad."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tprl.budget import Rows, budget
from tprl.errors import UserError
from tprl.policy.action import ActionRule, act, noise_width
from tprl.policy.networks import PolicyInput, PolicyNet


class Rollout(NamedTuple):
    """What PPO stores of a batch of episodes. A: V for decisions token by token, 1 for sets."""

    alive: Bool[Tensor, "T B V"]  # before the step
    # positive where a token was kept; its place in the order, where there is one
    action: Shaped[Tensor, "T B V"]
    log_prob: Float[Tensor, "T B A"]
    value: Float[Tensor, "T B"]
    core: Bool[Tensor, "T B V"] | None = None  # what of it stands first (`TokenSelection.core`)

    @property
    def keep(self) -> Bool[Tensor, "T B V"]:
        """After each step: the mask that was executed."""
        return self.action > 0

    def rows(self, index: Tensor | slice) -> "Rollout":
        """The episodes at `index`, in its order."""
        alive, action, log_prob, value, core = self
        core = None if core is None else core[:, index]
        return Rollout(alive[:, index], action[:, index], log_prob[:, index], value[:, index], core)


def step_ratios(keep_ratio: float, steps: int) -> list[float]:
    """Kept fraction of the *original* tokens after each step: every step keeps the same share of
    what is alive, and the last entry is exactly `keep_ratio`.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    return [keep_ratio ** ((t + 1) / steps) for t in range(steps - 1)] + [keep_ratio]


def step_budgets(
    keep_ratio: Float[Tensor, " B"], sizes: Sequence[int], steps: int, t: int
) -> Int[Tensor, " B"]:
    """Tokens left after step `t` (0-based) of `steps`, of rows with `sizes` tokens; never rising
    with t, and `budget` itself at the last step. On the host, as `keep_ratio` should be.

    Pass float64 ratios: in float32 a ratio such as 0.7 falls below itself, and 0.7 of 5 tokens
    would round to 3 instead of 4. A float32 ratio is therefore read to 7 significant digits.
    """
    # float32 ratios are read to the digits they hold: 0.7 is 0.7 again.
    double = keep_ratio.dtype == torch.float64
    ratios = [r if double else float(f"{r:.7g}") for r in keep_ratio.tolist()]
    # Rounded from the original count, so that errors do not add up over the steps.
    counts = [budget(step_ratios(r, steps)[t], n) for r, n in zip(ratios, sizes, strict=True)]
    return torch.tensor(counts, dtype=torch.long)


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
        x: the prompts.
        rule: the action distribution; Bernoulli ignores the budget (the network still sees the
            ratio).
        steps: T.
        keep_ratio: kept fraction of the original tokens at the end of the episode, float64 and on
            the host (see `step_budgets`).
        noise: uniforms in [0, 1), N >= `noise_width`; seeded per sample by the caller.
        group: episodes per prompt, B = group times the prompts: those of a prompt follow each other
            and share its ratio. The first step computes network and decomposition once per prompt;
            later ones differ from episode to episode.

    Raises:
        ValueError: the number of episodes is not `group` times that of the prompts.
    """
    # Eval mode, as in the update: the network must give both the same numbers.
    training = policy.training
    policy.eval()
    # [B V] every episode of a question begins with all of its tokens.
    alive = x.mask.repeat_interleave(group, 0)
    parts = []
    for t in range(steps):
        action, log_prob, _, value = _step(
            policy, x, rule, alive, t, steps, keep_ratio, group, noise=noise[t]
        )
        parts.append((alive, action, log_prob, value))
        # What a step keeps is all that the next one may choose from.
        alive = action > 0
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
    """(log-probability, entropy, value) of the stored actions of step `t` under the present policy,
    with grad.

    Arguments as for `collect`. Before the first update these are the numbers that `collect` stored:
    the same function computes both. The policy has no dropout, so its mode does not matter.
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
    if len(keep_ratio) != len(x.mask) * group:
        raise ValueError(
            f"{len(keep_ratio)} episodes of {len(x.mask)} prompts are not groups of {group}."
        )
    # At step 0 all episodes of a question are in the same state: one network pass serves them.
    shared = group if t == 0 else 1
    if t == 0:  # all tokens are alive then
        alive, keep_ratio = x.mask, keep_ratio[::group]
    elif group > 1:  # only now a copy per episode: kernels are large
        x = x.rows(torch.arange(len(x.mask)).repeat_interleave(group))
    # Budgets are per image, so actions are drawn per image, too.
    logits, value = policy(x, alive, t, keep_ratio.to(x.mask.device))
    images = x.images
    k = features = None
    if rule.exact:
        k = step_budgets(keep_ratio[list(images.owners)], images.sizes, steps, t)
    if x.features is not None:
        features = images.split(x.features)
    # [B*G V] -> [I G W]: the episodes of a question share its state, hence one normalizer.
    if action is not None:
        action = split_episodes(images, action.unflatten(0, (-1, shared))) * images.mask.unsqueeze(
            1
        )
    if noise is not None:
        noise = split_noise(images, noise.unflatten(0, (-1, shared)), rule, alive.shape[1])
    action, log_prob, entropy = act(
        images.split(logits),
        images.split(alive) & images.mask,
        rule,
        t,
        k=k,
        features=features,
        action=action,
        noise=noise,
    )
    # Back to one row per episode.
    action = join_episodes(images, action, alive)
    if rule.per_set:
        log_prob, entropy = _over_images(images, log_prob, entropy, len(alive))
    else:
        log_prob, entropy = (
            join_episodes(images, log_prob, alive),
            join_episodes(images, entropy, alive),
        )
    flat = [part.flatten(0, 1) for part in (action, log_prob, entropy)]
    return flat[0], flat[1], flat[2], value.repeat_interleave(shared)


def split_episodes(images: Rows, x: Shaped[Tensor, "B G V"]) -> Shaped[Tensor, "I G W"]:
    return images.split(x.transpose(1, 2)).transpose(1, 2)


def split_noise(
    images: Rows, noise: Float[Tensor, "B G N"], rule: ActionRule, v: int
) -> Float[Tensor, "I G M"]:
    """Every token takes its own uniforms along, so that a sample with one image draws the same as
    it would alone."""
    each = noise_width(rule, 1)
    if noise.shape[-1] < v * each:
        raise ValueError(f"{noise.shape[-1]} uniforms per sample, {v * each} are needed.")
    # [B G V*each] -> [B V G each]: uniforms sit beside their token before images are split.
    tokens = noise[..., : v * each].unflatten(-1, (v, each)).transpose(1, 2)
    return images.split(tokens).transpose(1, 2).flatten(2)


def join_episodes(
    images: Rows, x: Shaped[Tensor, "I G W"], like: Shaped[Tensor, "B V"]
) -> Shaped[Tensor, "B G V"]:
    return torch.stack([images.join(episode, like) for episode in x.unbind(1)], 1)


def _over_images(
    images: Rows, log_prob: Float[Tensor, "I G 1"], entropy: Float[Tensor, "I G 1"], b: int
) -> tuple[Float[Tensor, "B G 1"], Float[Tensor, "B G 1"]]:
    """A sample's images are pruned independently: log-probabilities add up, entropies (per token)
    are averaged."""
    # An image counts once in the mean, whatever its size; samples without images divide by 1.
    shape = (b, *log_prob.shape[1:])
    owners = torch.tensor(images.owners, dtype=torch.long)
    count = owners.bincount(minlength=b).clamp(min=1).view(-1, 1, 1).to(log_prob.device)
    total = log_prob.new_zeros(shape).index_add(0, images.sample, log_prob)
    return total, entropy.new_zeros(shape).index_add(0, images.sample, entropy) / count
