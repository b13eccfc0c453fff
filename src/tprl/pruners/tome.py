"""ToMe: alike tokens merge inside the vision tower, some in every block."""

import torch

from tprl.budget import budget, need_ratio, rows_of
from tprl.cost import LVLMShape, encoder_layer_flops, mlp_flops
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.pruners.bipartite import clipped, merged_tower, schedule
from tprl.types import Encoded, TokenSelection


class ToMePruner(BasePruner):
    """In each block, between attention and MLP, the r tokens of even index that are most like one
    of odd index join it.

    Source: Token Merging (Bolya et al., arXiv 2210.09461), the rule of docs/baselines.md#tome,
    written from its description. Likeness is the cosine of keys that were averaged over heads. A
    merged token is the mean of all its patches, and the logits of attention to it grow by the log
    of their number. CLS has index 0 and never merges. What is left of the tower's features is
    projected. `Encoded` shares no pass of the tower with merging in it, so each `select` runs the
    blocks again on extras["patch_embeds"]; needs `Encoded.tower` and `Encoded.project`. Complexity
    O(n^2 c) per block with heads of width c, blocks in sequence.

    Our default leaves exactly k = budget() tokens: the smallest constant r that can remove enough,
    the last blocks merging fewer; a k that even halving in every block does not reach is refused.
    At k = n the image stays untouched. `published` merges the constant r in each block used (16 x
    23 leaves 208 of 576), and a keep_ratio is checked, then ignored. A survivor stands at the place
    of the token that the others joined, in raster order (the reference leaves even, then odd
    tokens). Likeness is computed in double, compared in single precision, ties go to the lower
    index.

    Args:
        published: merge `r` tokens per block, whatever the keep_ratio.
        r: read with `published` only; fewer merge where fewer than r can.
    """

    name = "tome"
    extras: frozenset[str] = frozenset({"patch_embeds"})

    def __init__(self, published: bool = False, r: int = 16) -> None:
        if r < 0:
            raise UserError(f"r must be at least 0, got {r}; use e.g. 16.")
        self.published = self.decides_alone = published
        self.r = r

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Exactly `budget(keep_ratio, n)` tokens of each image, or with `published` what r leaves.

        Raises:
            UserError: `keep_ratio` is None without `published`, not in (0, 1] or out of reach, or
                there is no tower.
        """
        ratio = 1.0 if self.published and keep_ratio is None else need_ratio(self.name, keep_ratio)
        images, tower = rows_of(encoded), encoded.tower
        if not len(images.sample):
            return TokenSelection(keep=encoded.visual_mask)
        if tower is None or encoded.project is None:
            raise UserError(
                "these prompts have no vision tower (Encoded.tower) "
                "for tome to run again: use divprune."
            )
        # How many tokens merge in each block follows from the counts alone.
        counts, k = images.mask.sum(1).tolist(), images.budgets(ratio).tolist()
        has_cls, blocks = tower.cls is not None, len(tower.blocks)
        merges = [self._merges(n, kept, blocks, has_cls) for n, kept in zip(counts, k, strict=True)]
        # [I L] merges of each image in each block.
        plan = torch.tensor(merges, dtype=torch.long, device=images.mask.device)
        plan = plan.reshape(len(counts), blocks)
        if not bool(plan.any()):
            return TokenSelection(keep=encoded.visual_mask)
        patches = images.split(encoded.extras["patch_embeds"])
        tokens = merged_tower(tower, patches, images.mask, plan)
        # Survivors but CLS, each at the place of the token that the others joined.
        image, slot = ((tokens.size > 0) & (tokens.place >= 0)).nonzero(as_tuple=True)
        row, at = images.sample[image], images.at[image, tokens.place[image, slot]]
        keep = torch.zeros_like(encoded.visual_mask)
        keep[row, at] = True
        # Only images in which something merges: the others keep the embeddings they had.
        merged = encoded.visual
        new = plan.any(1)[image]
        projected = encoded.project(tokens.x[image[new], slot[new]])
        merged[row[new], at[new]] = projected.to(merged.dtype)
        return TokenSelection(keep=keep, merged=merged)

    def check_reach(self, keep_ratio: float | None, shape: LVLMShape) -> None:
        """Refuse what `select` would refuse on an LVLM of this shape.

        Raises:
            UserError: see `select`.
        """
        if not self.published:
            v = shape.vision
            kept = budget(need_ratio(self.name, keep_ratio), v.patches)
            self._merges(v.patches, kept, v.used, v.cls)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """What matching costs less what the tower's used blocks and the projector save, as if all
        ran once: negative where tokens merge early. (`select` runs the blocks a second time because
        evaluations share encodings.)"""
        v = shape.vision
        left, spent = tokens + v.cls, 0
        # A block attends to what it gets, matches half with half, and feeds what is left.
        for r in self._merges(tokens, kept, v.used, v.cls):
            matching = 2 * (left // 2) * (left - left // 2) * (v.width // v.heads) if r else 0
            spent += encoder_layer_flops(v.width, 0, left) + matching
            left -= r
            spent += mlp_flops((v.width, v.mlp, v.width), left)
        full = v.used * encoder_layer_flops(v.width, v.mlp, tokens + v.cls)
        return spent - full - mlp_flops(shape.projector, tokens + v.cls - left)

    def _merges(self, n: int, k: int, blocks: int, has_cls: bool) -> tuple[int, ...]:
        if self.published:
            return clipped(n, self.r, n, blocks, has_cls)
        return schedule(n, k, blocks, has_cls)
