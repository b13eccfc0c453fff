"""Stage `ppo`: improve the policy by reinforcement learning against the frozen LVLM.

One PPO iteration is one `training_step`: encode fresh prompts, sample pruning episodes, let the
LVLM answer from what is left, turn that into advantages, and take a few clipped steps.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.utils.data import DataLoader

from tprl.budget import check_keep_ratio
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.policy.action import ActionRule, action_kind, noise_width
from tprl.policy.networks import PolicyInput
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.serving import uniforms
from tprl.rewards import WeightedReward
from tprl.rl import credit
from tprl.rl.gae import gae, group_advantage, leave_one_out
from tprl.rl.rollout import Rollout, collect
from tprl.runtime import distributed
from tprl.runtime.finite import check_finite
from tprl.runtime.progress import Stopwatch
from tprl.runtime.store import Cache
from tprl.scoring.ahead import Ready
from tprl.scoring.episodes import measure_episodes
from tprl.scoring.scorer import LABELS, Reader, Scorer
from tprl.scoring.validation import ServedScore, merit
from tprl.stages.base import Next, Points, Settings
from tprl.stages.ppo_settings import (
    UNREAD,
    blocks_read,
    check_choices,
    check_credit,
    check_groups,
    check_scorer,
)
from tprl.stages.ppo_update import Episodes, PPOUpdate
from tprl.stages.prompts import drawn_ratios, prompt_loader
from tprl.stages.rollout_log import normalize_over_ranks
from tprl.types import LVLM, Encoded, Pruner, Sample


class PPO(PPOUpdate):
    """Proximal policy optimization of a pruner (TPRL, stage 3; Schulman et al. 2017; GRPO: Shao et
    al. 2024).

    Args:
        pruner: the policy to improve; with `PolicyNet` as its net.
        lvlm, dataset: the frozen model and the training split.
        reward: terms and weights.
        served: the validation score; the weights kept are those of its best value.
        iterations: training steps.
        prompts: fresh questions per iteration; they and the minibatches are shared out over the
            ranks.
        group: episodes per question.
        keep_ratio: final kept fraction, or several (each question draws one). Read by budgets
            "exact_k", "lagrange".
        steps: T pruning steps per episode.
        budget: "free" (Bernoulli; the reward alone limits the tokens), "lagrange" (Bernoulli; a
            multiplier holds the mean kept fraction at keep_ratio), "exact_k" (sets of exactly
            `budget()` tokens).
        law: how exact_k draws where the pruner serves by dpp: "sequential" (token by token in
            proportion to the gains that greedy MAP compares, see `policy.sequential`) or "kdpp"
            (one decision per set, cost V^3). A pruner that serves by anything else draws from a
            conditional Bernoulli.
        advantage: "gae" (critic), "grpo" (group mean and spread, no critic), or "rloo"
            (leave-one-out baseline).
        credit_blocks: read the best episode of each question that many more times, each time
            without one block of its tokens, and share its advantage out among them (`rl.credit`);
            0: every token of a set has the same advantage. Budget "exact_k", law "sequential", one
            pruning step and ratio "token" only; None: 4 there if `group` is above 1, else 0.
        temperature: (first, last) of the sampling distribution, annealed linearly; only under law
            "sequential" does it approach what is served as it falls.
        discount: lambda_disc of Bernoulli sampling.
        lr_actor, lr_critic: Adam (eps 1e-5), annealed linearly to 0 if `anneal`. minibatch
        (episodes), update_epochs, gamma, lam, clip, ratio, value_coef, entropy_coef, grad_clip: as
        in PPO.
        kl_stop: no further step is taken once a minibatch's KL estimate, a mean over decisions,
            exceeds it.
        lr_lagrange, lagrange_gain: step size of the multiplier, and how far it leads by the present
            excess.
        threshold_ratio: mean kept fraction at which budgets "free" and "lagrange" calibrate their
            threshold at the end.
        validate_every: iterations between served scores.
        scorer: who reads prompts in place of `lvlm`; None: `lvlm`.
        seed: prompts and sampling; every draw depends on (seed, iteration, uid, episode) only.
        cache: keeps scores with all tokens for runs that read the same prompts in the same batches.
    """

    overlays = True
    curve_titles: ClassVar = {"reward/return": "ppo, return of an episode"}
    unread = UNREAD
    next = Next("eval", "run", words=("pruners=[random,divprune]",))
    remembers = ("iteration", "lagrange", "samples_seen", "best", "best_state", "score", "curves")

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: BaseDataset,
        reward: WeightedReward,
        served: ServedScore,
        iterations: int,
        prompts: int,
        group: int,
        keep_ratio: float | Sequence[float],
        steps: int,
        budget: str,
        law: str,
        advantage: str,
        credit_blocks: int | None,
        temperature: Sequence[float],
        discount: float,
        lr_actor: float,
        lr_critic: float,
        anneal: bool,
        minibatch: int,
        update_epochs: int,
        gamma: float,
        lam: float,
        clip: float,
        ratio: str,
        value_coef: float,
        entropy_coef: float,
        grad_clip: float,
        kl_stop: float,
        lr_lagrange: float,
        lagrange_gain: float,
        threshold_ratio: float,
        validate_every: int,
        scorer: Reader | None = None,
        seed: int = 0,
        cache: Cache | None = None,
    ) -> None:
        super().__init__()
        objects = ["pruner", "lvlm", "dataset", "reward", "served", "scorer", "cache"]
        self.save_hyperparameters(ignore=objects)
        self.automatic_optimization, self.cache = False, cache
        self.pruner, self.lvlm, self.dataset = pruner, lvlm, dataset
        self.reward, self.served = reward, served
        ratios = [keep_ratio] if isinstance(keep_ratio, float | int) else keep_ratio
        self.ratios = [check_keep_ratio(ratio) for ratio in ratios]
        check_choices(budget, advantage, group)
        self.kind = action_kind(budget, law, pruner.serving.select)
        if budget == "free" and not reward.limits_tokens:
            raise UserError(
                "stage.budget=free keeps every token unless the reward charges for them: "
                "use reward=score_change, reward=flops_saved, or stage.budget=exact_k."
            )
        check_credit("stage", self.hparams, pruner.serving.select)
        self.credit_blocks = blocks_read(self.hparams, pruner.serving.select)
        self.epochs, self.scorer = 1, Scorer(lvlm, dataset, reward.needs, scorer)
        self.iteration, self.lagrange, self.samples_seen = 0, 0.0, 0
        self.begin_best()
        self.score: dict[str, float] = {}  # the last served one
        self.curves: dict[str, list[tuple[float, float]]] = {"sampled": [], "served": []}

    @classmethod
    def reads_answers(cls, reward: Any, settings: Settings) -> bool:
        return bool(reward.needs & LABELS)

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        check_groups(key, settings)
        check_credit(key, settings, plain["policy"].get("select", "dpp"))
        check_scorer(plain)

    @property
    def trained_to(self) -> float | None:
        """Largest keep ratio of the training; None where nothing holds the policy to one."""
        return None if self.hparams["budget"] == "free" else max(self.ratios)

    # --- data and optimizer -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        h = self.hparams
        self.pruner.train_only("net.", without=() if h["advantage"] == "gae" else "net.value_head")
        # by all that decides which prompts are scored together: rounding depends on it
        if self.cache is not None:
            drawn = {"seed": h["seed"], "prompts": h["prompts"], "ranks": distributed.count()}
            if self.scorer.reader is not self.lvlm:  # an engine rounds otherwise
                drawn["scorer"] = type(self.scorer.reader).__name__
            needs = sorted(self.reward.needs)
            self.scorer.remember(self.cache.folder("scores", needs=needs, targets="own", **drawn))

    def train_dataloader(self) -> DataLoader[Ready]:
        return prompt_loader(self.lvlm, self.dataset, self.hparams, self.iteration)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer, two groups: the value head has the critic's rate, everything else the
        actor's."""
        critic = [p for name, p in self.net.named_parameters() if name.startswith("value_head")]
        actor = [p for name, p in self.net.named_parameters() if not name.startswith("value_head")]
        h = self.hparams
        groups = [{"params": actor, "lr": h["lr_actor"]}, {"params": critic, "lr": h["lr_critic"]}]
        return torch.optim.Adam(groups, eps=1e-5)

    def rule(self) -> ActionRule:
        """The action distribution of this iteration."""
        first, last = self.hparams["temperature"]
        steps = max(1, self.hparams["iterations"] - 1)
        temperature = first + (last - first) * self.iteration / steps
        quality = self.pruner.serving.quality
        return ActionRule(self.kind, self.hparams["discount"], temperature, quality)

    # --- one iteration ----------------------------------------------------------------------------

    def training_step(self, batch: Ready, index: int) -> None:
        h, rule, samples = self.hparams, self.rule(), batch.samples
        if self.iteration == 0:
            self._validate()
        watch, before = Stopwatch(self.lvlm.device), self.scorer.evaluations
        # Encode: the vision tower runs once per question, for all of its episodes.
        encoded = batch.encode_in_parts(self.lvlm, self.pruner.extras)
        watch.lap("encode")
        # Sample: `group` episodes of each question, which follow each other.
        rows = [i for i in range(len(samples)) for _ in range(h["group"])]
        x = self.pruner.observe(encoded)
        # Every question draws one ratio, which its episodes share: they are compared.
        drawn = self.draw_ratios(samples)
        keep_ratio = drawn.repeat_interleave(h["group"])  # on the host, which counts with it
        rollout = self.sampled(samples, x, rule, keep_ratio)
        watch.lap("rollout")
        # Score: the LVLM reads what every state of the episodes keeps.
        outcome = measure_episodes(
            self.scorer, self.pruner, self.reward.needs, samples, encoded, rows, rollout
        )
        watch.lap("score")
        # [T B] rewards, less what a budget charges for tokens at the last step.
        terms = self.reward(outcome)
        measured = {f"reward/{name}": value for name, value in terms.items()}
        measured["ppo/value"] = rollout.value
        check_finite(measured, outcome.uids, f"iteration {self.iteration}", axis=1)
        reward = torch.stack(list(terms.values())).sum(0)
        kept = rollout.keep[-1].sum(1) / rollout.alive[0].sum(1)
        reward[-1] -= self._budget_penalty(kept, keep_ratio)
        # Learn: advantages, finer than the episode where credit is shared out, then clipped steps.
        advantage, target = self._advantage(reward, rollout)
        if self.credit_blocks:
            advantage = self._credit(advantage, reward, samples, encoded, rollout)
            watch.lap("credit")
        episodes = Episodes(x, rule, rollout, keep_ratio, advantage, target, outcome.uids)
        losses, epochs = self._update(episodes)
        watch.lap("update")
        self._log_speed(watch, self.scorer.evaluations - before)
        self.iteration += 1
        self.samples_seen += len(rows) * distributed.count()
        self._log(losses, terms, reward, outcome, kept, rollout, target, epochs)
        self._log_flops(samples, encoded, rollout)
        if self.iteration % h["validate_every"] == 0 or self.iteration == h["iterations"]:
            self._validate()
        # Lightning would repeat it until the next one, but not in a resumed run.
        self.log_dict({f"ppo/served/{name}": value for name, value in self.score.items()})
        self.log("ppo/served", self.score["accuracy"], prog_bar=True)

    def draw_ratios(self, samples: Sequence[Sample]) -> Float64[Tensor, " B"]:
        """The kept fraction of each question in this iteration."""
        return drawn_ratios(self.ratios, samples, self.hparams["seed"], self.iteration)

    def sampled(
        self,
        samples: Sequence[Sample],
        x: PolicyInput,
        rule: ActionRule,
        keep_ratio: Float[Tensor, " B"],
    ) -> Rollout:
        """The episodes of this iteration."""
        h, noise = self.hparams, self._noise([sample.uid for sample in samples], x, rule)
        return collect(self.net, x, rule, h["steps"], keep_ratio, noise, h["group"])

    def _noise(
        self, names: Sequence[str], x: PolicyInput, rule: ActionRule
    ) -> Float[Tensor, "T B N"]:
        """Uniforms of `group` episodes for each name, from (seed, iteration, name, episode)
        alone."""
        h, width = self.hparams, noise_width(rule, x.mask.shape[1])
        keys = []
        for name in names:
            keys += [f"{self.iteration}/{name}/{g}" for g in range(h["group"])]
        # [B T*N] -> [T B N]
        flat = uniforms(keys, h["seed"], h["steps"] * width)
        return flat.unflatten(1, (h["steps"], width)).transpose(0, 1).to(x.mask.device)

    def _budget_penalty(
        self, kept: Float[Tensor, " B"], keep_ratio: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """lagrange: multiplier * (kept fraction - keep_ratio), and a dual ascent step on the
        multiplier.

        A slow policy under a purely integrating multiplier is an undamped oscillator: on the toy
        model the kept fraction fell through its target to the single forced token and stayed there.
        A term proportional to the present excess damps it (Stooke et al. 2020, PID Lagrangian
        methods, section 4).
        """
        if self.hparams["budget"] != "lagrange":
            return torch.zeros_like(kept)
        # The mean over all ranks: they share one multiplier.
        excess = kept - keep_ratio.to(kept)
        mean = float(distributed.stacked(excess.mean()).mean())
        multiplier = self.lagrange + self.hparams["lagrange_gain"] * mean
        self.lagrange += self.hparams["lr_lagrange"] * mean
        return multiplier * excess

    def _advantage(
        self, reward: Float[Tensor, "T B"], rollout: Rollout
    ) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T B"] | None]:
        # Baselines of the group are of whole episodes: every step has the advantage of its return.
        if self.hparams["advantage"] == "rloo":
            alone = leave_one_out(reward.sum(0), self.hparams["group"])
            return normalize_over_ranks(alone).expand_as(reward), None
        if self.hparams["advantage"] == "grpo":
            return group_advantage(reward.sum(0), self.hparams["group"]).expand_as(reward), None
        advantage, target = gae(reward, rollout.value, self.hparams["gamma"], self.hparams["lam"])
        return normalize_over_ranks(advantage), target

    def _credit(
        self,
        advantage: Float[Tensor, "1 B"],
        reward: Float[Tensor, "1 B"],
        samples: Sequence[Sample],
        encoded: Encoded,
        rollout: Rollout,
    ) -> Float[Tensor, "1 B V"]:
        """The advantage of every draw: that of its episode, shared out in the best episode of each
        question."""
        count = self.credit_blocks
        best = credit.best_episodes(reward[0], self.hparams["group"])
        block = credit.blocks_of(rollout.action[0, best], count)
        # The best episode of each question once per block, without that block.
        action = credit.without_blocks(block, count, encoded.image_of).unsqueeze(0)
        less = rollout.rows(best.repeat_interleave(count))._replace(action=action)
        rows = [i for i in range(len(samples)) for _ in range(count)]
        outcome = measure_episodes(
            self.scorer, self.pruner, self.reward.needs, samples, encoded, rows, less
        )
        terms = self.reward(outcome)
        check_finite(terms, outcome.uids, f"credit of iteration {self.iteration}", axis=1)
        # [P M] returns without each block; the loss is what its absence costs.
        without = torch.stack(list(terms.values())).sum((0, 1)).unflatten(0, (-1, count))
        loss = reward[0, best].unsqueeze(1) - without
        # [B V] all draws of the other episodes keep the advantage of their episode.
        each = advantage[0].unsqueeze(1).repeat(1, rollout.alive.shape[2])
        each[best] = credit.shared_out(advantage[0, best], loss, block)
        return each.unsqueeze(0)

    # --- what is seen from outside ----------------------------------------------------------------

    def _validate(self) -> None:
        """Served score on validation; the best weights are kept."""
        self.score = self.served(self.served_pruner)
        self.curves["served"].append((float(self.samples_seen), self.score["accuracy"]))
        self.keep_if_best(merit(self.score))

    @property
    def served_pruner(self) -> Pruner:
        """What the policy is served as."""
        return self.pruner

    def on_fit_end(self) -> None:
        super().on_fit_end()
        # elsewhere a common offset of the logits means nothing
        if self.hparams["budget"] != "exact_k":
            held_out = (encoded for _, encoded in self.served.batches)
            self.pruner.calibrate(held_out, self.hparams["threshold_ratio"])

    @property
    def curves_of_report(self) -> dict[str, Points]:
        return {f"ppo, accuracy: {kind}": points for kind, points in self.curves.items()}
