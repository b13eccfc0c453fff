"""The update of stage `ppo`: epochs of minibatches, clipped steps on what an iteration sampled."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tprl.policy.action import ActionRule
from tprl.policy.networks import PolicyInput, PolicyNet
from tprl.rl.ppo import PPOLoss, ppo_loss
from tprl.rl.rollout import Rollout, evaluate_actions
from tprl.runtime import distributed
from tprl.runtime.finite import all_finite, check_finite
from tprl.stages.rollout_log import RolloutLog, over_ranks


class Episodes(NamedTuple):
    """What an iteration, or a minibatch of it, learns from: `group` episodes of each question, one
    after another."""

    x: PolicyInput  # of the questions; everything below is of the episodes
    rule: ActionRule
    rollout: Rollout
    keep_ratio: Float[Tensor, " B"]  # on the host
    advantage: Float[Tensor, "T B"] | Float[Tensor, "T B V"]
    target: Float[Tensor, "T B"] | None
    uids: Sequence[str]

    def about(self, questions: Int[Tensor, " M"], group: int) -> "Episodes":
        """Those of some questions; `uids` holds each of them once."""
        at = (questions.unsqueeze(1) * group + torch.arange(group)).flatten()
        rows = at.to(self.advantage.device)
        return self._replace(
            x=self.x.rows(questions),
            rollout=self.rollout.rows(rows),
            keep_ratio=self.keep_ratio[at],
            advantage=self.advantage[:, rows],
            target=None if self.target is None else self.target[:, rows],
            uids=[self.uids[question * group] for question in questions.tolist()],
        )


class PPOUpdate(RolloutLog):
    """A stage that learns from episodes by PPO's loss."""

    iteration: int

    @property
    def net(self) -> PolicyNet:
        return cast(PolicyNet, self.pruner.net)

    def _update(self, episodes: Episodes) -> tuple[list[PPOLoss], int]:
        """Epochs of minibatches; whole groups stay together, because they share one network pass at
        t = 0.

        A minibatch is drawn from the prompts of all ranks, and each rank computes the part that it
        has rolled out. Returns the losses of the minibatches, over all ranks, and the number of
        epochs.
        """
        h = self.hparams
        batch = max(1, h["minibatch"] // h["group"])
        order = torch.Generator().manual_seed(h["seed"] * 1_000_003 + self.iteration)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        # Both rates fall linearly to 0 over the iterations.
        left = 1 - self.iteration / h["iterations"] if h["anneal"] else 1
        rates = (h["lr_actor"], h["lr_critic"])
        for param_group, rate in zip(optimizer.param_groups, rates, strict=True):
            param_group["lr"] = rate * left
        # Prompts of all ranks in one order that every rank draws alike.
        losses: list[PPOLoss] = []
        prompts_of_all = len(episodes.x.mask) * distributed.count()
        for epoch in range(1, h["update_epochs"] + 1):
            for part in torch.randperm(prompts_of_all, generator=order).split(batch):
                prompts, weight = distributed.local_part(part)
                minibatch = episodes.about(prompts, h["group"])
                loss = self._share_of_loss(minibatch, weight)
                losses.append(over_ranks(loss))
                optimizer.zero_grad()
                self.manual_backward(loss.total)
                norm = nn.utils.clip_grad_norm_(self.net.parameters(), h["grad_clip"])
                # Before the step, and on the KL of all ranks, so that all of them stop alike. Both
                # in one wait: an iteration that stops has computed one gradient for nothing.
                parts = {f"ppo/{name}": value for name, value in loss._asdict().items()}
                parts["ppo/grad_norm"] = norm
                kl, finite = torch.stack([losses[-1].kl, all_finite(parts).float()]).tolist()
                if len(losses) > 1 and kl > h["kl_stop"]:
                    return losses, epoch
                if not finite:
                    check_finite(parts, minibatch.uids, f"iteration {self.iteration}")
                optimizer.step()
        return losses, h["update_epochs"]

    def _share_of_loss(self, minibatch: Episodes, weight: float) -> PPOLoss:
        """The loss of this rank's share of a minibatch, weighted by the share."""
        loss = self._loss(minibatch)
        # A largest value is no mean: it counts whole, or not at all where the share is empty.
        largest = loss.ratio_max * (weight > 0)
        return PPOLoss(*(value * weight for value in loss))._replace(ratio_max=largest)

    def evaluated(
        self,
        x: PolicyInput,
        rule: ActionRule,
        rollout: Rollout,
        keep_ratio: Float[Tensor, " B"],
        t: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability, entropy, value) of the actions of step t under the present policy."""
        group = self.hparams["group"]
        return evaluate_actions(self.net, x, rule, rollout, keep_ratio, t, group)

    def _loss(self, episodes: Episodes) -> PPOLoss:
        """The mean of the losses of the T steps."""
        h, parts = self.hparams, []
        x, rule, rollout, target = episodes.x, episodes.rule, episodes.rollout, episodes.target
        for t in range(len(rollout.alive)):
            # The same function as in the rollout: before the first step the ratio is exactly 1.
            log_prob, entropy, value = self.evaluated(x, rule, rollout, episodes.keep_ratio, t)
            # Decisions: the tokens drawn one by one, or every token that could be kept.
            decisions = rollout.keep[t] if rule.kind == "sequential" else rollout.alive[t]
            loss = ppo_loss(
                log_prob,
                rollout.log_prob[t],
                episodes.advantage[t],
                entropy,
                None if target is None else value,
                None if target is None else target[t],
                decisions,
                clip=h["clip"],
                value_coef=h["value_coef"],
                entropy_coef=h["entropy_coef"],
                ratio=h["ratio"],
            )
            parts.append(loss)
        return PPOLoss(*(torch.stack(values).mean() for values in zip(*parts, strict=True)))
