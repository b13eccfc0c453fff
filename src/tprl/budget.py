"""keep_ratio -> number of visual tokens: the one rounding rule for every method."""

import math
from collections.abc import Sequence
from itertools import chain, pairwise
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


def core_budget(share: float, kept: int) -> int:
    """Tokens of the core among `kept` ones of an image: floor(share * kept + 0.5)."""
    return math.floor(share * kept + 0.5)


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
    """The `k[b]` highest-scored valid tokens of each sample; ties go to the lower index. `k` may be
    on the host.

    A stable sort, because `topk` breaks ties arbitrarily on CPU (docs/baselines.md#what-surprises).
    """
    filled = scores.float().masked_fill(~mask, -torch.inf)
    order = filled.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # The rank of each token: the inverse of the order.
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < k.to(mask.device).unsqueeze(1)) & mask


class Rows(NamedTuple):
    """A batch seen as one row per image (I rows, W tokens of the largest image), because budgets
    are per image; or as one row per view, for methods that work on grids.

    A selector that works on [I, W] needs to know nothing of samples; `join` brings its decision
    back to [B, V]. What is a plain number is known without a wait for the device.
    """

    sample: Int[Tensor, " I"]  # the row of the batch that each image belongs to
    at: Int[Tensor, "I W"]  # index in V of each token; 0 where padded
    mask: Bool[Tensor, "I W"]
    sizes: tuple[int, ...]  # tokens of each image
    owners: tuple[int, ...]  # `sample` as plain numbers
    real: Int[Tensor, " N"]  # where `mask` is True, in the flattened rows

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
        joined = values.new_zeros(like.numel())
        place = (self.sample.unsqueeze(1) * like.shape[1] + self.at).flatten()[self.real]
        joined[place] = values.flatten()[self.real]
        return joined.view(like.shape)

    def budgets(self, keep_ratio: float) -> Int[Tensor, " I"]:
        """`budget` of every image."""
        return self.kept(keep_ratio).to(self.mask.device)

    def kept(self, keep_ratio: float) -> Int[Tensor, " I"]:
        """`budgets` on the host, where the largest of them can be asked for without a wait."""
        return torch.tensor([budget(keep_ratio, n) for n in self.sizes], dtype=torch.long)


def image_rows(visual_mask: Bool[Tensor, "B V"], image_of: Int[Tensor, "B V"]) -> Rows:
    """The images of a batch, in the order of the samples and of the images in each (contiguous in
    V). The host waits for the device once; of a whole batch, `rows_of` does not."""
    # -1 where there is no token: mask and images in one transfer.
    host = torch.where(visual_mask, image_of, -1).cpu()
    sample, at = (host >= 0).nonzero(as_tuple=True)
    image = host[sample, at]
    # A new image begins where the sample or the image's number changes.
    first = torch.ones_like(sample, dtype=torch.bool)
    first[1:] = (sample[1:] != sample[:-1]) | (image[1:] != image[:-1])
    start = first.nonzero().squeeze(1)
    edges = [*start.tolist(), len(at)]
    sizes = [end - begin for begin, end in pairwise(edges)]
    return _rows(sample[start].tolist(), sizes, at, visual_mask.device)


def rows_of(encoded: Encoded) -> Rows:
    """`image_rows` of a whole batch."""
    images = [sample.images for sample in encoded.counts]
    return rows_by_size(images, encoded.visual_mask.device)


def rows_by_size(images: Sequence[Sequence[int]], device: torch.device) -> Rows:
    """The images of a batch by the number of their tokens, which follow each other in V; nothing
    waits for the device."""
    owners = [b for b, sample in enumerate(images) for n in sample if n]
    sizes = [n for sample in images for n in sample if n]
    columns = [torch.arange(sum(sample)) for sample in images]
    at = torch.cat(columns) if columns else torch.zeros(0, dtype=torch.long)
    return _rows(owners, sizes, at, device)


def _rows(
    owners: Sequence[int], sizes: Sequence[int], at: Int[Tensor, " N"], device: torch.device
) -> Rows:
    """Rows of images with `sizes` tokens, whose columns in V are `at`, image after image."""
    width = max(sizes, default=0)
    mask = torch.arange(width) < torch.tensor(sizes, dtype=torch.long).unsqueeze(1)
    # A mask is filled row by row, which is the order of `at`.
    columns = torch.zeros(mask.shape, dtype=torch.long)
    columns[mask] = at
    real = mask.flatten().nonzero().squeeze(1)
    sample = torch.tensor(owners, dtype=torch.long).to(device)
    there = columns.to(device), mask.to(device)
    return Rows(sample, *there, tuple(sizes), tuple(owners), real.to(device))


def view_rows(encoded: Encoded, keep_ratio: float) -> tuple[Rows, tuple[tuple[int, int, int], ...]]:
    """One row per view (an image, or each of its crops), and (rows, columns, budget) of each.

    The budget is the image's, divided among its views by their tokens (largest remainders, ties to
    the earlier view).

    Raises:
        ValueError: an image has more or fewer tokens than its grids have cells.
    """
    images = rows_of(encoded)
    shapes: list[tuple[int, int, int]] = []
    # Cells of all views of an image are its tokens, in that order.
    all_views = list(chain.from_iterable(encoded.grids))
    for views, n in zip(all_views, images.sizes, strict=True):
        cells = [rows * columns for rows, columns in views]
        if n != sum(cells):
            grid = " and ".join(f"{rows} x {columns}" for rows, columns in views)
            raise ValueError(
                f"an image has {n} visual tokens on a grid of {grid}: they must be equal."
            )
        # The image's budget is rounded once, then divided: views must not round each for itself.
        shares = _shares(budget(keep_ratio, n), cells)
        shapes += [(*view, share) for view, share in zip(views, shares, strict=True)]
    # Views follow each other in V as images do: by their cells they are rows of their own.
    by_sample = []
    for sample in encoded.grids:
        by_sample.append([rows * columns for rows, columns in chain.from_iterable(sample)])
    return rows_by_size(by_sample, encoded.visual_mask.device), tuple(shapes)


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
    rows = rows_of(encoded)
    keep = keep_top(rows.split(scores), rows.mask, rows.budgets(keep_ratio))
    return rows.join(keep, encoded.visual_mask)
