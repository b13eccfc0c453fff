"""Episodes of a core that the questions about an image share, and a focus that each of them draws
given the core.

Both come from one policy: the core from logits without the question, the focus from logits with
it. A sequence holds the core at places 1 to c and the focus at c + 1 to k, so that the
log-probability of every draw is that of `policy.sequential`, given the draws before it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.budget import Rows, core_budget
from tprl.policy.action import ActionRule, act
from tprl.policy.networks import PolicyInput, PolicyNet
from tprl.rl.rollout import Rollout, join_episodes, split_episodes, split_noise, step_budgets


class Phase(NamedTuple):
    """What one of the two parts is drawn from; I images."""

    logits: Float[Tensor, "I W"]
    value: Float[Tensor, " B"]
    k: Int[Tensor, " I"]  # tokens in the sequence when the part is complete, on the host


@torch.no_grad()
def collect_turns(
    policy: PolicyNet,
    x: PolicyInput,
    rule: ActionRule,
    share: float,
    keep_ratio: Float[Tensor, " B"],
    core_noise: Float[Tensor, "C N"],
    noise: Float[Tensor, "B N"],
    group: int,
    turns: int,
) -> Rollout:
    """Sample an episode per question and group: `turns` questions that follow each other are about
    one image, and episode g of each of them has the same core.

    Args:
        policy: the actor-critic.
        x: the questions, of P images.
        rule: kind "sequential".
        share: of the budget that is core.
        keep_ratio: of every episode, on the host; the same for all questions about an image.
        core_noise: C = P * group rows of uniforms, N >= V.
        noise: B = P * turns * group rows, those of the focus.
        group: episodes per question.
        turns: questions per image.
    """
    # Eval mode, as in the update: the network must give both the same numbers.
    training = policy.training
    policy.eval()
    # The core is drawn for the first question of each image, and is that of the others.
    first = torch.arange(0, len(x.mask), turns)
    asked = blind_input(x.rows(first))
    alone, images = asked.mask, asked.images
    ratios = keep_ratio[::group][::turns]
    core_part = _phase(policy, asked, ratios, images, share)
    uniforms = split_noise(images, core_noise.unflatten(0, (-1, group)), rule, alone.shape[1])
    drawn, _, _ = _act(asked, rule, images, core_part, noise=uniforms)
    core = join_episodes(images, drawn, alone).repeat_interleave(turns, 0)
    # The focus of each question begins with that core.
    images = x.images
    uniforms = split_noise(images, noise.unflatten(0, (-1, group)), rule, x.mask.shape[1])
    start = split_episodes(images, core) * images.mask.unsqueeze(1)
    focus_part = _phase(policy, x, keep_ratio[::group], images)
    order, _, _ = _act(x, rule, images, focus_part, noise=uniforms, start=start)
    # [1 B V] one step; log-probabilities are computed as the update will compute them.
    action = join_episodes(images, order, x.mask).flatten(0, 1).unsqueeze(0)
    alive = x.mask.repeat_interleave(group, 0).unsqueeze(0)
    value = torch.zeros(alive.shape[:2], device=action.device)
    rollout = Rollout(alive, action, torch.zeros_like(action, dtype=value.dtype), value)
    log_prob, _, value = evaluate_turns(policy, x, rule, rollout, keep_ratio, share, group)
    policy.train(training)
    chosen = core.flatten(0, 1).unsqueeze(0) > 0
    return Rollout(alive, action, log_prob.unsqueeze(0), value.unsqueeze(0), chosen)


def evaluate_turns(
    policy: PolicyNet,
    x: PolicyInput,
    rule: ActionRule,
    rollout: Rollout,
    keep_ratio: Float[Tensor, " B"],
    share: float,
    group: int,
) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"], Float[Tensor, " B"]]:
    """(log-probability, entropy, value) of the stored draws under the present policy, with grad:
    each draw's given those before it, the core's without the question."""
    images, ratios = x.images, keep_ratio[::group]
    order = rollout.action[0].unflatten(0, (-1, group))
    order = split_episodes(images, order) * images.mask.unsqueeze(1)
    # Places up to c are the core's; the focus is what follows them.
    core_part = _phase(policy, blind_input(x), ratios, images, share)
    start = order * (order <= core_part.k.to(order.device)[:, None, None])
    focus_part = _phase(policy, x, ratios, images)
    _, of_core, core_entropy = _act(x, rule, images, core_part, action=start)
    _, of_focus, entropy = _act(x, rule, images, focus_part, action=order, start=start)
    log_prob = join_episodes(images, of_core + of_focus, x.mask).flatten(0, 1)
    spread = join_episodes(images, core_entropy + entropy, x.mask).flatten(0, 1)
    return log_prob, spread, focus_part.value.repeat_interleave(group)


def blind_input(x: PolicyInput) -> PolicyInput:
    """The same without a word of the question, as `pruners.core_focus.blind` serves it."""
    return x._replace(query=x.query[:, :0], query_mask=x.query_mask[:, :0])


def _phase(
    policy: PolicyNet,
    x: PolicyInput,
    keep_ratio: Float[Tensor, " Q"],
    images: Rows,
    share: float | None = None,
) -> Phase:
    """Logits and counts of the whole sequence, or of the core, which is `share` of it. The network
    reads the ratio that it is served."""
    ratios = keep_ratio[list(images.owners)]
    k = step_budgets(ratios, images.sizes, 1, 0)
    if share is not None:
        k = torch.tensor([core_budget(share, n) for n in k.tolist()], dtype=torch.long)
        keep_ratio = _served(k, images, keep_ratio)
    logits, value = policy(x, x.mask, 0, keep_ratio.to(x.mask.device))
    return Phase(images.split(logits), value, k)


def _served(
    k: Int[Tensor, " I"], images: Rows, keep_ratio: Float[Tensor, " Q"]
) -> Float[Tensor, " Q"]:
    """The ratio of each question at which a core of k tokens of its images is asked for."""
    # [Q] tokens of the core, and all tokens, summed over each question's images.
    counts = torch.zeros(len(keep_ratio), dtype=torch.float64)
    sizes = counts.clone()
    owners = torch.tensor(images.owners, dtype=torch.long)
    counts.index_add_(0, owners, k.double())
    sizes.index_add_(0, owners, torch.tensor(images.sizes, dtype=torch.float64))
    # Without a core nothing is drawn from these logits: any ratio does.
    return torch.where(counts > 0, counts / sizes.clamp(min=1), keep_ratio.double())


def _act(
    x: PolicyInput,
    rule: ActionRule,
    images: Rows,
    phase: Phase,
    action: Tensor | None = None,
    noise: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`act` on the rows of images."""
    assert x.features is not None
    features = images.split(x.features)
    how = {"k": phase.k, "features": features, "start": start}
    return act(phase.logits, images.mask, rule, 0, action=action, noise=noise, **how)
