"""All that decides the cost of a model: depth, widths, patches, read off its config."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tprl.errors import UserError

# Language models whose layers are attention with grouped keys and an MLP of three matrices,
# compared with the counter.
LANGUAGE_MODELS = frozenset(
    {
        "llama",
        "mistral",
        "ministral3",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "gemma4_text",
        "glm4v_text",
        "qwen3_5_text",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
    }
)
# How a layer of a language model mixes its tokens, as configs of transformers call it.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
KINDS = (FULL, SLIDING, LINEAR)


def unknown(what: str) -> UserError:
    """The refusal of a config that the cost model does not know."""
    return UserError(
        f"the cost model does not know {what}: such an LVLM can be trained on but not evaluated."
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
    # Patches that every image is padded to, of which a matrix of places makes tokens (Gemma 4); 0:
    # there is no padding.
    padded: int = 0

    @property
    def used(self) -> int:
        """Layers that make the features."""
        return self.layers - self.unused

    @property
    def tokens(self) -> int:
        """Tokens of the encoder, CLS included."""
        return self.patches + self.cls


def layer_kinds(text: Any) -> tuple[str, ...]:
    """How each layer of a language model mixes its tokens, from its Hugging Face config."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:  # of older architectures all layers are alike
        kinds = [SLIDING if getattr(text, "sliding_window", None) else FULL]
        kinds *= text.num_hidden_layers
    return tuple(kinds)


@dataclass(frozen=True)
class LinearShape:
    """Linear attention by the gated delta rule (Yang et al. 2024, arXiv:2412.06464), as
    transformers computes it without kernels: in chunks, over what a short convolution makes of
    queries, keys and values."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int  # tokens that the convolution sees
    chunk: int = 64

    @property
    def mixed(self) -> int:
        """Width of queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state(self) -> int:
        """Numbers of the state that goes from token to token."""
        return self.value_heads * self.key_dim * self.value_dim


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
    # how each layer mixes its tokens, of `KINDS`; () means full attention in all of them
    kinds: tuple[str, ...] = ()
    window: int = 0  # tokens that a query of sliding attention sees, its own included
    linear: LinearShape | None = None  # of layers of linear attention
    query_gate: bool = False  # queries of full attention come with a gate as wide as they are
    # projections of keys and values; a layer without both reads those of an earlier one, and of a
    # prompt it computes the last token alone
    kv_projections: int = 2
    per_layer: int = 0  # width of the embeddings that every layer adds (Gemma 4)
    varied: tuple["LMShape", ...] = ()  # where layers differ in width: each as a model of its own

    @cached_property
    def blocks(self) -> tuple[tuple["LMShape", str], ...]:
        """Each layer's shape, and how it mixes its tokens."""
        kinds = self.kinds or (FULL,) * self.layers
        return tuple(zip(self.varied or (self,) * self.layers, kinds, strict=True))

    @classmethod
    def of(cls, text: Any) -> "LMShape":
        """The shape of a Hugging Face config of a language model.

        Raises:
            UserError: none of `LANGUAGE_MODELS`, or a layer that is none of `KINDS`.
        """
        # An unknown layer would be counted wrongly without a word: refused instead.
        if text.model_type not in LANGUAGE_MODELS:
            raise unknown(
                f"the language model {text.model_type!r} (it "
                f"knows {', '.join(sorted(LANGUAGE_MODELS))})"
            )
        kinds = layer_kinds(text)
        if strange := set(kinds) - set(KINDS):
            raise unknown(f"layers of {min(strange)} (in this {text.model_type})")
        if getattr(text, "enable_moe_block", False):
            raise unknown(f"the mixture of experts of this {text.model_type}")
        # Of Gemma 4 the first layer's heads; `_varied` has those of each.
        heads: Any = text.per_layer_config[0] if "gemma4" in text.model_type else text
        whole = cls(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            ffn=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=heads.num_key_value_heads,
            head_dim=getattr(heads, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            vocab=text.vocab_size,
            kinds=() if set(kinds) == {FULL} else kinds,
            window=text.sliding_window if SLIDING in kinds else 0,
            linear=_linear(text) if LINEAR in kinds else None,
            query_gate=text.model_type == "qwen3_5_text",
            per_layer=getattr(text, "hidden_size_per_layer_input", 0),
        )
        return replace(whole, varied=_varied(whole, text)) if "gemma4" in text.model_type else whole


def _varied(whole: LMShape, text: Any) -> tuple[LMShape, ...]:
    """The layers of a Gemma 4: those of full attention have heads of their own, and the last ones
    read keys and values of earlier ones."""
    layers = []
    for number, kind in enumerate(text.layer_types):
        heads, shares = text.per_layer_config[number], text.kv_sharing_modes[number] == "reuse"
        keys_alone = text.attention_k_eq_v and kind == FULL
        layer = replace(
            whole,
            layers=1,
            kinds=(kind,),
            head_dim=heads.head_dim,
            kv_heads=heads.num_key_value_heads,
            ffn=whole.ffn * (2 if shares and text.use_double_wide_mlp else 1),
            kv_projections=0 if shares else 1 if keys_alone else 2,
        )
        layers.append(layer)
    return tuple(layers)


def _linear(text: Any) -> LinearShape:
    return LinearShape(
        text.linear_num_key_heads,
        text.linear_key_head_dim,
        text.linear_num_value_heads,
        text.linear_value_head_dim,
        text.linear_conv_kernel_dim,
    )


@dataclass(frozen=True)
class LVLMShape:
    """All that decides the FLOPs of an LVLM: tower, projector widths (input first), language
    model."""

    vision: VisionShape
    projector: tuple[int, ...]
    lm: LMShape
    projectors: int = 1  # of these widths, over the same tokens (deepstack has further ones)
    beside: tuple[int, ...] = ()  # widths of what runs beside the projector, such as a gate

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
        # CLIP drops its CLS token, SigLIP has none: both leave all patches and only those.
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
        # Features of several layers stand side by side: the deepest of them is the last one used.
        taken = [layer] if isinstance(layer, int) else list(layer)
        features = vision.hidden_size * len(taken)
        # `hidden_states` has one entry more than layers: index -2 leaves one layer unused.
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
    scores: int = 0  # of each token, read beside its code

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
            scores=net.score_in.in_features if net.score_in is not None else 0,
        )
