"""Images as the cells that their visual tokens stand for, and back."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def cells(images: Shaped[Tensor, "... 3 Y X"], side: int) -> Shaped[Tensor, "... N 3 y x"]:
    """The squares of `side` pixels that tile images, in raster order; what is left over at the
    right and below is not among them, as a convolution without padding leaves it out."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    tiled = (
        images[..., : rows * side, : columns * side]
        .unflatten(-1, (columns, side))
        .unflatten(-3, (rows, side))
    )
    # [... 3 rows y columns x] to [... rows columns 3 y x].
    return tiled.movedim((-4, -2), (-5, -4)).flatten(-5, -4)


def whole(squares: Float[Tensor, "N 3 y x"], rows: int, columns: int) -> Float[Tensor, "3 Y X"]:
    """The image that `cells` took apart."""
    tiled = squares.unflatten(0, (rows, columns))
    return tiled.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def merged_cells(
    patches: Float[Tensor, "P c"], merge: int, frames: int, side: int
) -> Float[Tensor, "N 3 y x"]:
    """The cell of each visual token of patches as Qwen's processors order them: those of a token,
    `merge` x `merge`, follow each other, each as channels, frames, rows and columns of `side`
    pixels; frames of an image are copies."""
    tokens = patches.view(
        -1, merge, merge, patches.shape[-1] // (frames * side**2), frames, side, side
    )[:, :, :, :, 0]
    return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patches_of(squares: Float[Tensor, "N 3 y x"], merge: int, frames: int) -> Float[Tensor, "P c"]:
    """The patches that `merged_cells` put together."""
    parts = squares.unflatten(-1, (merge, -1)).unflatten(-3, (merge, -1)).permute(0, 2, 4, 1, 3, 5)
    return torch.stack([parts] * frames, 4).flatten(3).flatten(0, 2)
