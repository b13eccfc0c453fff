"""Bounds of what a processor makes of an image: pixels of one that it resizes, tiles of one that it
cuts up."""

from typing import Any, ClassVar

from tprl.errors import UserError

MEANINGS = {
    "max_pixels": "pixels that an image is scaled to",
    "max_tiles": "tiles that an image is cut into",
}


class Limits:
    """The half of `FrozenLVLM` that bounds visual tokens. A large photograph is 3,328 tokens for
    InternVL3 and up to 16,384 for Qwen2.5-VL, and a policy, its demonstrations and every selector
    pay for all of them.

    Families say in `bounds` which of them their processor can follow; one that cuts images into
    tiles has a `limit_tiles(most)`, the thumbnail not counted.
    """

    name: str
    model: Any
    processor: Any
    bounds: ClassVar[frozenset[str]] = frozenset()  # those of `MEANINGS` that this family has

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "max_tiles" in cls.bounds and not hasattr(cls, "limit_tiles"):
            raise TypeError(
                f"{cls.__name__} has the bound max_tiles and no limit_tiles(most) that sets it."
            )

    def limit(self, max_pixels: int | None, max_tiles: int | None) -> None:
        """Set the bounds that are given.

        Raises:
            UserError: one that this family does not have, that is less than 1, or smaller than its
                smallest image.
        """
        for option, most in (("max_pixels", max_pixels), ("max_tiles", max_tiles)):
            if most is None:
                continue
            if most < 1:
                raise UserError(f"model.{option} must be at least 1, got {most}; leave it out.")
            if option not in self.bounds:
                other = next(
                    (f"set model.{bound} instead" for bound in sorted(self.bounds)), "leave it out"
                )
                raise UserError(
                    f"model.{option} bounds the {MEANINGS[option]}, and the "
                    f"processor of {self.name} has no such bound: {other}."
                )
            getattr(self, f"limit_{option.removeprefix('max_')}")(most)

    def limit_pixels(self, most: int) -> None:
        """Scale larger images down to at most so many pixels."""
        images = self.processor.image_processor
        sizes = dict(images.size)
        least = sizes["shortest_edge"]
        if most < least:
            raise UserError(
                f"model.max_pixels={most} is less than the {least} pixels that the "
                f"processor of {self.name} enlarges small images to: give {least} or more."
            )
        images.size = {**sizes, "longest_edge": most}
