"""Shapes of images that a family's own processor refuses: one row's fault, and never the end of a
run."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from tprl.errors import UserError
from tprl.types import Box, Sample

REASON = "image shape that the model refuses"
# Only these are tried beforehand; any other shape is one that processors are made for.
LONG, SMALL = 20, 32  # longer side in shorter sides; pixels of the shorter side
ENLARGED = 2**26  # pixels that a processor may blow an image up to: strips end in gigabytes
REFUSALS = (
    ValueError,
    RuntimeError,
    ZeroDivisionError,
    IndexError,
    TypeError,
    OSError,
    MemoryError,
    OverflowError,
)


class ReadsShapes:
    """Says which images a model's processor refuses. Mixed into what has `processor` and `name`."""

    processor: Any
    name: str

    def refusal(self, sample: Sample) -> tuple[str, str] | None:
        """Why the images of a sample cannot be read, as (reason, detail); None where they can.

        Images of an unusual shape go through the processor once per size; what it refuses depends
        on nothing else.
        """
        if not hasattr(self, "_refusals"):
            self._refusals: dict[tuple[int, int], str] = {}
        for image in sample.images:
            if not _unusual(image.size):
                continue
            # One try per size for the whole run.
            if image.size not in self._refusals:
                self._refusals[image.size] = _refused(self.processor, image.size)
            why = self._refusals[image.size]
            if why:
                width, height = image.size
                return REASON, (
                    f"{self.name} cannot read {width} x {height} "
                    f"pixels ({why}); crop or pad the image"
                )
        return None

    def check_shapes(self, samples: Sequence[Sample], error: Exception) -> None:
        """Say which of the samples made the processor fail with `error`; nothing, where it was none
        of their images.

        Raises:
            UserError: one of them did.
        """
        for sample in samples:
            for image in sample.images:
                why = _refused(self.processor, image.size)
                if why:
                    width, height = image.size
                    raise UserError(
                        f"{self.name} cannot read the image of sample {sample.uid}, "
                        f"{width} x {height} pixels ({why}): crop or pad it."
                    ) from error


def crop_box(images: Any, width: int, height: int) -> Box:
    """The part of an image that an image processor shows which scales the shorter side and crops
    the centre, in pixels of the image; it reaches outside where the crop is larger than what it is
    cut from, and is padded."""
    size = dict(getattr(images, "size", None) or {})
    crop = dict(getattr(images, "crop_size", None) or {})
    if not getattr(images, "do_center_crop", False) or not crop:
        return 0.0, 0.0, float(width), float(height)
    # Size before the crop: the shorter side is given, or both are.
    scaled = width, height
    if getattr(images, "do_resize", True):
        shortest = size.get("shortest_edge")
        short = min(width, height)
        # Rounded down, as the stock processor does.
        keeping_shape = (
            (shortest * width // short, shortest * height // short) if shortest else None
        )
        scaled = keeping_shape or (size["width"], size["height"])
    # Whole pixels are left out on the left and above, as the stock processor rounds.
    left, top = (scaled[0] - crop["width"]) // 2, (scaled[1] - crop["height"]) // 2
    x, y = width / scaled[0], height / scaled[1]  # pixels of the image in one of the scaled image
    return left * x, top * y, (left + crop["width"]) * x, (top + crop["height"]) * y


def _unusual(size: tuple[int, int]) -> bool:
    return max(size) > LONG * min(size) or min(size) < SMALL


def _refused(processor: Any, size: tuple[int, int]) -> str:
    """What the processor says of a blank image of that size, "" if nothing."""
    images = getattr(processor, "image_processor", None)
    if images is None:
        return ""
    # A strip may grow to gigabytes before it is cropped: refused unseen.
    shortest = (getattr(images, "size", None) or {}).get("shortest_edge")
    if shortest and _crops(images):
        longest = shortest * max(size) // min(size)
        if shortest * longest > ENLARGED:
            return f"its processor would enlarge it to {shortest} x {longest}"
    try:
        images([[Image.new("RGB", size)]], return_tensors="pt")
    except REFUSALS as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def _crops(images: Any) -> bool:
    """Whether it scales the shorter side, whatever the longer one becomes, and crops then; tiling
    ones do not."""
    return bool(getattr(images, "do_center_crop", False)) and not hasattr(
        images, "image_grid_pinpoints"
    )
