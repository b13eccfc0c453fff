"""The adaptive mode of a trained policy: easy questions keep fewer tokens than hard ones, at a
given mean."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl import cost
from tprl.budget import need_ratio
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.pruners.learned import load_pruner
from tprl.pruners.tprl import TPRL
from tprl.types import Encoded, TokenSelection


class Adaptive(BasePruner):
    """Chooses each question's budget, then keeps what the policy keeps at that budget.

    The budget head forecasts P_k, the probability of the right answer with fraction k kept. A
    question gets argmax_k P_k - price * k: tokens are bought while they raise the forecast by more
    than they cost. The price at which questions keep a given fraction *on average* is calibrated on
    validation questions. (Lagrangian relaxation of one budget for all questions together: Everett
    1963.)

    Args:
        pruner: a policy that went through stage=adapt.
        fixed_price: serves every question at this price, and decides alone how many tokens live;
            None: at the price of the keep_ratio that is asked for.

    Raises:
        UserError: it did not.
    """

    def __init__(self, pruner: TPRL, fixed_price: float | None = None) -> None:
        # Prices are what stage=adapt calibrates: without them the head is untrained.
        if not pruner.serving.prices:
            raise UserError(
                f"pruner {pruner.name} has learned no budgets: "
                "run stage=adapt stage.init_from=<its run>."
            )
        self.pruner, self.fixed_price = pruner, fixed_price
        self.name = f"{pruner.name}_adaptive"
        self.extras = pruner.extras
        self.trained_on = pruner.trained_on
        self.reads_question = pruner.reads_question

    @property
    def learned(self) -> TPRL:
        return self.pruner

    def price(self, keep_ratio: float) -> float:
        """Answer probability that the whole image must be worth for the mean kept fraction to be
        `keep_ratio`.

        Raises:
            UserError: outside the calibrated range.
        """
        # Ratios ascend, as interpolation needs.
        ratios, prices = np.array(self.pruner.serving.prices).T
        if not self.reaches(keep_ratio):
            raise UserError(
                f"{self.name} is calibrated for mean keep ratios from "
                f"{ratios[0]:.3g} to {ratios[-1]:.3g}, not {keep_ratio:.3g}: "
                "name it in stage.keep_ratios of stage=adapt."
            )
        # Prices fall about geometrically with the mean; one may be 0, and its logarithm is bounded.
        log_prices = np.log(np.maximum(prices, 1e-6))
        log_price = np.interp(np.log(keep_ratio), np.log(ratios), log_prices)
        return float(np.exp(log_price))

    @property
    def decides_alone(self) -> bool:
        """Whether it has a price of its own."""
        return self.fixed_price is not None

    def reaches(self, keep_ratio: float) -> bool:
        """Whether that mean is within the calibrated range (to a thousandth, for ratios written
        with 4 digits)."""
        ratios = [ratio for ratio, _ in self.pruner.serving.prices]
        return ratios[0] * 0.999 <= keep_ratio <= ratios[-1] * 1.001

    @torch.no_grad()
    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep the fraction `keep_ratio` on average over questions like those of the calibration;
        with None what questions buy at `fixed_price`.

        Raises:
            UserError: wrong width, or a mean that is not calibrated.
        """
        # A ratio decides over the fixed price; without both there is nothing to choose by.
        price = self.fixed_price
        if price is None or keep_ratio is not None:
            price = self.price(need_ratio(self.name, keep_ratio))
        # One pass gives logits for the tokens and [B .] a summary for the budget head.
        x = self.pruner.observe(encoded)
        logits, gist = self.pruner.survey(x)
        # [B K] forecasts, and the budget that each question buys at this price.
        forecast = self.pruner.net.budget_logits(gist).sigmoid()
        choice = choose(forecast, gist.new_tensor(self.budgets), price)
        # Questions of one budget are served together; one pass has given the logits for all.
        keep = torch.zeros_like(x.mask)
        for number, ratio in enumerate(self.budgets):
            rows = (choice == number).nonzero().squeeze(1)
            if len(rows):
                uids = [encoded.uids[row] for row in rows.tolist()]
                keep[rows] = self.pruner.serve(x.rows(rows), logits[rows], ratio, uids)
        return TokenSelection(keep)

    @property
    def budgets(self) -> list[float]:
        """Kept fractions that a question chooses from, ascending."""
        return self.pruner.config["budgets"]

    @torch.no_grad()
    def forecasts(self, encoded: Encoded) -> Float[Tensor, "B K"]:
        """The forecast score of each question at each budget."""
        _, gist = self.pruner.survey(self.pruner.observe(encoded))
        return self.pruner.net.budget_logits(gist).sigmoid()

    @torch.no_grad()
    def at_budget(self, encoded: Encoded, budget: float) -> TokenSelection:
        """What `select` keeps of questions that choose this budget."""
        x = self.pruner.observe(encoded)
        return TokenSelection(self.pruner.serve(x, self.pruner.survey(x)[0], budget, encoded.uids))

    def flops_by_part(self, tokens: int, words: int, kept: int) -> dict[str, int]:
        """What choosing costs on one sample: as for the policy, and the budget head."""
        width = self.pruner.config["width"]
        # The head reads a summary twice as wide as the policy, once per question.
        head = cost.mlp_flops((2 * width, width, len(self.pruner.config["budgets"])), 1)
        return {**self.pruner.flops_by_part(tokens, words, kept), "budget": head}


def choose(
    chance: Float[Tensor, "B K"], budgets: Float[Tensor, " K"], price: float
) -> Int[Tensor, " B"]:
    """argmax_k chance_k - price * budget_k; ties go to the smaller budget (budgets ascend)."""
    return (chance - price * budgets).argmax(1)


def load_adaptive(pretrained: str | Path) -> Adaptive:
    """The adaptive mode of a trained pruner: a folder, a run directory, or one that ships.

    Raises:
        UserError: nothing there, or it has learned no budgets.
    """
    pruner = load_pruner(pretrained)
    if not isinstance(pruner, TPRL):
        raise UserError(
            f"pruner {pruner.name} has no budget head: use "
            "a run of stage=adapt with policy=transformer."
        )
    return Adaptive(pruner)
