"""SparseVLM: after layers 2, 6 and 15, the visual tokens that the prompt's most visual words attend
to."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.budget import check_keep_ratio
from tprl.cost import LMShape
from tprl.lvlm.layer_drop import LayerStage, Look
from tprl.pruners.base import BasePruner
from tprl.pruners.recycling import recycle
from tprl.pruners.schedules import point, solve
from tprl.types import columns_of

# After layers 2, 6 and 15 of 32, how many of 576 tokens are chosen; by label.
LAYERS = (2, 6, 15)
PLUS = {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)}
FIRST = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}


class SparseVLMPruner(BasePruner):
    """Some words of the question, the raters, score the visual tokens by their attention; three
    times the best live.

    Source: SparseVLM (Zhang et al., arXiv 2410.04417), the rule of docs/baselines.md#sparsevlm,
    written from its description. Raters are the words after the last image whose share of a softmax
    over words of V Q^T, mean over visual tokens, is above the mean; they are chosen at the first
    drop from the language model's input and marked for the later ones. A score is the mean over
    heads and raters of softmax attention. Complexity per drop O(S D^2) for keys and O(T S D) for
    the rows of T raters; v1.5 adds O(p^2 D) among p recycled tokens. Ours differs in the budget:
    keep_ratio is the mean over what layers compute, solved for on a path through the published
    lists (log-linear between them, scaled below the smallest), where the reference counts a layer
    after its own drop; also in ties (lower index), positions (survivors keep theirs; v1.5 numbers
    them anew) and where no word is above the mean (all words rate, or the prompt's last token). The
    released "+" also divides attention by that of all-ones queries and keys, which ours leaves out.
    `published=True` takes the list with the nearest label (in v1.5 with what it recycles on top, as
    in the reference).

    Args:
        plus: SparseVLM+: only the heads (14 of 32, in proportion) in which raters attend most to
            visual tokens count. False is v1.5: the best 3 of 10 pruned tokens are clustered by
            density peaks and their centroids live on, within the budget (at least one token is not
            a centroid), each in the column of its cluster's center (reference: behind the visual
            tokens) and without noise on densities.
        published: see above.
    """

    name = "sparsevlm"
    extras: frozenset[str] = frozenset()

    def __init__(self, plus: bool = True, published: bool = False) -> None:
        self.plus, self.published = plus, published

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        """Drops after layers 2, 6 and 15 of 32; where a shallow model has two of them in one place,
        the later counts.

        Raises:
            UserError: no point of the path has this mean.
        """
        ratio = check_keep_ratio(keep_ratio)
        # First layer after each drop -> which of the three it is.
        drops = {round(layer * layers / 32) + 1: place for place, layer in enumerate(LAYERS)}
        drops = {before: place for before, place in drops.items() if before < layers}
        if ratio == 1:
            return ()
        # Published lists as fractions of 576 tokens, by ascending label.
        published = PLUS if self.plus else FIRST
        lists = {label: self._alive(published[label]) for label in sorted(published)}
        if self.published:
            keep = lists[min(lists, key=lambda label: abs(label - ratio * 576))]
        else:
            path = [*lists.values(), [1.0] * len(LAYERS)]

            def alive(x: float) -> list[float]:
                return [point(path, x)[place] for place in drops.values()]

            keep = point(path, solve(self.name, ratio, [*drops], layers, alive, float(len(path))))
        return tuple(LayerStage(before, before - 1, keep[place]) for before, place in drops.items())

    def _alive(self, chosen: tuple[int, ...]) -> list[float]:
        """Fractions that live, recycled ones included."""
        # v1.5 recycles 3 of 10 pruned tokens into a tenth of as many centroids.
        counts = [576]
        for k in chosen:
            counts.append(k if self.plus else k + (3 * (counts[-1] - k) // 10 + 1) // 10 + 1)
        return [count / 576 for count in counts[1:]]

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        at, real = columns_of(raters_of(look))
        # [B H R S] attention of the raters, averaged over them.
        rows = look.attention(at) * real[:, None, :, None]
        heads = rows.sum(2) / real.sum(1).clamp(min=1)[:, None, None]
        if self.plus:
            # The heads in which raters attend most to visual tokens.
            on_visual = (heads * look.visual.unsqueeze(1)).sum(2)
            best = on_visual.argsort(dim=1, descending=True, stable=True)
            best = best[:, : max(1, round(14 * heads.shape[1] / 32))]
            heads = heads.gather(1, best.unsqueeze(2).expand(-1, -1, heads.shape[2]))
        return heads.mean(1)

    def rewrite(
        self, look: Look, read: Look, k: Int[Tensor, "B S"]
    ) -> tuple[Look, Float[Tensor, "B S"]]:
        raters = raters_of(read)
        look, scores = look._replace(marked=raters), self.rank(read._replace(marked=raters), k)
        return (look, scores) if self.plus else recycle(look, scores, k)

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        """At most: as if all of the text rated."""
        # Keys of all tokens, queries of the raters, and the products of both.
        q, kv, tokens = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim, text + alive
        total = 2 * tokens * lm.width * kv + 2 * text * lm.width * q + 2 * text * tokens * q
        if stage.before == round(LAYERS[0] * lm.layers / 32) + 1:
            total += 2 * text * alive * lm.width  # V Q^T
        return total if self.plus else total + 2 * (3 * alive // 10 + 1) ** 2 * lm.width


def raters_of(look: Look) -> Bool[Tensor, "B S"]:
    """Those that the first drop marked; at the first drop, when all visual tokens are there, who
    they are."""
    raters = look.marked & look.real
    if not bool(raters.any()):
        after, seen = look.after, look.take(*columns_of(look.visual))
        # How much visual tokens look at each word; words above the mean rate.
        logits = seen.first.float() @ look.first.float().mT
        share = logits.masked_fill(~after.unsqueeze(1), torch.finfo(logits.dtype).min).softmax(-1)
        count = seen.visual.sum(1, keepdim=True).clamp(min=1)
        share = (share * seen.visual.unsqueeze(2)).sum(1) / count
        mean = (share * after).sum(1, keepdim=True) / after.sum(1, keepdim=True).clamp(min=1)
        raters = after & (share > mean)
        raters = torch.where(raters.any(1, keepdim=True), raters, after)
    # Without any word the prompt's last token rates; answer tokens stand behind it.
    column = torch.arange(raters.shape[1], device=raters.device)
    last = raters.shape[1] - 1 - int(look.answer[0].sum())
    raters = torch.where(raters.any(1, keepdim=True), raters, column == last)
    return raters & look.visual.any(1, keepdim=True)
