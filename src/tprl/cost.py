"""FLOPs of everything between the pixels and the answer, computed from shapes alone.

Every function returns an exact integer number of FLOPs under `CONVENTION`; the tests compare them with
`torch.utils.flop_counter.FlopCounterMode`. Nothing here looks at a tensor, so costs of models that do not fit on the
machine at hand are as exact as the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tprl.errors import UserError

CONVENTION = (
    "FLOPs: 2 per multiply-accumulate; matrix products, convolutions and attention only; attention over the full "
    "S x S matrix (no causal halving); vision tower including its last layer, projector, token selector, prefill of "
    "text and kept visual tokens, one decoding step per further answer token, and the LM head once per answer token."
)


@dataclass(frozen=True)
class VisionShape:
    """A ViT over one image of `patches` non-overlapping patches (`patch_size` pixels a side)."""

    layers: int
    width: int
    mlp: int
    heads: int  # recorded for completeness: the cost of attention does not depend on it
    patches: int
    patch_size: int
    channels: int = 3
    cls: bool = True

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


@dataclass(frozen=True)
class LVLMShape:
    """All that decides the FLOPs of an LVLM: tower, projector widths (input first), language model."""

    vision: VisionShape
    projector: tuple[int, ...]
    lm: LMShape

    @classmethod
    def from_llava(cls, config: Any) -> "LVLMShape":
        """The shape of a Hugging Face `LlavaConfig` with a CLIP vision tower and a Llama-like language model.

        Raises:
            UserError: another vision tower (its pooling head and patch rules are not counted here).
        """
        vision, text = config.vision_config, config.text_config
        if vision.model_type != "clip_vision_model":
            raise UserError(
                f"The cost model does not know the vision tower {vision.model_type!r} of a LLaVA: "
                "use a clip_vision_model, or add a constructor to tprl.cost.LVLMShape."
            )
        layer = config.vision_feature_layer
        features = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
        return cls(
            vision=VisionShape(
                layers=vision.num_hidden_layers,
                width=vision.hidden_size,
                mlp=vision.intermediate_size,
                heads=vision.num_attention_heads,
                patches=(vision.image_size // vision.patch_size) ** 2,
                patch_size=vision.patch_size,
                channels=vision.num_channels,
                cls=True,
            ),
            projector=(features, text.hidden_size, text.hidden_size),
            lm=LMShape(
                layers=text.num_hidden_layers,
                width=text.hidden_size,
                ffn=text.intermediate_size,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
                vocab=text.vocab_size,
            ),
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


def vision_flops(shape: LVLMShape, images: int = 1) -> int:
    """Patch embedding and every layer of the tower, the unused last one too because the model computes it."""
    v = shape.vision
    patch = 2 * v.patches * v.width * v.channels * v.patch_size**2
    return images * (patch + v.layers * encoder_layer_flops(v.width, v.mlp, v.tokens))


def projector_flops(shape: LVLMShape, images: int = 1) -> int:
    """The MLP projector over all patches (CLS is dropped before it)."""
    return mlp_flops(shape.projector, images * shape.vision.patches)


def lm_layer_flops(lm: LMShape, new: int, context: int) -> int:
    """One decoder layer over `new` tokens that attend to `context` keys (BASELINES 5, times 2 FLOPs per MAC)."""
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    linear = 2 * lm.width * (2 * q + 2 * kv) + 2 * lm.width * lm.ffn * (3 if lm.gated else 2)
    return new * linear + 4 * new * context * q


def per_layer(shape: LVLMShape, visual_tokens: int | Sequence[int]) -> tuple[int, ...]:
    """Visual tokens that each layer of the language model processes; one number means the same in all.

    Raises:
        ValueError: a sequence that does not have one entry per layer.
    """
    if isinstance(visual_tokens, int):
        return (visual_tokens,) * shape.lm.layers
    if len(visual_tokens) != shape.lm.layers:
        raise ValueError(f"{len(visual_tokens)} visual-token counts for {shape.lm.layers} layers: give one per layer.")
    return tuple(visual_tokens)


def prefill_flops(shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int]) -> int:
    """The language model over the prompt, LM head excluded.

    Args:
        shape: the model.
        text_tokens: prompt tokens that are not visual (template, question, BOS).
        visual_tokens: kept visual tokens; one count per layer for methods that drop tokens inside the model.
    """
    lengths = (text_tokens + v for v in per_layer(shape, visual_tokens))
    return sum(lm_layer_flops(shape.lm, n, n) for n in lengths)


def decode_flops(shape: LVLMShape, text_tokens: int, visual_tokens: int | Sequence[int], steps: int) -> int:
    """`steps` cached forward passes of one token each after the prompt, LM head excluded.

    The prefill yields the first answer token, so an answer of n tokens (its end token counted) takes n - 1 steps.
    """
    lengths = [text_tokens + v for v in per_layer(shape, visual_tokens)]
    return sum(lm_layer_flops(shape.lm, 1, n + t + 1) for t in range(steps) for n in lengths)


def lm_head_flops(shape: LVLMShape, positions: int = 1) -> int:
    """The vocabulary projection at `positions` positions."""
    return 2 * positions * shape.lm.width * shape.lm.vocab


def similarity_flops(tokens: int, width: int) -> int:
    """All inner products between `tokens` vectors: the matrix that diversity-based selectors start from."""
    return 2 * tokens**2 * width


def dpp_flops(tokens: int, width: int, kept: int) -> int:
    """Kernel and greedy MAP of `policy.dpp`, which `policy.select=dpp` pays on top of the policy.

    Each of the `kept` steps multiplies a vector with the [kept, tokens] Cholesky factors. The code writes that product
    elementwise, so torch's counter does not see it; it is one all the same.
    """
    return similarity_flops(tokens, width) + 2 * kept**2 * tokens


def autoencoder_flops(in_width: int, hidden: int, code_width: int, tokens: int, decode: bool = False) -> int:
    """Encoding `tokens` tokens, all that serving needs; with `decode` their reconstruction too."""
    one_way = mlp_flops((in_width, hidden, code_width), tokens)
    return 2 * one_way if decode else one_way


def policy_flops(policy: PolicyShape, tokens: int, words: int) -> int:
    """One forward pass of the policy (logits and value) on one sample, as `PolicyNet` computes it.

    Args:
        policy: its shape.
        tokens: visual tokens in the tensor. Dead ones are masked, not removed: they cost as much as alive ones.
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
    images: int = 1,
    selector: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The cost of one question by component; `total` is the sum of the others.

    Args:
        shape: the model.
        text_tokens: prompt tokens that are not visual.
        visual_tokens: kept visual tokens, or one count per layer.
        answer_tokens: generated tokens, end token included.
        images: images (or crops) that pass the vision tower.
        selector: what choosing the tokens costs, by name: {"autoencoder": ..., "policy": ...} or {"divprune": ...}.
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
