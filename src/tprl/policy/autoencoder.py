"""Token-wise autoencoder: compact codes that make the policy's input small and demonstrations
storable."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tprl.errors import UserError

AT_ONCE = 1 << 14  # tokens of which a copy in double precision is made


class Autoencoder(nn.Module):
    """in_width -> hidden -> LayerNorm, GELU -> code_width, and mirrored back. Codes feed the policy
    only.

    Inputs are standardized per feature by stored statistics, because projected tokens have a few
    features of huge variance that would own a plain MSE. `relative_mse` is therefore the fraction
    of variance that is lost: 1 for a decoder that always answers the mean.

    Args:
        in_width: width of the tokens (projected, or of the vision tower).
        code_width: Z, width of the codes.
        hidden: width of the hidden layers.
    """

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    def __init__(self, in_width: int, code_width: int = 64, hidden: int = 512) -> None:
        super().__init__()
        self.in_width, self.code_width = in_width, code_width
        # Buffers, because statistics belong to the weights: checkpoints must hold them.
        self.register_buffer("mean", torch.zeros(in_width))
        self.register_buffer("std", torch.ones(in_width))
        self.encoder = _mlp(in_width, hidden, code_width)
        self.decoder = _mlp(code_width, hidden, in_width)

    def fit_statistics(self, tokens: Float[Tensor, "*N D"]) -> None:
        """Store each feature's mean and standard deviation over all leading axes; constant features
        get std 1.

        Raises:
            UserError: fewer than two tokens.
        """
        flat = tokens.detach().reshape(-1, self.in_width)
        if len(flat) < 2:
            raise UserError(
                "the autoencoder's statistics need at least 2 "
                f"tokens, not {len(flat)}: give it more data."
            )
        # Some tokens at a time: a copy of all in double precision would be four times as large as
        # they are.
        parts = flat.split(AT_ONCE)
        total = torch.zeros(self.in_width, dtype=torch.float64, device=flat.device)
        squares = torch.zeros_like(total)
        for part in parts:
            total += part.double().sum(0)
        mean = total / len(flat)
        for part in parts:
            squares += (part.double() - mean).square().sum(0)
        std = (squares / (len(flat) - 1)).sqrt()
        # Constant features get std 1, or standardizing them would divide by zero.
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def encode(self, tokens: Float[Tensor, "*N D"]) -> Float[Tensor, "*N Z"]:
        """Codes of raw tokens."""
        return self.encoder(self._standardize(tokens))

    def decode(self, codes: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N D"]:
        """Tokens in their original scale."""
        return self.decoder(codes) * self.std + self.mean

    def forward(self, tokens: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Reconstruction in the original scale."""
        return self.decode(self.encode(tokens))

    def relative_mse(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        """Mean squared error of the standardized features: the training loss. Pass valid tokens
        only."""
        target = self._standardize(tokens)
        return cast(Tensor, (self.decoder(self.encoder(target)) - target).square().mean())

    def _standardize(self, tokens: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        return (tokens.to(self.mean.dtype) - self.mean) / self.std


def _mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, n_out)
    )
