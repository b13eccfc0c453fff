"""Word attention x DPP: TPRL's way of choosing a set, with the language model's own attention to
the question's words as quality."""

from jaxtyping import Float
from torch import Tensor

from tprl.budget import Rows
from tprl.cost import LVLMShape, dpp_flops, lm_layer_flops
from tprl.lvlm.listening import WORD_ATTENTION, listening_layer
from tprl.pruners.quality import QualityDPP, log_attention, standardize
from tprl.types import Encoded


class WordAttentionPruner(QualityDPP):
    """Greedy MAP of a DPP whose quality is where the question's words look in an early layer of the
    unpruned language model.

    log q = alpha * z, where z is the z-score within the image of the log of the mean attention,
    over heads and over the question's words, in the layer at 0.4 of the depth; kernel and greedy
    MAP are TPRL's (`quality.diverse`). Everything is dropped before the first layer, so the budget
    holds in all of them. Not trained, reads the question. Source: ours, after FastV (arXiv
    2403.06764), which reads the last token alone. It is the demonstrator to learn from where the
    question decides: 0.4 of the layers run on all tokens before anything is saved, and a policy
    taught by it pays for none of them. Needs extras["word_attention"].

    Args:
        alpha: weight of attention against diversity; 0 is diversity alone.
    """

    name = "word_attention"
    extras: frozenset[str] = frozenset({WORD_ATTENTION})
    reads_question = True

    def log_quality(self, images: Rows, encoded: Encoded) -> Float[Tensor, "I W"]:
        attention = log_attention(images.split(encoded.extras[WORD_ATTENTION]))
        return standardize(attention, images.mask)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The early layers on the image's tokens, the kernel, and greedy MAP on it."""
        return listening_flops(shape, tokens) + dpp_flops(tokens, shape.lm.width, kept)


def listening_flops(shape: LVLMShape, tokens: int) -> int:
    """The layers up to the one that listens, on all of an image's tokens; their text is not
    counted."""
    return listening_layer(shape.lm.layers) * lm_layer_flops(shape.lm, tokens, tokens)
