"""keep_ratio -> number of visual tokens: the one rounding rule for every method."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tprl.errors import UserError
from tprl.types import Encoded


def check_keep_ratio(keep_ratio: object) -> float:
    """`keep_ratio` as a float in (0, 1]; it is the *kept* fraction of *visual* tokens, everywhere.

    Raises:
        UserError: not a number, or outside (0, 1].
    """
    try:
        value = float(keep_ratio)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise UserError(f"keep_ratio must be a number in (0, 1], got {keep_ratio}; use e.g. 0.333.")
    return value


def budget(keep_ratio: float, n: int) -> int:
    """Tokens kept out of `n` visual tokens: max(1, floor(keep_ratio * n + 0.5)); 0 where there are
    none."""
    return max(1, math.floor(check_keep_ratio(keep_ratio) * n + 0.5)) if n else 0


def budgets(keep_ratio: float, visual_mask: Bool[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """`budget` of every sample, counting its unpadded visual tokens."""
    # Rounded in Python, in float64: float32 would round 0.7 of 5 tokens to 3.
    counts = [budget(keep_ratio, n) for n in visual_mask.sum(1).tolist()]
    return torch.tensor(counts, dtype=torch.long, device=visual_mask.device)


def need_ratio(name: str, keep_ratio: float | None) -> float:
    """`keep_ratio`, checked, for a method that cannot decide by itself how many tokens to keep.

    Raises:
        UserError: None, not a number, or outside (0, 1].
    """
    if keep_ratio is None:
        raise UserError(f"{name} needs a keep_ratio in (0, 1], got None; use e.g. 0.333.")
    return check_keep_ratio(keep_ratio)


def keep_top(
    scores: Shaped[Tensor, "B V"], mask: Bool[Tensor, "B V"], k: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """The `k[b]` highest-scored valid tokens of each sample; ties go to the lower index.

    A stable sort, because `topk` breaks ties arbitrarily on CPU (docs/baselines.md#what-surprises).
    """
    filled = scores.float().masked_fill(~mask, -torch.inf)
    order = filled.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # The rank of each token: the inverse of the order.
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < k.unsqueeze(1)) & mask


class Rows(NamedTuple):
    """A batch seen as one row per image (I rows, W tokens of the largest image), because budgets
    are per image; or as one row per view, for methods that work on grids.

    A selector that works on [I, W] needs to know nothing of samples; `join` brings its decision
    back to [B, V].
    """

    sample: Int[Tensor, " I"]  # the row of the batch that each image belongs to
    at: Int[Tensor, "I W"]  # index in V of each token; 0 where padded
    mask: Bool[Tensor, "I W"]

    def split(self, x: Shaped[Tensor, "B V ..."]) -> Shaped[Tensor, "I W ..."]:
        """Per-token values of the batch as rows of images; padded entries hold an arbitrary token's
        value."""
        return x[self.sample.unsqueeze(1), self.at]

    def tokens(self, encoded: Encoded) -> Float[Tensor, "I W D"]:
        """`split(encoded.visual)`, copied once; padded entries hold an arbitrary token's values
        too."""
        return encoded.embeds[self.sample.unsqueeze(1), self.split(encoded.visual_at)]

    def pairs(self, x: Shaped[Tensor, "B V V"]) -> Shaped[Tensor, "I W W"]:
        """Values per pair of tokens, for the pairs within each image."""
        return x[self.sample[:, None, None], self.at.unsqueeze(2), self.at.unsqueeze(1)]

    def join(
        self, values: Shaped[Tensor, "I W"], like: Shaped[Tensor, "B V"]
    ) -> Shaped[Tensor, "B V"]:
        """Per-token values [I, W] as one tensor shaped as `like` [B, V]; 0 (or False) on
        padding."""
        joined = values.new_zeros(like.shape)
        image, token = self.mask.nonzero(as_tuple=True)
        joined[self.sample[image], self.at[image, token]] = values[image, token]
        return joined

    def budgets(self, keep_ratio: float) -> Int[Tensor, " I"]:
        """`budget` of every image."""
        return budgets(keep_ratio, self.mask)


def image_rows(visual_mask: Bool[Tensor, "B V"], image_of: Int[Tensor, "B V"]) -> Rows:
    """The images of a batch, in the order of the samples and of the images in each (contiguous in
    V)."""
    # One entry per valid token, in the order of samples and of V.
    sample, at = visual_mask.nonzero(as_tuple=True)
    image = image_of[sample, at]
    # A new image begins where the sample or the image's number changes.
    first = torch.ones_like(sample, dtype=torch.bool)
    first[1:] = (sample[1:] != sample[:-1]) | (image[1:] != image[:-1])
    row, start = first.cumsum(0) - 1, first.nonzero().squeeze(1)
    # Place of each token within its image: the column of its row.
    rank = torch.arange(len(row), device=row.device) - start[row]
    shape = (len(start), int(rank.max()) + 1 if len(rank) else 0)
    columns, mask = at.new_zeros(shape), visual_mask.new_zeros(shape)
    columns[row, rank], mask[row, rank] = at, True
    return Rows(sample=sample[start], at=columns, mask=mask)


def view_rows(encoded: Encoded, keep_ratio: float) -> tuple[Rows, tuple[tuple[int, int, int], ...]]:
    """One row per view (an image, or each of its crops), and (rows, columns, budget) of each.

    The budget is the image's, divided among its views by their tokens (largest remainders, ties to
    the earlier view).

    Raises:
        ValueError: an image has more or fewer tokens than its grids have cells.
    """
    images = image_rows(encoded.visual_mask, encoded.image_of)
    view_of = torch.zeros_like(encoded.image_of)
    shapes: list[tuple[int, int, int]] = []
    # Cells of all views of an image are its tokens, in that order.
    all_views = [views for sample in encoded.grids for views in sample]
    for views, n in zip(all_views, images.mask.sum(1).tolist(), strict=True):
        cells = [rows * columns for rows, columns in views]
        if n != sum(cells):
            grid = " and ".join(f"{rows} x {columns}" for rows, columns in views)
            raise ValueError(
                f"an image has {n} visual tokens on a grid of {grid}: they must be equal."
            )
        # The image's budget is rounded once, then divided: views must not round each for itself.
        shares = _shares(budget(keep_ratio, n), cells)
        shapes += [(*view, share) for view, share in zip(views, shares, strict=True)]
    sizes = [rows * columns for rows, columns, _ in shapes]
    cells = torch.tensor(sizes, dtype=torch.long, device=view_of.device)
    # A mask is filled in the order of samples, images, views and tokens, which is that of `shapes`.
    numbers = torch.arange(len(shapes), device=view_of.device)
    view_of[encoded.visual_mask] = numbers.repeat_interleave(cells)
    return image_rows(encoded.visual_mask, view_of), tuple(shapes)


def _shares(k: int, sizes: Sequence[int]) -> list[int]:
    """k divided in proportion to `sizes`, none above its size."""
    total = sum(sizes)
    shares = [k * size // total for size in sizes]
    # Largest remainders get one more; `sorted` is stable, so ties go to the earlier one.
    order = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in order[: k - sum(shares)]:
        shares[i] += 1
    return shares


def keep_top_per_image(
    scores: Shaped[Tensor, "B V"], encoded: Encoded, keep_ratio: float
) -> Bool[Tensor, "B V"]:
    """The `budget(keep_ratio, n)` highest-scored of the n tokens of each image; ties go to the
    lower index."""
    rows = image_rows(encoded.visual_mask, encoded.image_of)
    keep = keep_top(rows.split(scores), rows.mask, rows.budgets(keep_ratio))
    return rows.join(keep, encoded.visual_mask)
