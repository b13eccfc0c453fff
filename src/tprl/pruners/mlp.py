"""The plain learned baseline: a per-token MLP without question, neighbors or positions."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tprl import cost
from tprl.policy.networks import PolicyInput
from tprl.pruners.learned import LearnedPruner


class TokenMLP(nn.Module):
    """code -> hidden -> hidden -> logit, token by token; the value is always 0 (it is not for
    RL)."""

    def __init__(self, code_width: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(code_width),
            nn.Linear(code_width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.out = nn.Linear(width, 1)

    def forward(
        self, x: PolicyInput, alive: Bool[Tensor, "B V"], step: int, keep_ratio: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
        logits = self.out(self.layers(x.codes)).squeeze(-1).masked_fill(~alive, 0.0)
        return logits, logits.new_zeros(len(logits))


class MLPPruner(LearnedPruner):
    """What demonstrations alone teach a scorer that sees one token at a time; top-k serves it.

    Args:
        token_width, code_width, hidden, common: see `LearnedPruner`.
        width: of the MLP.
    """

    name = "mlp"
    reads_question = False

    def __init__(
        self,
        token_width: int,
        code_width: int = 64,
        hidden: int = 512,
        width: int = 128,
        select: str = "topk",
        **common: Any,
    ) -> None:
        super().__init__(token_width, code_width, hidden, select=select, **common)
        self.config = {
            "token_width": token_width,
            "code_width": code_width,
            "hidden": hidden,
            "width": width,
        }
        self.net = TokenMLP(code_width or token_width, width)

    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        c = self.config
        widths = (c["code_width"] or c["token_width"], c["width"], c["width"], 1)
        return {"mlp": cost.mlp_flops(widths, tokens)}
