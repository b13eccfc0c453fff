"""TPRL: the policy that is taught by demonstrations, improved by PPO, and prunes in one forward
pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tprl import cost
from tprl.budget import check_keep_ratio
from tprl.errors import UserError
from tprl.policy.networks import PolicyInput, PolicyNet, gist
from tprl.pruners.joined import SCORES, scores_of
from tprl.pruners.learned import LearnedPruner
from tprl.types import Encoded

# What keep logits may start from: weights of the scores that rules join.
PRIORS: dict[str, dict[str, float]] = {
    "none": {},
    "attention": {"cls": 1.0},
    "attention_words": {"cls": 1.0, "words": 0.5},
}


class TPRL(LearnedPruner):
    """The method of arXiv 2603.13394: a transformer over token codes and question words gives keep
    logits.

    Args:
        token_width, code_width, hidden, common: see `LearnedPruner`.
        width, layers, heads, max_steps, query, positions: see `PolicyNet`.
        prior: what keep logits start from. "none": nothing, all tokens alike. "attention" and
            "attention_words": the quality of the rules `attention_dpp` and `attention_words`, to
            which the network adds what it learns (nothing at first): an untrained policy chooses
            as they do, on the kernel of its codes. Needs what they read, so no engine serves it;
            the second costs the layers that listen, too.
        reads_prior: whether the network also reads the scores that the prior joins.
        budgets: kept fractions, ascending, between which the adaptive mode chooses; empty until
            stage=adapt taught it.

    Raises:
        UserError: `prior` is unknown, or `PolicyNet` refuses.
    """

    name = "tprl"
    learns_budgets = True
    net: PolicyNet

    def __init__(
        self,
        token_width: int,
        code_width: int = 64,
        hidden: int = 512,
        width: int = 128,
        layers: int = 2,
        heads: int = 8,
        max_steps: int = 3,
        query: str = "tokens",
        positions: bool = True,
        prior: str = "none",
        reads_prior: bool = False,
        budgets: Sequence[float] = (),
        **common: Any,
    ) -> None:
        if prior not in PRIORS:
            raise UserError(f"policy.prior must be one of {', '.join(PRIORS)}, got {prior}.")
        super().__init__(token_width, code_width, hidden, **common)
        self.config = {"token_width": token_width, "code_width": code_width, "hidden": hidden}
        # Both the network's arguments and what config.json rebuilds it from.
        net: dict[str, Any] = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "max_steps": max_steps,
            "query": query,
            "positions": positions,
        }
        self.config |= net | {"prior": prior, "reads_prior": reads_prior, "budgets": list(budgets)}
        self.prior, self.reads_prior = PRIORS[prior], reads_prior
        scores = len(self.prior) if reads_prior else 0
        read = code_width or token_width
        self.net = PolicyNet(read, token_width, **net, budgets=len(budgets), scores=scores)
        if self.prior:
            self.extras = frozenset(SCORES[score][0] for score in self.prior)
            # Zero logits leave the prior alone, until the first step has moved these weights.
            nn.init.zeros_(self.net.policy_head.out.weight)

    @property
    def reads_question(self) -> bool:
        """Whether its choice depends on the question."""
        return self.net.query != "none" or "words" in self.prior

    def observe(self, encoded: Encoded) -> PolicyInput:
        x = super().observe(encoded)
        if not self.prior:
            return x
        # [I W S] z-scores within each image. Quality is q = exp(logit) where `quality` is 2, so
        # their weighted sum is what the rule of that name compares.
        images = x.images
        scores = scores_of(self.prior, images, encoded).float()
        weights = scores.new_tensor(list(self.prior.values()))
        x = x._replace(prior=images.join(scores @ weights, x.mask))
        if not self.reads_prior:
            return x
        columns = [images.join(score, x.mask) for score in scores.unbind(-1)]
        return x._replace(scores=torch.stack(columns, -1))

    def learn_budgets(self, budgets: Sequence[float]) -> None:
        """A fresh budget head for these kept fractions."""
        # Ascending: `survey` takes the first and the last, and ties go to the smaller budget.
        self.config["budgets"] = sorted(check_keep_ratio(ratio) for ratio in budgets)
        self.net.add_budget_head(len(budgets))

    @torch.no_grad()
    def survey(self, x: PolicyInput) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B F"]]:
        """Logits for every budget of the adaptive mode, and what the budget head reads: one pass
        for both, at the geometric middle of the budgets."""
        low, *_, high = self.config["budgets"]
        middle = math.sqrt(low * high)
        # [B] float64, as every ratio, so that no budget rounds otherwise.
        ratio = torch.full((len(x.mask),), middle, dtype=torch.float64, device=x.mask.device)
        # Step 0: the adaptive mode serves in one step, whatever the policy was trained with.
        read = self.net.read(x, x.mask, 0, ratio)
        return self.net.keep_logits(read, x, x.mask), gist(read)

    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        return {"policy": cost.policy_flops(cost.PolicyShape.from_net(self.net), tokens, words)}
