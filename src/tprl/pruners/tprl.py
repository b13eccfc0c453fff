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
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.quality import log_attention, standardize
from tprl.types import Encoded

ATTENTION = "cls_attention"


class TPRL(LearnedPruner):
    """The method of arXiv 2603.13394: a transformer over token codes and question words gives keep
    logits.

    Args:
        token_width, code_width, hidden, common: see `LearnedPruner`.
        width, layers, heads, max_steps, query, positions: see `PolicyNet`.
        prior: what keep logits start from. "none": nothing, all tokens alike. "attention": the
            z-score of log CLS attention within the image, to which the network adds what it learns
            (nothing at first): an untrained policy chooses as `attention_dpp` does, on the kernel
            of its codes. Needs extras["cls_attention"], so no engine serves it.
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
        budgets: Sequence[float] = (),
        **common: Any,
    ) -> None:
        if prior not in ("none", "attention"):
            raise UserError(f"policy.prior must be none or attention, got {prior}.")
        super().__init__(token_width, code_width, hidden, **common)
        self.config = {"token_width": token_width, "code_width": code_width, "hidden": hidden}
        net: dict[str, Any] = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "max_steps": max_steps,
            "query": query,
            "positions": positions,
        }
        self.config |= net | {"prior": prior, "budgets": list(budgets)}
        self.net = PolicyNet(code_width or token_width, token_width, **net, budgets=len(budgets))
        if prior == "attention":
            self.extras = frozenset({ATTENTION})
            nn.init.zeros_(self.net.policy_head.out.weight)

    @property
    def reads_question(self) -> bool:
        """Whether its choice depends on the question."""
        return self.net.query != "none"

    def observe(self, encoded: Encoded) -> PolicyInput:
        x = super().observe(encoded)
        if ATTENTION not in self.extras:
            return x
        # Quality is q = exp(logit) where `quality` is 2, so this is what attention_dpp compares.
        images = x.images
        attention = log_attention(images.split(encoded.extras[ATTENTION]))
        prior = standardize(attention, images.mask).float()
        return x._replace(prior=images.join(prior, x.mask))

    def learn_budgets(self, budgets: Sequence[float]) -> None:
        """A fresh budget head for these kept fractions."""
        self.config["budgets"] = sorted(check_keep_ratio(ratio) for ratio in budgets)
        self.net.add_budget_head(len(budgets))

    @torch.no_grad()
    def survey(self, x: PolicyInput) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B F"]]:
        """Logits for every budget of the adaptive mode, and what the budget head reads: one pass
        for both, at the geometric middle of the budgets."""
        low, *_, high = self.config["budgets"]
        middle = math.sqrt(low * high)
        ratio = torch.full((len(x.mask),), middle, dtype=torch.float64, device=x.mask.device)
        read = self.net.read(x, x.mask, 0, ratio)
        return self.net.keep_logits(read, x, x.mask), gist(read)

    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        return {"policy": cost.policy_flops(cost.PolicyShape.from_net(self.net), tokens, words)}
