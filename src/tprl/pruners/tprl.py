"""TPRL: the policy that is taught by demonstrations, improved by PPO, and prunes in one forward pass."""

from typing import Any

from tprl import cost
from tprl.policy.networks import PolicyNet
from tprl.pruners.learned import LearnedPruner


class TPRL(LearnedPruner):
    """The method of arXiv 2603.13394: a transformer over token codes and question words gives keep logits.

    Args:
        token_width, code_width, hidden, select, tau, quality, trained_on: see `LearnedPruner`.
        width, layers, heads, max_steps, query, positions: see `PolicyNet`.
    """

    name = "tprl"

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
        select: str = "dpp",
        tau: float | None = None,
        quality: float = 2.0,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(token_width, code_width, hidden, select, tau, quality, trained_on)
        self.config = {"token_width": token_width, "code_width": code_width, "hidden": hidden}
        net = {"width": width, "layers": layers, "heads": heads, "max_steps": max_steps}
        self.config |= net | {"query": query, "positions": positions}
        self.net = PolicyNet(code_width or token_width, token_width, **net, query=query, positions=positions)

    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        return {"policy": cost.policy_flops(cost.PolicyShape.from_net(self.net), tokens, words)}
