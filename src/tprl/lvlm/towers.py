"""What families read off their vision towers: module inputs, and attention recomputed from the
queries and keys of one layer, so that the tower keeps SDPA or flash attention."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tprl.errors import UserError

CHUNK = 2**25  # attention weights that exist at a time


class Call(NamedTuple):
    """What a module was called with."""

    x: Tensor
    options: dict[str, Any]


def joined_tiles(values: Shaped[Tensor, "N P ..."], counts: Sequence[int]) -> list[Tensor]:
    """One tensor per image of what N tiles hold, `counts[i]` tiles of image i one after the
    other."""
    return [part.flatten(0, 1) for part in values.split(list(counts))]


class StockBlock:
    """A block of a CLIP or SigLIP tower of transformers, as `types.TowerBlock`; on SDPA, whatever
    the tower runs on.

    Of a tower that is spread over devices, each module moves its input to its own; results come
    back to that of x.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def attend(
        self, x: Float[Tensor, "I M C"], bias: Float[Tensor, "I 1 1 M"]
    ) -> tuple[Float[Tensor, "I M C"], Float[Tensor, "I M c"]]:
        # Pre-norm attention by the stock projections, [I H M c] each.
        attention, normed = self.layer.self_attn, self.layer.layer_norm1(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, keys, values = (
            split_heads(project(normed), attention.num_heads) for project in projections
        )
        # `bias` is the log of the patches that a token stands for: [I 1 1 M].
        mixed = scaled_dot_product_attention(
            query, keys, values, bias.to(query), scale=attention.scale
        )
        mixed = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return x + mixed.to(x.device), keys.double().mean(1).to(x.device)

    def feed(self, x: Float[Tensor, "I M C"]) -> Float[Tensor, "I M C"]:
        return x + self.layer.mlp(self.layer.layer_norm2(x)).to(x.device)


@contextmanager
def in_place(module: nn.Module) -> Generator[None, None, None]:
    """While it lasts, a module's own parameters are where it runs, also where a hook of accelerate
    brings them there for each forward only: for what is called beside the forward."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextmanager
def overheard(modules: Mapping[str, nn.Module]) -> Generator[dict[str, Call], None, None]:
    """While it lasts, the last call of each module, by the same names."""
    calls: dict[str, Call] = {}

    def listen(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name_of_x = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
            calls[name] = Call(args[0] if args else kwargs[name_of_x], kwargs)

        return module.register_forward_pre_hook(note, with_kwargs=True)

    # Inputs are noted, not outputs: attention is recomputed from what a layer was given.
    handles = [listen(name, module) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def layer_of(feature: int, layers: int) -> int:
    """The layer, counted from 0, that makes `hidden_states[feature]`; `hidden_states[0]` is the
    embedding."""
    return feature - 1 if feature > 0 else layers + feature


def check_feature_layers(config: Any, name: str) -> None:
    """Refuse a config that reads features of layers which its vision tower does not have.

    Args:
        config: of the whole model; one without `vision_feature_layer` reads the last layer.
        name: of the model, for errors.

    Raises:
        UserError: with the number of layers.
    """
    features = getattr(config, "vision_feature_layer", None)
    for feature in [features] if isinstance(features, int) else features or []:
        # hidden states: the embedding, and what each layer makes
        layers: int = config.vision_config.num_hidden_layers
        if not -layers - 1 <= feature <= layers:
            raise UserError(
                f"vision_feature_layer={features} in the config of {name} names a layer that its "
                f"vision tower of {layers} does not have: copy the checkpoint's config.json again."
            )


def split_heads(x: Float[Tensor, "... N C"], heads: int) -> Float[Tensor, "... H N c"]:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def query_key(
    attention: Any,
    x: Float[Tensor, "I M C"],
    queries: slice = slice(None),
    heads: int | None = None,
) -> tuple[Float[Tensor, "I H Q c"], Float[Tensor, "I H M c"]]:
    """Queries of the chosen tokens and keys of all, of a module with q_proj and k_proj, split into
    its heads or into `heads`."""
    count = heads or attention.num_heads
    query, keys = attention.q_proj(x[:, queries]), attention.k_proj(x)
    return split_heads(query, count), split_heads(keys, count)


def weights(
    query: Float[Tensor, "... Q c"], keys: Float[Tensor, "... M c"]
) -> Float[Tensor, "... Q M"]:
    """Attention logits in float32."""
    return (query @ keys.mT).float() * query.shape[-1] ** -0.5


def cls_attention(
    query: Float[Tensor, "I H 1 c"], keys: Float[Tensor, "I H M c"]
) -> Float[Tensor, "I N"]:
    """Attention of the CLS token, which comes first, to the N = M - 1 patches; mean over heads."""
    return weights(query, keys).softmax(-1)[:, :, 0, 1:].mean(1)


def received_attention(
    query: Float[Tensor, "I H N c"],
    keys: Float[Tensor, "I H N c"],
    real: Bool[Tensor, "I N"] | None = None,
) -> Float[Tensor, "I N"]:
    """Attention that each patch receives, mean over heads and over queries; patches that are not
    `real` (None: all are) neither give nor receive any."""
    # Chunks of queries: all N x N weights of a large image would not fit.
    images, heads, count = keys.shape[:3]
    if real is None:
        real = torch.ones(images, count, dtype=torch.bool, device=keys.device)
    mask = real.to(keys.device)
    total = keys.new_zeros(images, count, dtype=torch.float32)
    size = max(1, CHUNK // (images * heads * count))
    for rows, asking in zip(query.split(size, 2), mask.split(size, 1), strict=True):
        attention = weights(rows, keys).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        total += (attention.mean(1) * asking.unsqueeze(-1)).sum(1)
    return total / mask.sum(1, keepdim=True)


def rotated(
    x: Float[Tensor, "N H c"], cosine: Float[Tensor, "N c"], sine: Float[Tensor, "N c"]
) -> Float[Tensor, "N H c"]:
    """Rotary positions: entry i of the first half and of the second half of a head are one
    plane."""
    # (a, b) turns to (a cos - b sin, b cos + a sin).
    first, second = x.float().chunk(2, -1)
    across = torch.cat([-second, first], -1)
    turned = x.float() * cosine.float().unsqueeze(1) + across * sine.float().unsqueeze(1)
    return turned.to(x.dtype)


def window_order(views: Sequence[tuple[int, int]], size: int) -> Int[Tensor, " N"]:
    """Tokens of images of these (rows, columns) window by window, as a tower with windows of `size`
    x `size` tokens orders them; windows, and tokens within them, are in raster order, and those at
    the edges may be smaller."""
    parts, start = [], 0
    for rows, columns in views:
        # Numbers of windows grow in raster order; the stable sort keeps raster order within each.
        row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns)
        window = row // size * columns + column // size
        parts.append(start + window.flatten().argsort(stable=True))
        start += rows * columns
    return torch.cat(parts)
