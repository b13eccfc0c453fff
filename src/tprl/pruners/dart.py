"""DART: after the second layer, the visual tokens that least duplicate a few pivots."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tprl.budget import image_rows, keep_top
from tprl.cost import LMShape
from tprl.lvlm.layer_drop import LayerStage, Look
from tprl.pruners.fastv import FastVPruner
from tprl.types import columns_of


class DARTPruner(FastVPruner):
    """Pivots live, and each pivot in turn takes the tokens that are least like it.

    Source: DART (Wen et al., arXiv 2502.11494), the rule of docs/baselines.md#dart, written from
    its description. With the keys of layer K-1 after rotary embedding, all heads together, the
    pivots are the visual tokens and the tokens after the image with the largest L1 norm; likeness
    is the cosine of final-normed hidden states. Complexity O(S D) for the keys and O((P + Q) n D)
    for likeness; no attention is needed. Schedule and infeasible ratios: `FastVPruner`. Ours
    differs in the order of the pivots (those of the image, then those of the text, each by falling
    norm; the reference iterates a Python set of ints) and in the count: the reference keeps (P + Q)
    m + P tokens, never the label; ours gives the first pivots one token more, so that the budget is
    met exactly. With fewer tokens than image pivots only the strongest pivots live. Ties go to the
    lower index.

    Args:
        image_pivots: P, per image.
        text_pivots: Q, of the text after the last image; all of a shorter text.
        published: see `FastVPruner`.
    """

    name = "dart"

    def __init__(
        self, image_pivots: int = 4, text_pivots: int = 4, published: bool = False
    ) -> None:
        super().__init__(published)
        self.image_pivots, self.text_pivots = image_pivots, text_pivots

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        # [B S] L1 norm of the keys, all heads together.
        norm = look.heads("k").abs().sum((1, 3))
        # The final norm of a model that is cut over devices may be on another one than the layer.
        states = normalize(look.norm(look.hidden).to(look.hidden.device).float(), dim=-1)
        at, mask = columns_of(look.visual)
        images = image_rows(mask, look.image.gather(1, at))
        # [I W] where each image's tokens stand in the sequence
        columns = at[images.sample.unsqueeze(1), images.at]
        # Pivots: the largest keys among image tokens, and among words.
        image_norm = images.split(norm.gather(1, at))
        of_image = _largest(image_norm, images.mask, self.image_pivots)
        of_text = _largest(norm, look.after, self.text_pivots)
        image_pivots = columns.gather(1, of_image[0])
        pivots = torch.cat([image_pivots, of_text[0][images.sample]], 1)
        real = torch.cat([of_image[1], of_text[1][images.sample]], 1)
        # [I P W] how much each token repeats a pivot; the least similar live.
        tokens = states[images.sample.unsqueeze(1), columns]
        likeness = states[images.sample.unsqueeze(1), pivots] @ tokens.mT  # [I P+Q W]
        # Every column of an image holds its budget: the first one's will do.
        count = k.gather(1, at)[images.sample, images.at[:, 0]]
        order = _take(likeness, real, of_image, images.mask, count)
        joined = images.join(order, mask)
        return torch.zeros_like(norm).scatter(1, at, joined.to(norm.dtype))

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        keys = 2 * (text + alive) * lm.width * lm.kv_heads * lm.head_dim
        return keys + 2 * (self.image_pivots + self.text_pivots) * alive * lm.width


def _largest(
    norm: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], count: int
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Columns of the `count` largest entries, falling; which of them exist."""
    falling = norm.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = falling[:, :count]
    return order, mask.gather(1, order)


def _take(
    likeness: Float[Tensor, "I P W"],
    real: Bool[Tensor, "I P"],
    pivots: tuple[Int[Tensor, "I P1"], Bool[Tensor, "I P1"]],
    mask: Bool[Tensor, "I W"],
    k: Int[Tensor, " I"],
) -> Float[Tensor, "I W"]:
    """Scores whose largest k are what lives: image pivots by strength, then what the pivots take,
    turn by turn."""
    at, there = pivots
    scores = torch.zeros_like(likeness[:, 0])
    # Image pivots come first, so a budget below their number keeps the strongest.
    falling = torch.arange(at.shape[1], 0, -1, device=k.device, dtype=scores.dtype)
    strength = falling.expand_as(at) + 1
    scores.scatter_(1, at, torch.where(there, strength, 0.0))
    # What is left of the budget is dealt out to the pivots of image and text alike.
    pool = mask & (scores == 0)
    left = (k - there.sum(1)).clamp(min=0)
    turns = real.sum(1)
    # Pivots take turns, each as many of the least similar as any other.
    share = left // turns.clamp(min=1)
    more = left % turns.clamp(min=1)  # the first pivots take one more
    place = real.cumsum(1) - 1
    for pivot in range(likeness.shape[1]):
        wanted = torch.where(real[:, pivot], share + (place[:, pivot] < more).long(), 0)
        taken = keep_top(-likeness[:, pivot], pool, wanted)
        scores = scores.masked_fill(taken, 1.0)
        pool = pool & ~taken
    return scores
