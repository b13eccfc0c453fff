"""Stage `turns`: PPO of a policy that answers several questions about an image from a shared core
and a focus of each (`pruners.core_focus`)."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.utils.data import DataLoader

from tprl.data.base import BaseDataset
from tprl.data.taking import nothing_left, take
from tprl.errors import UserError
from tprl.evaluation.statistics import image_key
from tprl.policy.action import ActionRule
from tprl.policy.networks import PolicyInput
from tprl.pruners.core_focus import CORE, CoreFocus
from tprl.pruners.learned import LearnedPruner
from tprl.rl.core_focus import collect_turns, evaluate_turns
from tprl.rl.gae import leave_one_out
from tprl.rl.rollout import Rollout
from tprl.runtime import distributed
from tprl.scoring.ahead import Ready
from tprl.stages.base import Next, Settings
from tprl.stages.ppo import PPO
from tprl.stages.prompts import PreparedPrompts, PromptStream, drawn_ratios
from tprl.stages.rollout_log import normalize_over_ranks
from tprl.types import Sample

# What an episode of core and focus is made of; anything else is another algorithm.
FIXED = {
    "budget": "exact_k",
    "law": "sequential",
    "steps": 1,
    "advantage": "rloo",
    "ratio": "token",
    "credit_blocks": 0,
}


class Turns(PPO):
    """PPO on the mean reward over the questions about an image.

    The policy draws one core for all `questions` of an image without reading them, and for
    each question a focus given that core. Draws of the core have the advantage of the mean reward
    over the questions, draws of a focus that of their own question, both against the other
    episodes of the group. What is served is `CoreFocus` of the policy with itself, and the
    pruner's `trained_on` says so.

    Args:
        pruner: a policy that reads the question and serves by a DPP.
        questions: asked about each image.
        share: of the budget that is core.
        core_first: whether the core stands at the front of its image (see `CoreFocus`).
        options: those of `PPO`; budget, law, steps, advantage, ratio and credit_blocks are
            exact_k, sequential, 1, rloo, token and 0.

    Raises:
        UserError: other settings, a policy that does not read the question, or questions that do
            not follow each other by image.
    """

    next = Next("eval", "run", words=("mode=turns", "pruners=[attention_dpp,word_attention]"))
    core: Tensor | None = None  # of the episodes of this iteration

    def __init__(
        self,
        pruner: LearnedPruner,
        questions: int,
        share: float,
        core_first: bool,
        **options: Any,
    ) -> None:
        super().__init__(pruner, **options)
        # Kept beside PPO's, so that `check` sees all of them.
        shared = {"questions": questions, "share": share, "core_first": core_first}
        self.save_hyperparameters(shared)
        self.check("stage", self.hparams, {"policy": {"select": pruner.serving.select}})
        if not pruner.reads_question:
            raise UserError(
                "stage=turns teaches a focus that the question chooses, and this policy does not "
                "read it: use policy=transformer policy.query=tokens."
            )
        self.view = CoreFocus(pruner, pruner, share, core_first)

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        for name, value in FIXED.items():
            if settings.get(name, value) != value:
                raise UserError(
                    f"{key}.{name} must be {value} where a core is shared, got {settings[name]}."
                )
        if plain["policy"].get("select", "dpp") != "dpp":
            raise UserError(
                f"stage=turns draws the focus beside the core by the gains of a DPP: use "
                f"policy.select=dpp, got {plain['policy']['select']}."
            )
        # The core's baseline compares whole conversations: none may be cut by the batch's end.
        prompts, turns = settings["prompts"], settings["questions"]
        if prompts % turns:
            raise UserError(
                f"{key}.prompts={prompts} are not whole images of {key}.questions={turns} each: "
                f"use a multiple, e.g. {key}.prompts={turns * max(1, prompts // turns)}."
            )
        super().check(key, settings, plain)

    def train_dataloader(self) -> DataLoader[Ready]:
        h = self.hparams
        stream = ImageStream(
            self.dataset, h["questions"], h["prompts"], self.iteration, h["iterations"], h["seed"]
        )
        return PreparedPrompts(self.lvlm, stream).loader()

    def draw_ratios(self, samples: Sequence[Sample]) -> Float64[Tensor, " B"]:
        # One ratio per image, since its questions share a core.
        images = [sample._replace(uid=image_key(sample.uid)) for sample in samples]
        return drawn_ratios(self.ratios, images, self.hparams["seed"], self.iteration)

    def sampled(
        self,
        samples: Sequence[Sample],
        x: PolicyInput,
        rule: ActionRule,
        keep_ratio: Float[Tensor, " B"],
    ) -> Rollout:
        h = self.hparams
        # The core's noise is the image's alone: no question decides over it.
        images = [f"{image_key(sample.uid)}/core" for sample in samples[:: h["questions"]]]
        core_noise = self._noise(images, x, rule)[0]
        # That of a focus is its question's: two questions about an image draw independently.
        noise = self._noise([sample.uid for sample in samples], x, rule)[0]
        share, group = self.view.core_share, h["group"]
        how = (share, keep_ratio, core_noise, noise, group, h["questions"])
        rollout = collect_turns(self.net, x, rule, *how)
        # Whose advantage is the mean's, also where the core stands in raster order.
        self.core = rollout.core
        return rollout if self.view.core_first else rollout._replace(core=None)

    def evaluated(
        self, x: PolicyInput, rule: ActionRule, rollout: Rollout, keep_ratio: Tensor, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        share, group = self.view.core_share, self.hparams["group"]
        return evaluate_turns(self.net, x, rule, rollout, keep_ratio, share, group)

    def _advantage(
        self, reward: Float[Tensor, "T B"], rollout: Rollout
    ) -> tuple[Float[Tensor, "T B V"], None]:
        h = self.hparams
        group, turns = h["group"], h["questions"]
        # [B] each focus against the other episodes of its question.
        focus = normalize_over_ranks(leave_one_out(reward[0], group))
        # [P T G] rewards to [P G] means over the questions, for which the core is answerable.
        mean = reward[0].view(-1, turns, group).mean(1)
        core = normalize_over_ranks(leave_one_out(mean.flatten(), group)).view(-1, 1, group)
        core = core.expand(-1, turns, -1).flatten()
        # [B V] a draw has the advantage of the part that it belongs to.
        assert self.core is not None
        each = torch.where(self.core[0], core.unsqueeze(1), focus.unsqueeze(1))
        return each.unsqueeze(0), None

    @property
    def served_pruner(self) -> Any:
        return self.view

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.pruner.trained_on[CORE] = {
            "share": self.view.core_share,
            "core_first": self.view.core_first,
        }


class ImageStream(PromptStream):
    """Batches of images with `turns` questions each, which follow each other: as `PromptStream`,
    of images.

    Raises:
        UserError: the dataset does not say how many questions follow each other about an image,
            they are fewer than `turns`, or the ranks' shares would differ.
    """

    def __init__(
        self, dataset: BaseDataset, turns: int, prompts: int, start: int, stop: int, seed: int = 0
    ) -> None:
        # Questions about an image are found by arithmetic, not by reading all rows.
        per_image = dataset.questions_per_image
        if per_image < turns:
            rounds = (
                " or dataset.rounds above it"
                if dataset.rounds
                else ": use dataset=scenes or dataset=crowd"
            )
            raise UserError(
                f"stage.questions={turns} asks more questions about an image than the {per_image} "
                f"that follow each other in {dataset.name}: use "
                f"stage.questions={per_image}{rounds}."
            )
        super().__init__(dataset, prompts // turns, start, stop, seed)
        self.turns, self.per_image = turns, per_image

    def __iter__(self) -> Iterator[list[Sample]]:
        images = len(self.dataset) // self.per_image
        passes: tuple[int, Tensor] = (-1, torch.empty(0))
        for iteration in range(self.start, self.stop):
            samples: list[Sample] = []
            for slot in distributed.share(range(self.prompts)):
                # Each pass over the images has its own permutation.
                number, at = divmod(iteration * self.prompts + slot, images)
                if passes[0] != number:
                    order = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                    passes = (number, torch.randperm(images, generator=order))
                samples += self._questions(int(passes[1][at]), iteration)
            yield samples

    def _questions(self, image: int, iteration: int) -> list[Sample]:
        """`turns` of the questions about an image, other ones in every pass."""
        # From (seed, iteration, image) alone, as ratios are: a resumed run asks the same.
        draw = random.Random(f"{self.seed}/{iteration}/{image}")
        slots = draw.sample(range(self.per_image), self.turns)
        samples = take(self.dataset, [image * self.per_image + slot for slot in slots])
        # A conversation that lacks a turn would shift all groups behind it.
        if len(samples) < self.turns:
            raise nothing_left(self.dataset, self.turns, "to train on")
        return samples
