"""What stage `ppo` logs of an iteration; docs/metrics.md says what the names mean."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.pruners.learned import LearnedPruner
from tprl.rl.ppo import PPOLoss, explained_variance, normalize
from tprl.rl.rollout import Rollout
from tprl.runtime import distributed
from tprl.runtime.progress import Stopwatch
from tprl.scoring.episodes import flops_of_states
from tprl.scoring.scorer import Scorer
from tprl.stages.base import KeepBest
from tprl.types import LVLM, Encoded, Outcome, Sample


class RolloutLog(KeepBest):
    """The logging of a stage that learns from episodes."""

    lvlm: LVLM
    pruner: LearnedPruner
    scorer: Scorer
    samples_seen: int
    lagrange: float
    curves: dict[str, list[tuple[float, float]]]

    def _log(
        self,
        losses: Sequence[PPOLoss],
        terms: dict[str, Tensor],
        reward: Tensor,
        outcome: Outcome,
        kept: Tensor,
        rollout: Rollout,
        target: Tensor | None,
        epochs: int,
    ) -> None:
        # Already means over all ranks (`over_ranks`): averaged over minibatches only.
        for name, values in zip(PPOLoss._fields, zip(*losses, strict=True), strict=True):
            self.log(f"ppo/{name}", torch.stack(values).detach().mean())
        # Returns: the sum over an episode's steps, by term and of all.
        returns = {f"reward/{name}": value.sum(0).mean() for name, value in terms.items()}
        self.log_dict(returns, sync_dist=True)
        self.log("reward/return", reward.sum(0).mean(), sync_dist=True)
        self.log("ppo/keep_ratio", kept.mean(), sync_dist=True)
        self.log("ppo/update_epochs", float(epochs))
        if outcome.log_prob is not None:
            self.log("ppo/sampled_log_prob", outcome.log_prob[-1].mean(), sync_dist=True)
        # The score of what was sampled, next to that of what is served.
        if outcome.score is not None:
            sampled = distributed.stacked(outcome.score[-1].mean()).mean()
            self.curves["sampled"].append((float(self.samples_seen), float(sampled)))
            self.log("ppo/sampled", sampled, prog_bar=True)
        if target is not None:
            # A ratio of variances is not a mean of ranks: values and targets are gathered first.
            value = distributed.stacked(rollout.value).flatten()
            aim = distributed.stacked(target).flatten()
            self.log("ppo/explained_variance", explained_variance(value, aim))
        if self.hparams["budget"] == "lagrange":
            self.log("ppo/lagrange", self.lagrange)
        self.log("samples_seen", float(self.samples_seen))

    def _log_flops(self, samples: Sequence[Sample], encoded: Encoded, rollout: Rollout) -> None:
        """FLOPs of the first episode of each question, relative to all tokens; where the model has
        a cost model and the questions have answers, whose length counts."""
        complete = float(all(sample.answers for sample in samples))
        answered = distributed.stacked(torch.tensor(complete))
        if hasattr(self.lvlm, "shape") and bool(answered.all()):  # all ranks alike
            rows = torch.arange(len(samples), device=rollout.action.device) * self.hparams["group"]
            flops = flops_of_states(self.scorer, self.pruner, samples, encoded, rollout.rows(rows))
            first, *_, last = distributed.stacked(flops.sum(1)).sum(0)
            self.log("ppo/flops_ratio", last / first)

    def _log_speed(self, watch: Stopwatch, evaluations: int) -> None:
        """Seconds of this rank's phases; evaluations of all ranks."""
        phases = watch.seconds
        self.log_dict({f"time/{phase}": seconds for phase, seconds in phases.items()})
        rate = evaluations / sum(phases.values())
        self.log("ppo/evaluations_per_second", float(distributed.stacked(torch.tensor(rate)).sum()))


def over_ranks(loss: PPOLoss) -> PPOLoss:
    """What is logged of a minibatch: means over ranks, and the largest of the largest ratios."""
    values = distributed.stacked(torch.stack(loss).detach())
    return PPOLoss(*values.mean(0))._replace(ratio_max=values[:, -1].amax())


def normalize_over_ranks(advantage: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """By mean and spread over all ranks."""
    return normalize(distributed.stacked(advantage))[distributed.rank()]
