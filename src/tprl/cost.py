"""FLOPs of everything between the pixels and the answer, and bytes of the KV cache, computed from
shapes alone.

Every function of FLOPs returns an exact integer under `CONVENTION`; the tests compare them with
`torch.utils.flop_counter.FlopCounterMode`. Nothing here looks at a tensor, so costs of models that
do not fit on the machine at hand are as exact as the others.

The paper's headline, -54.2 % FLOPs when LLaVA-1.5-7B keeps 192 of 576 visual tokens, comes without
its convention or its length of text. Under ours (`saved`) it comes out at 110 text tokens and one
answer token; at 64 text tokens the same cut saves 57.8 %, and over the language model alone 60.6 %
(54.2 % at 142 text tokens). In FastV's formula (an MLP of two matrices) with the 23 used layers of
the tower it is 108 text tokens. So it is plausible, and not reproduced: one free number was fitted.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tprl.errors import UserError

CONVENTION = (
    "FLOPs: 2 per multiply-accumulate; matrix products, convolutions and attention only; "
    "attention over the full S x S matrix (no causal halving); vision tower including "
    "its last layer, projector, token selector, prefill of text and kept visual tokens, "
    "one decoding step per further answer token, and the LM head once per answer token."
)

# Language models whose layers are attention with grouped keys and an MLP of three matrices,
# compared with the counter.
LANGUAGE_MODELS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
)
Grid = tuple[int, int]  # rows and columns
# that pass the tower: so many fixed ones, or patches of each (crops and tiles are images)
Images = int | Sequence[Grid]


def unknown(what: str) -> UserError:
    """The refusal of a config that the cost model does not know."""
    return UserError(
        f"The cost model does not know {what}: such an LVLM can be trained on but not evaluated."
    )


@dataclass(frozen=True)
class VisionShape:
    """A ViT over one image, crop or tile of non-overlapping patches (`patch_size` pixels a
    side)."""

    layers: int
    width: int
    mlp: int
    heads: int  # recorded for completeness: the cost of attention does not depend on it
    patches: int  # of every image, crop or tile; 0 where images have any grid
    patch_size: int
    channels: int = 3
    cls: bool = True
    unused: int = 1  # layers after those that make the features
    frames: int = 1  # a patch's extent in time, which an image fills with copies
    gated: bool = False  # an MLP of three matrices
    pool: bool = False  # SigLIP's pooling head, which is computed though nothing reads it
    window: int = 0  # patches a side of the windows that attention stays in; 0: there are none
    whole: int = 0  # layers that see the whole image where others see windows
    merge: int = 1  # patches a side that the projector reads as one token

    @property
    def used(self) -> int:
        """Layers that make the features."""
        return self.layers - self.unused

    @property
    def tokens(self) -> int:
        """Tokens of the encoder, CLS included."""
        return self.patches + self.cls


@dataclass(frozen=True)
class LMShape:
    """A decoder-only transformer; `gated` is True for SwiGLU-like MLPs of three matrices."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True

    @classmethod
    def of(cls, text: Any) -> "LMShape":
        """The shape of a Hugging Face config of a language model.

        Raises:
            UserError: none of `LANGUAGE_MODELS`, or one that attends to a sliding window.
        """
        if text.model_type not in LANGUAGE_MODELS:
            raise unknown(
                f"the language model {text.model_type!r} (it "
                f"knows {', '.join(sorted(LANGUAGE_MODELS))})"
            )
        if getattr(text, "sliding_window", None):
            raise unknown(
                f"sliding windows (of {text.sliding_window} tokens in this {text.model_type})"
            )
        return cls(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            ffn=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            vocab=text.vocab_size,
        )


@dataclass(frozen=True)
class LVLMShape:
    """All that decides the FLOPs of an LVLM: tower, projector widths (input first), language
    model."""

    vision: VisionShape
    projector: tuple[int, ...]
    lm: LMShape
    projectors: int = 1  # of these widths, over the same tokens (deepstack has further ones)

    @property
    def features(self) -> int:
        """Width of extras["vision_features"], which the projector reads."""
        return self.projector[0]

    @classmethod
    def from_llava(cls, config: Any) -> "LVLMShape":
        """The shape of a Hugging Face `LlavaConfig` or `LlavaNextConfig`.

        Raises:
            UserError: a tower that is neither CLIP nor SigLIP, features that are not those of all
                patches and only those, or an unknown language model.
        """
        vision, text = config.vision_config, config.text_config
        kind, strategy = vision.model_type, config.vision_feature_select_strategy
        if (kind, strategy) not in (
            ("clip_vision_model", "default"),
            ("siglip_vision_model", "full"),
        ):
            raise unknown(
                f"a {kind} whose features are selected by {strategy!r} (it knows "
                "clip_vision_model with 'default' and siglip_vision_model with 'full')"
            )
        layer = config.vision_feature_layer
        taken = [layer] if isinstance(layer, int) else list(layer)
        features = vision.hidden_size * len(taken)
        unused = min(
            -1 - index if index < 0 else vision.num_hidden_layers - index for index in taken
        )
        return cls(
            vision=VisionShape(
                layers=vision.num_hidden_layers,
                width=vision.hidden_size,
                mlp=vision.intermediate_size,
                heads=vision.num_attention_heads,
                patches=(vision.image_size // vision.patch_size) ** 2,
                patch_size=vision.patch_size,
                channels=vision.num_channels,
                cls=kind == "clip_vision_model",
                unused=unused,
                pool=kind == "siglip_vision_model" and vision.vision_use_head,
            ),
            projector=(features, text.hidden_size, text.hidden_size),
            lm=LMShape.of(text),
        )


@dataclass(frozen=True)
class PolicyShape:
    """What decides the FLOPs of `policy.networks.PolicyNet`; `query` is tokens, pooled or none."""

    code_width: int
    query_width: int
    width: int
    layers: int
    query: str = "tokens"
    place_features: int = 24  # sines and cosines of a token's place; 0 without positions

    @classmethod
    def from_net(cls, net: Any) -> "PolicyShape":
        """The shape of a `PolicyNet`."""
        return cls(
            code_width=net.code_width,
            query_width=net.query_width,
            width=net.kind.shape[1],
            layers=len(net.blocks),
            query=net.query,
            place_features=net.place.in_features if net.place is not None else 0,
        )


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
    patches, tokens = rows * columns, rows * columns + v.cls
    patch = 2 * patches * v.width * v.channels * v.frames * v.patch_size**2
    linear = 8 * tokens * v.width**2 + (6 if v.gated else 4) * tokens * v.width * v.mlp
    windowed = v.layers - v.whole if v.window else 0
    pairs = (v.layers - windowed) * tokens**2
    if windowed:  # those at the edges may be smaller
        pairs += windowed * _squares(rows, v.window) * _squares(columns, v.window)
    # One query reads all tokens, through four projections of its own attention, and passes an MLP.
    pool = (4 + 4 * tokens) * v.width**2 + 4 * tokens * v.width + 4 * v.width * v.mlp
    return patch + v.layers * linear + 4 * v.width * pairs + v.pool * pool


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows along one side."""
    return length // window * window**2 + (length % window) ** 2


def projector_flops(shape: LVLMShape, images: Images = 1) -> int:
    """The MLP projectors over all patches, `merge` x `merge` of them side by side (CLS is dropped
    before)."""
    patches = sum(rows * columns for rows, columns in grids(shape.vision, images))
    return shape.projectors * mlp_flops(shape.projector, patches // shape.vision.merge**2)


def lm_layer_flops(lm: LMShape, new: int, context: int) -> int:
    """One decoder layer over `new` tokens that attend to `context` keys (docs/baselines.md#flops,
    times 2 FLOPs per MAC)."""
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    linear = 2 * lm.width * (2 * q + 2 * kv) + 2 * lm.width * lm.ffn * (3 if lm.gated else 2)
    return new * linear + 4 * new * context * q


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


def kv_bytes(lm: LMShape, tokens: int | Sequence[int], dtype_bytes: int = 2) -> int:
    """Bytes of the KV cache of one prompt.

    Args:
        lm: the language model; grouped heads are stored once.
        tokens: cached tokens (text, kept visual ones, and answer tokens that were read), or one
            count per layer.
        dtype_bytes: bytes per number, 2 for bfloat16.
    """
    return 2 * lm.kv_heads * lm.head_dim * dtype_bytes * sum(per_layer(lm, tokens))


def prefill_flops(shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int]) -> int:
    """The language model over the prompt, LM head excluded.

    Args:
        shape: the model.
        text_tokens: prompt tokens that are not visual (template, question, BOS).
        visual_tokens: kept visual tokens; one count per layer for methods that drop tokens inside
            the model.
    """
    lengths = (text_tokens + v for v in per_layer(shape.lm, visual_tokens))
    return sum(lm_layer_flops(shape.lm, n, n) for n in lengths)


def decode_flops(
    shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int], steps: int
) -> int:
    """`steps` cached forward passes of one token each after the prompt, LM head excluded.

    The prefill yields the first answer token, so an answer of n tokens (its end token counted)
    takes n - 1 steps.
    """
    lengths = [text_tokens + v for v in per_layer(shape.lm, visual_tokens)]
    return sum(lm_layer_flops(shape.lm, 1, n + t + 1) for t in range(steps) for n in lengths)


def lm_head_flops(shape: LVLMShape, positions: int = 1) -> int:
    """The vocabulary projection at `positions` positions."""
    return 2 * positions * shape.lm.width * shape.lm.vocab


def similarity_flops(tokens: int, width: int) -> int:
    """All inner products between `tokens` vectors: the matrix that diversity-based selectors start
    from."""
    return 2 * tokens**2 * width


def dpp_flops(tokens: int, width: int, kept: int) -> int:
    """Kernel and greedy MAP of `policy.dpp`, which `policy.select=dpp` pays on top of the policy.

    Each of the `kept` steps multiplies a vector with the [kept, tokens] Cholesky factors, of which
    the code leaves out the rows that are still zero: half of them on average, all counted here. It
    writes that product elementwise, so torch's counter does not see it; it is one all the same.
    """
    return similarity_flops(tokens, width) + 2 * kept**2 * tokens


def greedy_flops(tokens: int, width: int, kept: int) -> int:
    """Greedy MAP of `policy.sequential`, which `policy.select=dpp` pays on top of the policy.

    Each step projects one feature vector out of those drawn before (two products with up to `kept`
    rows) and multiplies two vectors with the [tokens, width] features.
    """
    return 4 * tokens * width * kept + 2 * width * kept * (kept - 1)


def autoencoder_flops(
    in_width: int, hidden: int, code_width: int, tokens: int, decode: bool = False
) -> int:
    """Encoding `tokens` tokens, all that serving needs; with `decode` their reconstruction too."""
    one_way = mlp_flops((in_width, hidden, code_width), tokens)
    return 2 * one_way if decode else one_way


def policy_flops(policy: PolicyShape, tokens: int, words: int) -> int:
    """One forward pass of the policy (logits and value) on one sample, as `PolicyNet` computes it.

    Args:
        policy: its shape.
        tokens: visual tokens in the tensor. Dead ones are masked, not removed: they cost as much as
            alive ones.
        words: question tokens; they add nothing where the query is "none".
    """
    w = policy.width
    words = 0 if policy.query == "none" else words
    sequence = tokens + (min(words, 1) if policy.query == "pooled" else words)
    inputs = mlp_flops((policy.code_width, w), tokens) + mlp_flops((policy.query_width, w), words)
    inputs += mlp_flops((policy.place_features, w), tokens) + mlp_flops((2, w, w), 1)
    heads = mlp_flops((w, w, w, 1), tokens) + mlp_flops((w, w, w, 1), 1)
    return inputs + policy.layers * encoder_layer_flops(w, 4 * w, sequence) + heads


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
