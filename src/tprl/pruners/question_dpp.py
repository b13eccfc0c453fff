"""Question x DPP: TPRL's way of choosing a set, with a similarity to the question's words as
quality, untrained."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import Rows
from tprl.cost import LVLMShape, dpp_flops
from tprl.pruners.quality import QualityDPP, standardize
from tprl.types import Encoded


class QuestionDPPPruner(QualityDPP):
    """Greedy MAP of a DPP whose quality is the similarity to the question: what the question gives
    for nothing.

    log q = alpha * z, where z is the z-score within the image of the *mean* over the question's
    words of the cosine between the projected token and the word, both as the language model's first
    layer reads them; kernel and greedy MAP are TPRL's (`quality.diverse`). A question without words
    leaves diversity alone. Not trained. Source: ours, after CDPruner (arXiv 2506.10967) and its
    OpenVINO version, which takes the language model's embeddings too. Complexity O(n^2 D + k^2 n)
    per image, k steps in sequence.

    Args:
        alpha: weight of the question against diversity; 0.1 was chosen on 300 validation questions
            of `scenes` among 0.1, 0.25, 0.5, 1 and 2 (the largest cosine of any word was worse than
            the mean), 0 is diversity alone.
    """

    name = "question_dpp"
    extras: frozenset[str] = frozenset()
    reads_question = True

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__(alpha)

    def log_quality(self, images: Rows, encoded: Encoded) -> Float[Tensor, "I W"]:
        return standardize(images.split(relevance(encoded)), images.mask)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """One product of every token with the mean of the words, the kernel, and greedy MAP on
        it."""
        return 2 * tokens * shape.lm.width + dpp_flops(tokens, shape.lm.width, kept)


def relevance(encoded: Encoded) -> Float[Tensor, "B V"]:
    """Mean over the question's words of the cosine with each visual token; 0 without words.

    The mean of cosines is the product with the mean of the words' unit vectors, so words cost no
    products.
    """
    words, real = encoded.words
    # [B D] mean of the unit vectors of the words that are real.
    unit = normalize(words.double(), dim=-1) * real.unsqueeze(-1)
    mean = unit.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    return (normalize(encoded.visual.double(), dim=-1) @ mean.unsqueeze(2)).squeeze(2)
