"""FLOPs of the LVLM by component, from pixels to answer, and bytes of its KV cache."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from tprl.cost.shapes import (
    FULL,
    LINEAR,
    SLIDING,
    LinearShape,
    LMShape,
    LVLMShape,
    VisionShape,
)

CONVENTION = (
    "FLOPs: 2 per multiply-accumulate; matrix products, convolutions and attention only; "
    "attention over the full S x S matrix (no causal halving); vision tower including "
    "its last layer, projector, token selector, prefill of text and kept visual tokens, "
    "one decoding step per further answer token, and the LM head once per answer token."
)

Grid = tuple[int, int]  # rows and columns
# that pass the tower: so many fixed ones, or patches of each (crops and tiles are images)
Images = int | Sequence[Grid]


def mlp_flops(widths: Sequence[int], tokens: int) -> int:
    """A chain of linear layers, `widths[0] -> widths[1] -> ...`, applied to every token."""
    return sum(2 * tokens * a * b for a, b in pairwise(widths))


def encoder_layer_flops(width: int, mlp: int, tokens: int) -> int:
    """A plain transformer encoder layer: four projections, full attention, a two-matrix MLP."""
    return 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp


def vision_flops(shape: LVLMShape, images: Images = 1) -> int:
    """Patch embedding and every layer of the tower, the unused last one too because the model
    computes it."""
    return sum(tower_flops(shape.vision, grid) for grid in grids(shape.vision, images))


def grids(v: VisionShape, images: Images) -> Sequence[Grid]:
    """(rows, columns) of patches of each pass of the tower.

    Raises:
        ValueError: a number of images for a tower that reads any grid.
    """
    if not isinstance(images, int):
        return images
    if not v.patches:
        raise ValueError(
            f"{images} images of a tower that reads any grid: give (rows, columns) of each."
        )
    return [(1, v.patches)] * images


def tower_flops(v: VisionShape, grid: Grid) -> int:
    """One pass of the tower: layers as `encoder_layer_flops`, but for windows and gates; and the
    pooling head."""
    rows, columns = grid
    patches = v.padded or rows * columns
    tokens = patches + v.cls
    # The patch embedding is a convolution: one product per pixel value and width.
    patch = 2 * patches * v.width * v.channels * v.frames * v.patch_size**2
    # Four projections, 2 FLOPs each, and an MLP of two or three matrices.
    linear = 8 * tokens * v.width**2 + (6 if v.gated else 4) * tokens * v.width * v.mlp
    # Pairs of tokens that attend to each other, over all layers.
    windowed = v.layers - v.whole if v.window else 0
    pairs = (v.layers - windowed) * tokens**2
    if windowed:  # those at the edges may be smaller
        pairs += windowed * _squares(rows, v.window) * _squares(columns, v.window)
    # One query reads all tokens, through four projections of its own attention, and passes an MLP.
    pool = (4 + 4 * tokens) * v.width**2 + 4 * tokens * v.width + 4 * v.width * v.mlp
    # Tokens as a product of all patches with a matrix of places.
    places = 2 * (v.padded // v.merge**2) * v.padded * v.width
    return patch + v.layers * linear + 4 * v.width * pairs + v.pool * pool + places


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows along one side."""
    return length // window * window**2 + (length % window) ** 2


def projector_flops(shape: LVLMShape, images: Images = 1) -> int:
    """The MLP projectors over all patches, `merge` x `merge` of them side by side (CLS is dropped
    before)."""
    patches = sum(rows * columns for rows, columns in grids(shape.vision, images))
    return shape.projectors * projecting_flops(shape, patches // shape.vision.merge**2)


def projecting_flops(shape: LVLMShape, tokens: int) -> int:
    """One of the projectors over so many tokens."""
    return mlp_flops(shape.projector, tokens) + mlp_flops(shape.beside, tokens)


def lm_layer_flops(lm: LMShape, new: int, context: int, kind: str = FULL) -> int:
    """One decoder layer of a kind over `new` tokens that attend to `context` keys
    (docs/baselines.md#flops, times 2 FLOPs per MAC)."""
    mlp = new * 2 * lm.width * lm.ffn * (3 if lm.gated else 2)
    if kind == LINEAR:
        assert lm.linear is not None
        return mlp + linear_attention_flops(lm.linear, lm.width, new, new < context)
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    # A window masks the matrix of a whole prompt; later, older keys are no longer there.
    if kind == SLIDING and new < context:
        context = min(context, lm.window)
    # Q (perhaps with a gate) and output, grouped K and V, then q k^T and its product with V over
    # the context.
    projections = new * 2 * lm.width * ((3 if lm.query_gate else 2) * q + lm.kv_projections * kv)
    # A gate and a projection of what every layer adds.
    added = new * 2 * 2 * lm.width * lm.per_layer
    return mlp + projections + added + 4 * new * context * q


def per_layer_flops(lm: LMShape, tokens: int) -> int:
    """What embeddings of every layer cost before the first one: a projection of the tokens."""
    return 2 * tokens * lm.width * lm.layers * lm.per_layer


def linear_attention_flops(linear: LinearShape, width: int, new: int, cached: bool) -> int:
    """Linear attention over `new` tokens: a prompt in chunks, or one token after a `cached` state,
    whose recurrence is elementwise. Torch's counter does not count the two triangular systems of
    each chunk, and neither does this."""
    values = linear.value_heads * linear.value_dim
    # Queries, keys and values; the output's gate and its projection; decay and strength by head.
    projections = 2 * new * width * (linear.mixed + 2 * values + 2 * linear.value_heads)
    # The convolution runs over its padding too: of a prompt behind it, of a token all that is kept.
    places = 2 if cached else new + linear.kernel - 1
    flops = projections + 2 * linear.mixed * linear.kernel * places
    if cached:
        return flops
    # Of each chunk and head: keys with keys and with queries, weights with values, and three
    # products of the state.
    c, k, v = linear.chunk, linear.key_dim, linear.value_dim
    chunk = 2 * (2 * c * c * k + c * c * v + 3 * c * k * v)
    return flops + -(-new // c) * linear.value_heads * chunk


def per_layer(lm: LMShape, tokens: int | Sequence[int]) -> tuple[int, ...]:
    """Tokens in each layer of the language model; one number means the same in all.

    Raises:
        ValueError: a sequence that does not have one entry per layer.
    """
    if isinstance(tokens, int):
        return (tokens,) * lm.layers
    if len(tokens) != lm.layers:
        raise ValueError(f"{len(tokens)} token counts for {lm.layers} layers: give one per layer.")
    return tuple(tokens)


def layer_mean(visual_tokens: Sequence[int]) -> float:
    """Visual tokens averaged over what each layer really computes, by which methods inside the
    model are compared."""
    return sum(visual_tokens) / len(visual_tokens)


def patch_bytes(vision: VisionShape, dtype_bytes: int = 2) -> int:
    """Bytes that a patch holds while its image is in the tower: pixel values in float32 and in the
    dtype, hidden states of every layer, which stay, and the widest layer's work.

    Args:
        vision: the tower.
        dtype_bytes: bytes per number, 2 for bfloat16.
    """
    values = vision.channels * vision.frames * vision.patch_size**2
    widths = vision.width * (vision.layers + 1) + 2 * vision.mlp + 4 * vision.width
    return values * (4 + dtype_bytes) + dtype_bytes * widths


def kv_bytes(lm: LMShape, tokens: int | Sequence[int], dtype_bytes: int = 2) -> int:
    """Bytes of the KV cache of one prompt.

    Args:
        lm: the language model; grouped heads are stored once.
        tokens: cached tokens (text, kept visual ones, and answer tokens that were read), or one
            count per layer.
        dtype_bytes: bytes per number, 2 for bfloat16.
    """
    held = 0
    for n, (block, kind) in zip(per_layer(lm, tokens), lm.blocks, strict=True):
        if not block.kv_projections:  # it reads the cache of another layer
            continue
        if kind == LINEAR:  # whatever the prompt's length; the state is float32
            assert lm.linear is not None
            held += lm.linear.mixed * lm.linear.kernel * dtype_bytes + 4 * lm.linear.state
            continue
        # Of a window, the next query sees all but the oldest token.
        cached = min(n, lm.window - 1) if kind == SLIDING else n
        held += 2 * block.kv_heads * block.head_dim * dtype_bytes * cached
    return held


def prefill_flops(shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int]) -> int:
    """The language model over the prompt, LM head excluded.

    Args:
        shape: the model.
        text_tokens: prompt tokens that are not visual (template, question, BOS).
        visual_tokens: kept visual tokens; one count per layer for methods that drop tokens inside
            the model.
    """
    lengths = [text_tokens + v for v in per_layer(shape.lm, visual_tokens)]
    flops = per_layer_flops(shape.lm, lengths[0])
    for n, (block, kind) in zip(lengths, shape.lm.blocks, strict=True):
        # Without keys of its own a layer computes what the first answer token needs alone, over
        # all keys of the prompt.
        flops += lm_layer_flops(block, *((n, n, kind) if block.kv_projections else (1, n, FULL)))
    return flops


def decode_flops(
    shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int], steps: int
) -> int:
    """`steps` cached forward passes of one token each after the prompt, LM head excluded.

    The prefill yields the first answer token, so an answer of n tokens (its end token counted)
    takes n - 1 steps.
    """
    lengths = [text_tokens + v for v in per_layer(shape.lm, visual_tokens)]
    # Step t reads one token and attends to the prompt, t earlier ones and itself.
    flops = per_layer_flops(shape.lm, steps)
    for n, (block, kind) in zip(lengths, shape.lm.blocks, strict=True):
        flops += sum(lm_layer_flops(block, 1, n + t + 1, kind) for t in range(steps))
    return flops


def lm_head_flops(shape: LVLMShape, positions: int = 1) -> int:
    """The vocabulary projection at `positions` positions."""
    return 2 * positions * shape.lm.width * shape.lm.vocab


def total(
    shape: LVLMShape,
    *,
    text_tokens: int,
    visual_tokens: int | Sequence[int],
    answer_tokens: int = 1,
    images: Images = 1,
    selector: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The cost of one question by component; `total` is the sum of the others.

    Args:
        shape: the model.
        text_tokens: prompt tokens that are not visual.
        visual_tokens: kept visual tokens, or one count per layer.
        answer_tokens: generated tokens, end token included.
        images: images (or crops, or tiles) that pass the vision tower: how many, or (rows, columns)
            of patches of each.
        selector: what choosing the tokens costs, by name: {"autoencoder": ..., "policy": ...} or
            {"divprune": ...}.
    """
    parts = {
        "vision": vision_flops(shape, images),
        "projector": projector_flops(shape, images),
        **(selector or {}),
        "prefill": prefill_flops(shape, text_tokens, visual_tokens),
        "decode": decode_flops(shape, text_tokens, visual_tokens, max(answer_tokens - 1, 0)),
        "lm_head": lm_head_flops(shape, answer_tokens),
    }
    return {**parts, "total": sum(parts.values())}


def saved(
    shape: LVLMShape,
    *,
    text_tokens: int,
    visual_tokens: int,
    kept: int,
    parts: Collection[str] = ("vision", "projector", "prefill", "decode", "lm_head"),
    answer_tokens: int = 1,
) -> float:
    """Share of the FLOPs of `parts` that keeping `kept` of `visual_tokens` saves on one fixed
    image, selector apart."""
    full, cut = (
        total(shape, text_tokens=text_tokens, visual_tokens=count, answer_tokens=answer_tokens)
        for count in (visual_tokens, kept)
    )
    whole = sum(full[part] for part in parts)
    return 1 - sum(cut[part] for part in parts) / whole
