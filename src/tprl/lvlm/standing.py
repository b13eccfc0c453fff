"""What stands in for things that few vision towers have: a CLS token, and CLIP's text tower beside
it.

Families read four things off their towers: attention (of CLS, or what patches receive), features,
keys, and attention in a middle layer. All else that pruners made for LLaVA ask for follows from
these, and tables mark a method that reads it by a star.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from tprl.lvlm.batching import Seen
from tprl.types import Encoded

# [B V] attention of the layer that makes the features, or of the last that sees whole images;
# [B V C] features that the projector reads; [B V C] keys of that layer, heads side by side, before
# norms and rotations; [B V] attention in the layer at 9/23 of the depth, or the nearest that sees
# whole images. Of a token's patches they are the mean, features stand side by side.
READ = frozenset({"cls_attention", "vision_features", "last_keys", "middle_attention"})
DERIVED = frozenset(
    {"vision_keys", "last_cls_attention", "last_attention", "cls_feature", "clip_relevance"}
)
EVERY = READ | DERIVED
ATTENTIONS = frozenset({"cls_attention", "middle_attention"})  # of `READ`
LAYER = "the layer that cls_attention is of"
# `substitutes` of families whose tower has a CLS token, and of those whose tower has none.
WITH_CLS = {
    "last_keys": f"keys of {LAYER}",
    "vision_keys": f"keys of {LAYER}, mean over a token's patches",
    "middle_attention": "cls_attention in a middle layer",
    "last_cls_attention": f"attention in {LAYER}",
    "last_attention": f"attention in {LAYER}",
    "cls_feature": "mean of the image's features, weighed by cls_attention",
    "clip_relevance": "cosine to the question's words in the language model's embedding space",
}
RECEIVED = {"cls_attention": "attention received, mean over heads and queries", **WITH_CLS}
OBJECTS = 9 / 23  # of the depth: HiPrune's 10th of 24 layers


def object_layer(layers: Sequence[int]) -> int:
    """Of layers that see whole images, by number, the one nearest to HiPrune's "object" layer in a
    tower that ends with the last of them."""
    wanted = round(max(layers) * OBJECTS)
    return min(layers, key=lambda layer: (abs(layer - wanted), layer))


def keys_of(layer: Any, x: Float[Tensor, "... C"]) -> Float[Tensor, "... c"]:
    """Keys of all heads side by side, of a module of attention with k_proj or qkv."""
    return layer.qkv(x).chunk(3, -1)[1] if hasattr(layer, "qkv") else layer.k_proj(x)


def reading(
    extras: frozenset[str], layer: nn.Module, middle: nn.Module, features: nn.Module
) -> dict[str, nn.Module]:
    """The module whose input each of the extras is read from."""
    modules = {
        "cls_attention": layer,
        "last_keys": layer,
        "middle_attention": middle,
        "vision_features": features,
    }
    return {name: modules[name] for name in extras & modules.keys()}


class StandingIn:
    """The half of `FrozenLVLM` that derives extras from those that its family reads.

    Attributes:
        derived: which it derives; a family that reads some of them itself says so.
    """

    model: Any
    derived: ClassVar[frozenset[str]] = DERIVED

    def sources(self, extras: frozenset[str]) -> frozenset[str]:
        """What the family has to read for these extras."""
        wanted = extras - self.derived
        for name in extras & self.derived:
            wanted |= _SOURCES[name]
        return wanted

    def complete(self, seen: Seen, extras: frozenset[str]) -> Seen:
        """The same with the extras that were asked for; "clip_relevance" follows in `relate`, where
        questions are known."""
        values: dict[str, list[Tensor]] = {}
        for name in extras - {"clip_relevance"} if self.derived else extras:
            derived = name in self.derived
            values[name] = self._derive(name, seen.extras) if derived else seen.extras[name]
        return seen._replace(extras=values)

    def _derive(self, name: str, read: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """One tensor per image."""
        match name:
            case "vision_keys":  # mean over heads
                heads = self._heads
                return [keys.unflatten(-1, (heads, -1)).mean(-2) for keys in read["last_keys"]]
            case "cls_feature":
                pairs = zip(read["vision_features"], read["cls_attention"], strict=True)
                return [_summary(features, attention) for features, attention in pairs]
        return read["cls_attention"]

    @property
    def _heads(self) -> int:
        vision = self.model.config.vision_config
        return getattr(vision, "num_heads", None) or vision.num_attention_heads

    def relate(self, encoded: Encoded) -> None:
        """Minus the cosine of every visual token with the question's words, mean over words.

        Projected tokens and words share the language model's embedding space. There relevance is
        not inverted as in CLIP's, whose patches are least like the text where they show what it
        says; with the sign turned, rules made for CLIP mean the same (OpenVINO's form of CDPruner).
        """
        words, real = encoded.words
        tokens = normalize(encoded.visual.float(), dim=-1)
        cosine = tokens @ normalize(words.float(), dim=-1).mT
        mean = (cosine * real.unsqueeze(1)).sum(2) / real.sum(1).clamp(min=1)[:, None]
        encoded.extras["clip_relevance"] = -mean * encoded.visual_mask


_SOURCES: dict[str, frozenset[str]] = {
    "vision_keys": frozenset({"last_keys"}),
    "last_cls_attention": frozenset({"cls_attention"}),
    "last_attention": frozenset({"cls_attention"}),
    "cls_feature": frozenset({"cls_attention", "vision_features"}),
    "clip_relevance": frozenset(),
}


def _summary(
    features: Float[Tensor, "N C"], attention: Float[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    """What a CLS token would have gathered, the same for all tokens of an image."""
    share = attention.float() / attention.float().sum().clamp(min=1e-12)
    mean = share.to(features.device) @ features.float()
    return mean.to(features.dtype).expand_as(features)
