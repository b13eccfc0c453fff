"""A smaller image instead of fewer of its tokens: what a user would do without a pruner."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from tprl.budget import need_ratio, rows_of
from tprl.cost import Grid, LVLMShape
from tprl.errors import UserError
from tprl.lvlm.patches import whole
from tprl.pruners.base import BasePruner
from tprl.types import Encoded, TokenSelection


class Scaled(NamedTuple):
    """An image that is to be seen smaller: where it stands, and the grids of its tokens before and
    after."""

    sample: int
    at: Int[Tensor, " N"]  # in V, raster order
    before: Grid
    after: Grid


class ResizePruner(BasePruner):
    """The image scaled down to h x w visual tokens, h w <= k = budget(), and seen anew by the whole
    vision side.

    Source: folklore; what `max_pixels` of a processor does, or an image made smaller by hand. h and
    w are those of the image's own grid times one scale, each rounded down or up, with the largest
    product (see `fit`): often a few less than k, never more. Pixels are scaled as the processor
    made them, bicubic with antialiasing. CLIP and SigLIP towers of a fixed grid read them by the
    stock class's `interpolate_pos_encoding=True`; Qwen's read any grid. `Encoded` shares nothing of
    it, so each `select` runs the tower again on extras["pixels"]; needs `Encoded.look`. Families
    that cut images into tiles are refused. At k = n the image stays untouched.

    Args:
        positions: "compact" as in a prompt with the smaller image (a shorter one; with M-RoPE a
            smaller grid), "keep" for the place of the token in the middle of what a new one stands
            for.

    Raises:
        UserError: unknown positions.
    """

    name = "resize"
    extras: frozenset[str] = frozenset({"pixels"})
    replaces_tokens = shows_smaller_images = True

    def __init__(self, positions: str = "compact") -> None:
        if positions not in ("compact", "keep"):
            raise UserError(f"pruner.positions must be compact or keep, got {positions}.")
        self.positions = positions

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Replace the tokens of each image by at most `budget(keep_ratio, n)` ones of a smaller
        copy: keep is False on them, extra holds the new ones.

        Raises:
            UserError: `keep_ratio` is None or not in (0, 1], or the prompts come without a vision
                side.
        """
        images = _scaled(encoded, need_ratio(self.name, keep_ratio))
        if images and encoded.look is None:
            raise UserError(
                "these prompts have no vision side (Encoded.look) "
                "for resize to run again: use pooling."
            )
        # An image that gets smaller loses all of its tokens; the others stay untouched.
        keep = encoded.visual_mask.clone()
        for image in images:
            keep[image.sample, image.at] = False
        tokens, deep = _seen(encoded, images)
        # A new token stands at the old one in the middle of what it covers.
        extra_at = [image.at[_centers(image)] for image in images]
        live = [torch.ones_like(at, dtype=torch.bool) for at in extra_at]
        # Where no image gets smaller there are none, and not None: parts of a batch are of a kind.
        extra_deep = None
        if encoded.deep is not None:
            extra_deep = _joined(images, deep or [], encoded.deep[:, :0])
        return TokenSelection(
            keep=keep,
            extra=_joined(images, tokens, encoded.embeds[:, :0]),
            extra_at=_joined(images, extra_at, encoded.visual_at[:, :0]),
            extra_mask=_joined(images, live, encoded.visual_mask[:, :0]),
            extra_deep=extra_deep,
            positions=_positions(encoded, images) if self.positions == "compact" else None,
        )

    def tiles(self, shape: LVLMShape, tiles: Sequence[Grid], kept: int) -> tuple[Grid, ...]:
        """(rows, columns) of patches that the tower sees of an image of which so many tokens are
        left."""
        merge = shape.vision.merge
        sizes = [fit(rows // merge, columns // merge, kept) for rows, columns in tiles]
        return tuple((rows * merge, columns * merge) for rows, columns in sizes)

    def flops(self, shape: LVLMShape, tokens: int, kept: int) -> int:
        """Nothing beside `tiles`, which the tower and the projector see instead of the whole image:
        resampling is no matrix product. (`select` runs the tower a second time because evaluations
        share encodings.)"""
        return 0


@lru_cache(maxsize=4096)
def fit(rows: int, columns: int, k: int) -> Grid:
    """The largest (h, w) with h w <= k whose sides are `rows` and `columns` times one scale, each
    rounded down or up.

    Of equally large ones the nearest in shape, then the higher. `fit(rows, columns, h * w)` is (h,
    w) again.
    """
    best, size = (0, 0.0, 0), (1, 1)
    for h in range(1, min(rows, k) + 1):
        # Some scale s has |h - s rows| < 1 and |w - s columns| < 1.
        w = min(columns, k // h, ((h + 1) * columns - 1) // rows + 1)
        if (h - 1) * columns >= (w + 1) * rows:
            continue
        # Most tokens, then the nearest shape (rounded, so that ties tie), then the higher.
        rank = (h * w, -round(abs(math.log(rows * w / (columns * h))), 9), h)
        if rank > best:
            best, size = rank, (h, w)
    return size


def _scaled(encoded: Encoded, keep_ratio: float) -> list[Scaled]:
    """The images that get smaller, in the order of samples and of the images in each."""
    images = rows_of(encoded)
    counts, k = images.mask.sum(1).tolist(), images.budgets(keep_ratio).tolist()
    # One grid per image: families that cut images into tiles are refused.
    grids = [views[-1] for views in chain.from_iterable(encoded.grids)]
    smaller = []
    for number, sample in enumerate(images.sample.tolist()):
        after = fit(*grids[number], k[number])
        if after != grids[number]:
            at = images.at[number, : counts[number]]
            smaller.append(Scaled(sample, at, grids[number], after))
    return smaller


def _seen(encoded: Encoded, images: Sequence[Scaled]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Tokens of the smaller images, and what deeper layers add to them."""
    if not images or encoded.look is None:
        return [], None
    pixels = encoded.extras["pixels"]
    return encoded.look([_smaller(pixels[image.sample, image.at], image) for image in images])


def _smaller(squares: Float[Tensor, "N 3 y x"], image: Scaled) -> Float[Tensor, "3 Y X"]:
    (high, wide), side = image.after, squares.shape[-1]
    pixels = whole(squares.float(), *image.before).unsqueeze(0)
    return interpolate(pixels, (high * side, wide * side), mode="bicubic", antialias=True)[0]


def _centers(image: Scaled) -> Int[Tensor, " K"]:
    """The cell of the grid before that holds the center of each cell of the one after."""
    (rows, columns), (high, wide) = image.before, image.after
    # (i + 1/2) rows / high, rounded down, in integers; columns alike.
    down = (2 * torch.arange(high, device=image.at.device) + 1) * rows // (2 * high)
    across = (2 * torch.arange(wide, device=image.at.device) + 1) * columns // (2 * wide)
    return (down.unsqueeze(1) * columns + across).flatten()


def _positions(encoded: Encoded, images: Sequence[Scaled]) -> Int[Tensor, "P B _"]:
    """Where everything stands in a prompt with the smaller images: what follows an image moves up
    by as much as the image got shorter; with several axes (M-RoPE) an image is as long as its
    longer side."""
    positions = encoded.positions.clone()
    starts = []  # [K P] of each image: where its new tokens stand
    axes = len(positions)
    for image in images:
        # New tokens begin where the old image begins.
        columns = encoded.visual_at[image.sample, image.at]
        new = _within(image.after, axes).to(positions)
        starts.append((positions[:, image.sample, columns[0]].unsqueeze(1) + new).T)
        # All that follows moves up by the difference of the longest sides.
        shift = _within(image.before, axes).max() - new.max()
        behind = slice(int(columns[-1]) + 1, None)
        positions[:, image.sample, behind] -= shift.to(positions)
    # [P B S] of the prompt, then [P B E] of the new tokens.
    empty = positions[..., :0].movedim(0, 2)
    return torch.cat([positions, _joined(images, starts, empty).movedim(2, 0)], 2)


def _within(grid: Grid, axes: int) -> Int[Tensor, "P N"]:
    """Positions of the tokens of an image, from that of its first."""
    rows, columns = grid
    token = torch.arange(rows * columns)
    if axes == 1:
        return token.unsqueeze(0)
    return torch.stack([torch.zeros_like(token), token // columns, token % columns])


def _joined(
    images: Sequence[Scaled], values: Sequence[Tensor], empty: Shaped[Tensor, "B 0 ..."]
) -> Tensor:
    """[B E ...] what the new tokens of each image hold, image by image, zero where padded."""
    rows = list(empty)
    for image, value in zip(images, values, strict=True):
        rows[image.sample] = torch.cat([rows[image.sample], value.to(empty)])
    return pad_sequence(rows, batch_first=True)
