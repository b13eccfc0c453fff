"""Keyword color x DPP: pixels of the color that the question names."""

import re

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.budget import Rows
from tprl.cost import LVLMShape, dpp_flops
from tprl.pruners.quality import QualityDPP, standardize
from tprl.types import Encoded

# Named colors of CSS that have a hue, red, green and blue in [0, 255].
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "cyan": (0, 255, 255),
    "orange": (255, 165, 0),
    "pink": (255, 192, 203),
    "brown": (165, 42, 42),
}
FAINT = 0.08  # chroma, of 1, at which a hue counts half
SHARE = 4  # the best fourth of a token's pixels decides


class KeywordColorPruner(QualityDPP):
    """Greedy MAP of a DPP whose quality is how much of a token has a hue that the question names:
    the control for drawn worlds, where a color names a few things among many.

    log q = alpha * z, where z is the z-score within the image of the largest similarity to any
    color word of the question: the cosine between a pixel's RGB less its gray and the color's,
    times chroma / (chroma + 0.08), mean over the best fourth of the token's pixels. Without a color
    word diversity alone decides. No training, no language model. Source: ours; a hostile reading of
    `crowd` asked for it. Needs extras["rgb"].

    Args:
        alpha: weight of color against diversity.
    """

    name = "keyword_color"
    extras: frozenset[str] = frozenset({"rgb"})
    reads_question = True

    def log_quality(self, images: Rows, encoded: Encoded) -> Float[Tensor, "I W"]:
        return standardize(images.split(likeness(encoded)), images.mask)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """The kernel of projected tokens and greedy MAP on it; comparing pixels is no matrix
        product of the model's size."""
        return dpp_flops(tokens, shape.lm.width, kept)


def likeness(encoded: Encoded) -> Float[Tensor, "B V"]:
    """How much of each token has a hue that its question names, in [-1, 1]; 0 without a color
    word."""
    rgb = encoded.extras["rgb"].flatten(3).double()  # [B V 3 p]
    chroma = rgb - rgb.mean(2, keepdim=True)
    norm = chroma.norm(dim=2)
    best = max(1, rgb.shape[3] // SHARE)
    scores = torch.zeros_like(encoded.visual_mask, dtype=torch.float32)
    for row, question in enumerate(encoded.questions):
        named = [COLORS[word] for word in re.findall(r"[a-z]+", question.lower()) if word in COLORS]
        similar = []
        for color in named:
            hue = chroma.new_tensor(color)
            hue = (hue - hue.mean()) / (hue - hue.mean()).norm()
            # [V p] cosine times chroma / (chroma + FAINT), written without a division by 0.
            similarity = torch.einsum("vcp,c->vp", chroma[row], hue) / (norm[row] + FAINT)
            similar.append(similarity.topk(best, dim=1).values.mean(1))
        if similar:
            scores[row] = torch.stack(similar).amax(0).float()
    return scores * encoded.visual_mask
