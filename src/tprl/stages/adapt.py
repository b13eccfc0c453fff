"""Stage `adapt`: a trained policy learns how many tokens a question needs, so that easy ones can do
with fewer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tprl.budget import check_keep_ratio
from tprl.data.base import BaseDataset
from tprl.data.taking import batches, nothing_left
from tprl.errors import UserError
from tprl.kinds import typed
from tprl.pruners.adaptive import choose
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.tprl import TPRL
from tprl.runtime import distributed
from tprl.scoring.ahead import Ready, ahead, in_parts, questions_at_once
from tprl.scoring.scorer import LIKELIHOOD, Scorer
from tprl.scoring.validation import ServedScore
from tprl.splice import splice
from tprl.stages.base import Next, RowStage, Settings, Unread
from tprl.types import LVLM, TokenSelection

AT_ONCE = 100  # questions that are encoded together, where memory holds as many
BISECTIONS = 40
HELD_OUT = 10  # the last one in that many questions is not trained on


class Adapt(RowStage):
    """Regresses the probability of the reference answer (geometric mean over its tokens) at each
    budget.

    The policy itself is frozen: training questions are pruned at every budget as they will be when
    served, the LVLM scores the answers, and a small head on the encoder's output learns to forecast
    the scores (cross-entropy with probabilities as targets). Then the price of a token is
    calibrated on validation questions: see `Adaptive`.

    Args:
        pruner: the trained policy.
        lvlm, dataset: the frozen model and the training split.
        served: the validation questions on which prices are calibrated.
        questions: training questions to score, each once per budget.
        budgets: kept fractions to choose from.
        keep_ratios: mean kept fractions to calibrate prices for.
        epochs, batch_size, lr, weight_decay: AdamW.
        seed: order of the questions.

    Raises:
        UserError: the policy is no transformer, budgets that are fewer than two, repeated or
            outside (0, 1], or a mean that they cannot reach.
    """

    rows = "questions"
    continues = True
    keeps_serving = True
    curve_titles: ClassVar = {"adapt/loss": "adapt, divergence in nats: training"}
    held_out_titles: ClassVar = {"adapt/val_loss": "adapt, divergence in nats: held out"}
    unread = (
        Unread(
            "served.keep_ratios",
            lambda s: True,
            "prices are found on validation questions, and nothing is served",
        ),
    )
    next = Next("eval", "run", words=("pruners=[random,divprune]",))

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: BaseDataset,
        served: ServedScore,
        questions: int,
        budgets: Sequence[float],
        keep_ratios: Sequence[float],
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset", "served"])
        if not isinstance(pruner, TPRL):
            raise UserError(
                f"pruner {pruner.name} has no network for stage=adapt: use policy=transformer."
            )
        if len(set(budgets)) < max(2, len(budgets)):
            raise UserError(
                f"stage.budgets={list(budgets)} leaves nothing "
                "to choose: name two or more kept fractions."
            )
        for ratio in keep_ratios:
            if not min(budgets) < check_keep_ratio(ratio) < max(budgets):
                raise UserError(
                    f"stage.keep_ratios={list(keep_ratios)} must lie between the budgets, got "
                    f"{ratio}; give numbers between {min(budgets):.4g} and {max(budgets):.4g}."
                )
        self.pruner, self.lvlm, self.dataset = pruner, lvlm, dataset
        self.served, self.epochs = served, epochs
        self.samples_seen = 0
        pruner.learn_budgets(budgets)

    @classmethod
    def applies_to(cls, pruner: LearnedPruner | type[LearnedPruner]) -> bool:
        return pruner.learns_budgets

    @classmethod
    def reads_answers(cls, reward: Any, settings: Settings) -> bool:
        return True

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        """Mean kept fractions lie between the budgets that they are means of."""
        budgets = settings["budgets"]
        for ratio in settings["keep_ratios"]:
            if not min(budgets) < ratio < max(budgets):
                raise UserError(
                    f"{key}.keep_ratios={typed(ratio)} is not a mean of "
                    f"{key}.budgets={typed(budgets)}: give a number "
                    f"between {min(budgets)} and {max(budgets)}."
                )

    @property
    def result(self) -> float | None:
        """Minus the divergence on questions that are held out."""
        return -float(self.trainer.callback_metrics["adapt/val_loss"])

    def setup(self, stage: str) -> None:
        self.pruner.train_only("net.budget_head.")
        gist, chance = self._score()
        # neighbors show the same image: held out together
        trained = len(gist) - max(1, len(gist) // HELD_OUT)
        self.train_data = TensorDataset(gist[:trained], chance[:trained])
        self.held_out = TensorDataset(gist[trained:], chance[trained:])

    @torch.no_grad()
    def _score(self) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N K"]]:
        """What the head will read of each training question, and what it is to forecast."""
        scorer = Scorer(self.lvlm, self.dataset, LIKELIHOOD)

        def work(batch: Ready) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B K"]]:
            # One pass of the network serves all budgets, as in the adaptive mode.
            encoded = batch.encode(self.lvlm, self.pruner.extras)
            x = self.pruner.observe(encoded)
            logits, gist = self.pruner.survey(x)
            answers = scorer.targets(batch.samples, encoded)
            # [B K] probability of the answer, pruned at every budget as it will be when served.
            scores = []
            for ratio in self.pruner.config["budgets"]:
                keep = self.pruner.serve(x, logits, ratio, encoded.uids)
                prompt = splice(encoded, TokenSelection(keep))
                scores.append(self.lvlm.score(prompt, answers)[0].exp())
            return gist.cpu(), torch.stack(scores, 1).cpu()

        size = questions_at_once(self.lvlm, self.dataset, AT_ONCE)
        gists, chances = [], []
        stream = batches(self.dataset, self.hparams["questions"], size)
        for batch in ahead(self.lvlm, map(Ready, stream)):
            for gist, chance in in_parts(work, batch, self.lvlm.name):
                gists.append(gist)
                chances.append(chance)
        # One question is held out, so one alone leaves nothing to train on.
        count = sum(map(len, gists))
        if not count:
            asked = min(self.hparams["questions"] or len(self.dataset), len(self.dataset))
            raise nothing_left(self.dataset, asked, "to learn budgets from")
        if count < 2:
            raise UserError(
                "stage=adapt holds a question out and needs "
                "2 or more, not 1: raise stage.questions."
            )
        return torch.cat(gists), torch.cat(chances)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(self.hparams["seed"])
        sampler = RandomSampler(self.train_data, generator=order)
        batches = BatchSampler(sampler, self.hparams["batch_size"], drop_last=False)
        return DataLoader(
            self.train_data, batch_sampler=distributed.Shares(batches), generator=order
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, 8192)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        h = self.hparams
        return torch.optim.AdamW(
            self.pruner.net.parameters(), lr=h["lr"], weight_decay=h["weight_decay"]
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.counted("adapt/loss", self._loss(batch), index, len(self.train_data))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("adapt/val_loss", self._loss(batch), batch_size=len(batch[0]), prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))

    def _loss(self, batch: list[Tensor]) -> Float[Tensor, ""]:
        """Divergence of the forecast from the scores: cross-entropy less its lowest value."""
        forecast = self.pruner.net.budget_logits(batch[0])
        # exp of a log-probability of 0 may round to a little more than 1.
        chance = batch[1].clamp(0, 1)
        lowest = F.binary_cross_entropy(chance, chance)  # the entropy of the scores
        return F.binary_cross_entropy_with_logits(forecast, chance) - lowest

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Find the price of every mean ratio, on validation questions; the LVLM is not asked."""
        forecasts = []
        for _, encoded in self.served.batches:
            _, gist = self.pruner.survey(self.pruner.observe(encoded))
            forecasts.append(self.pruner.net.budget_logits(gist).sigmoid())
        # Forecasts of all ranks: every rank must serve at the same prices.
        chance = distributed.gathered_rows(torch.cat(forecasts))
        budgets = self.pruner.config["budgets"]
        prices = calibrated_prices(chance, budgets, self.hparams["keep_ratios"])
        self.pruner.serving = replace(self.pruner.serving, prices=prices)


def calibrated_prices(
    chance: Float[Tensor, "N K"], budgets: Sequence[float], keep_ratios: Sequence[float]
) -> list[tuple[float, float]]:
    """(mean kept fraction, price) of N questions for each wanted mean, by bisection: the mean falls
    with the price.

    The mean is the wanted one; where the forecasts gain nothing from as many tokens, it is what
    they buy for nothing.
    """
    kept = chance.new_tensor(budgets)

    def mean(price: float) -> float:
        return float(kept[choose(chance, kept, price)].mean())

    # What questions keep when tokens cost nothing: no mean above it can be reached.
    free = mean(0.0)
    pairs = {}
    for ratio in keep_ratios:
        # A forecast gains 1 at most: above 1 / (smallest step between budgets) nothing is bought.
        low = high = 0.0
        if free > ratio:
            high = 1 / float(kept.diff().min())
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            low, high = (price, high) if mean(price) > ratio else (low, price)
        pairs[min(ratio, free)] = high
    return sorted(pairs.items())
