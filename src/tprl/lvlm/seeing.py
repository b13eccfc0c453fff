"""The vision side, a few images at a time: memory does not grow with the batch."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch

from tprl.errors import UserError
from tprl.lvlm.batching import Seen, pick_images
from tprl.lvlm.listening import WORD_ATTENTION
from tprl.lvlm.standing import StandingIn
from tprl.runtime import memory

log = logging.getLogger(__name__)


class Seeing(StandingIn):
    """The half of `FrozenLVLM` that looks at images.

    Attributes:
        see: the tower and the projector on some images, of the family.
        rows_per_image: how many rows of the pixels are each image's, of the family.
        look_again: `Encoded.look`, of families that see images of other sizes; they know the extra
            "pixels".
        bounds: see `Limits`.
        values_at_once: pixel values in one pass.
    """

    name: str
    see: Callable[..., Seen]
    rows_per_image: Callable[[Mapping[str, Any]], list[int]]
    look_again: Any = None
    bounds: ClassVar[frozenset[str]]
    sees: ClassVar[str] = "sees tiles of one size"  # why, where "pixels" is not known
    values_at_once: int = int(memory.WORKING * memory.GIB) // memory.PER_PIXEL_VALUE

    def check_extras(self, extras: frozenset[str], known: frozenset[str]) -> None:
        """Refuse extras that are not among `known` ones.

        Raises:
            UserError: there is one.
        """
        missing = extras - known - {WORD_ATTENTION}  # every family has a language model
        if "pixels" in missing:
            bounds = [f"bound them with model.{bound}" for bound in sorted(self.bounds)]
            remedy = "use another pruner, or " if bounds else "use another pruner"
            raise UserError(
                f"{self.name} {self.sees}: there are no pixels of a token, and no image can be "
                f"scaled to fewer tokens; "
                f"{remedy}{''.join(bounds)}."
            )
        if "patch_embeds" in missing:
            raise UserError(
                f"{self.name} makes its tokens of patches on a grid, by squares that are joined or "
                "crops whose padding is cut off, and patches that merge inside the tower leave no "
                "grid: use another pruner."
            )
        if missing:
            raise UserError(
                f"{self.name} cannot provide {sorted(missing)}: it knows {sorted(known)}."
            )

    def look(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        """`see`, a few images at a time: memory does not grow with the batch. Where GPU memory ends
        it starts again with half as many pixel values as did not fit, and goes on so.

        Raises:
            UserError: there is not enough for one image.
        """
        rows, read = self.rows_per_image(pixels), self.sources(extras)
        while True:
            parts: list[Seen] = []
            chunks = image_chunks(pixels, rows, self.values_at_once)
            try:
                for chunk in chunks:
                    parts.append(self.see(pick_images(pixels, rows, chunk), read))
                return self.complete(join_seen(parts), extras)
            except torch.OutOfMemoryError as error:
                failed = chunks[min(len(parts), len(chunks) - 1)]
                if len(failed) == 1:
                    raise UserError(
                        f"{self.name} has no memory to see a single image: use "
                        "model.max_pixels or model.max_tiles, model.load_in=4bit, "
                        "model.placement=shard or a GPU with more memory."
                    ) from error
            # Here and not above: while an error is handled, its frames hold on to what filled the
            # memory.
            parts.clear()
            # Half of what was tried, which may be far below the bound: else the same images would
            # be tried again.
            values = sum(rows[image] for image in failed) * values_per_row(pixels)
            self.values_at_once = min(self.values_at_once, values) // 2
            torch.cuda.empty_cache()
            log.warning(
                "out of memory with %d images: from here on about half as many at a time",
                len(failed),
            )


def values_per_row(pixels: Mapping[str, Any]) -> int:
    """Pixel values in a row of `pixel_values`."""
    return pixels["pixel_values"][0].numel()


def image_chunks(pixels: Mapping[str, Any], rows: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive images, as many together as have `most` pixel values; a larger image is alone."""
    # Greedy in the given order, so that parts join in the order of the images.
    each = values_per_row(pixels)
    chunks: list[list[int]] = [[]]
    values = 0
    for image, count in enumerate(rows):
        if chunks[-1] and values + count * each > most:
            chunks.append([])
            values = 0
        chunks[-1].append(image)
        values += count * each
    return chunks


def join_seen(parts: Sequence[Seen]) -> Seen:
    """What was seen of consecutive images, as one."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def together(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else list(chain.from_iterable(values))

    # Image by image, all fields alike; the tower is the same in all parts.
    extras: dict[str, list[torch.Tensor]] = {}
    for name in first.extras:
        extras[name] = list(chain.from_iterable(part.extras[name] for part in parts))
    lists = {name: together(name) for name in ("tokens", "views", "tiles", "deep", "separators")}
    return Seen(**lists, extras=extras, tower=first.tower)
