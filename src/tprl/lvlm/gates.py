"""Gates on visual tokens: how much the language model attends to each, and what a graph of that
holds."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tprl.cost import LMShape
from tprl.types import Encoded

CLOSED = 1e-6  # the least gate: its logarithm is finite, and attention to it nothing
# Numbers of 4 bytes that a layer's graph holds per token, weights being frozen: so many hidden
# states (norms are computed in float32), and so many of the MLP's width. 12.0 and 3.0 of Llama.
HIDDEN_STATES, MLP_STATES = 14, 4
BYTES = 4
PADDING = -1e4  # in place of the log gate of a key that nothing sees


class Gates(NamedTuple):
    """What layers of attention are given instead of a causal mask."""

    log_gate: Float[Tensor, "B S1"]  # of every key: 0 on text and on the answer
    real: Bool[Tensor, "B S1"]  # False on padding
    # later keys that a query sees all the same; None: it sees none
    ahead: Bool[Tensor, "B S1 S1"] | None = None

    def seen(self) -> Bool[Tensor, "B 1 S1 S1"]:
        """Whether a query may see a key."""
        size = self.real.shape[1]
        eye = torch.eye(size, dtype=torch.bool, device=self.real.device)
        # padding sees itself, never nothing
        seen = (self.real.unsqueeze(1) & eye.new_ones(size, size).tril()) | eye
        return (seen if self.ahead is None else seen | self.ahead).unsqueeze(1)

    def bias(self) -> Float[Tensor, "B 1 S1 S1"]:
        """What is added to the logits of attention."""
        least = torch.finfo(self.log_gate.dtype).min
        return self.log_gate[:, None, None].masked_fill(~self.seen(), least)


def gates_of(
    encoded: Encoded,
    gate: Float[Tensor, "B V"],
    answer: Bool[Tensor, "B A"],
    ahead: Bool[Tensor, "B S1 S1"] | None = None,
) -> Gates:
    """Visual token j weighs gate j (above 1e-6) in prompts and the answers after them, of which
    `answer` tokens are real."""
    column = gate.new_zeros(len(answer), encoded.embeds.shape[1] + answer.shape[1])
    row, token = encoded.visual_mask.nonzero(as_tuple=True)
    column = column.index_put(
        (row, encoded.visual_at[row, token]), gate[row, token].clamp(min=CLOSED).log()
    )
    real = torch.cat([encoded.attention, answer], 1)
    return Gates(column.to(encoded.embeds.dtype), real, ahead)


class FoldedGates(TorchFunctionMode):
    """While it is entered, attention adds the gates as one more dimension of queries and keys.

    With q' = [q, 1] and k' = [k, log gate / scale], scale q' k' is scale q k + log gate. PyTorch's
    fast kernel for CPUs differentiates keys and not masks: with the gates in its mask, attention
    would write out every query times every key, forth and back.
    """

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        # Padding is so far below that nothing but padding sees it; the kernel is then causal by
        # itself, and computes no later key.
        self.column = gates.log_gate.masked_fill(~gates.real, PADDING)
        self.mask = None if gates.ahead is None else gates.seen()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        scale = how.get("scale") or query.shape[-1] ** -0.5
        # [B heads S1 1], of each key
        column = (self.column / scale)[:, None, :, None].expand(*key.shape[:3], 1)
        masks = {"attn_mask": self.mask, "is_causal": self.mask is None, "scale": scale}
        out = scaled_dot_product_attention(
            pad(query, (0, 1), value=1.0),
            torch.cat([key, column], -1),
            pad(value, (0, 1)),  # the kernel wants values as wide as keys
            **(how | masks),
        )
        return out[..., :-1]


def graph_bytes(lm: LMShape, rows: int, length: int, folded: bool, adapted: bool = False) -> int:
    """What the graph of all layers holds of so many rows of `length` tokens, at most, where no
    layer is computed again; `adapted`: with adapters on their linear layers."""
    each = 0
    for layer, _ in lm.blocks:
        each += HIDDEN_STATES * layer.width + MLP_STATES * layer.ffn
        # A copy in float32 of what each of seven linear layers reads.
        each += 6 * layer.width + layer.ffn if adapted else 0
        # Masks with gradients: the softmax of all pairs, what went into it, and its mask.
        each += 0 if folded else 3 * layer.heads * length
    return BYTES * rows * length * each


@contextmanager
def gated(
    layers: Iterable[nn.Module], folded: Gates | None, keep: bool
) -> Generator[None, None, None]:
    """While it lasts, layers attend by the gates of `folded`, where there are some. Unless `keep`,
    one that runs with gradients keeps only what it reads, and computes the rest again in the
    backward pass (Chen et al. 2016): a graph holds [B S D] per layer."""
    again = torch.is_grad_enabled() and not keep
    if folded is None and not again:
        yield
        return

    # Both come around a layer, so that what is computed again is what was computed.
    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if folded is None else FoldedGates(folded):
            return forward(*args, **kwargs)

    # What an offloading hook has put on a layer comes back afterwards.
    stock = [(layer, vars(layer).get("forward"), layer.forward) for layer in layers]
    for layer, _, forward in stock:
        instead = partial(run, forward)
        if again:
            # Frozen and without dropout: no random numbers to draw again.
            instead = partial(checkpoint, instead, use_reentrant=False, preserve_rng_state=False)
        layer.forward = instead  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, before, _ in stock:
            del layer.forward
            if before is not None:
                layer.forward = before
