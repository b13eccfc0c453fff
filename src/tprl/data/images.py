"""The one place where an image becomes a picture: RGB, upright, as viewers show it.

- An EXIF orientation (all eight) is applied: width, height and boxes are of the upright picture.
- Of several frames (GIF, TIFF, WebP, APNG) the first is read; an object keeps the frame it is at.
- Transparent pixels are composited over white: alpha channels, palettes and color keys.
- 16 bits a channel are scaled to 8, other depths of TIFF by their number of bits, never clipped.
- Modes I and F say nothing about their range: values within 0..1 (F alone) are read as fractions,
  within 0..255 as 8 bits, within 0..65535 as 16 bits. Other values are refused.
- Color profiles are not applied, as in `transformers` and `datasets`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tprl.data.image_files import UNREADABLE, BadImage, source_of, stored_picture

MAX_PIXELS = 4096 * 4096  # of an image; larger ones are scaled down
TOO_MANY = "too many pixels"
# pixels that are decoded without being asked for: Pillow's own limit against bombs
OPENED = 178_956_970

ORIENTATION = 0x0112  # EXIF tag, 1 to 8; what makes a picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = range(5, 9)  # orientations that swap width and height
WIDTH, HEIGHT, BITS, PHOTOMETRIC = 256, 257, 258, 262  # TIFF tags
WHITE_IS_ZERO = 0  # a value of the last
# what Pillow multiplies gray values of so few bits by, but not color keys
KEYS = {"1": 255, "L;2": 85, "L;4": 17}


class Picture(NamedTuple):
    """An upright RGB picture, and the (width, height) it has before it is scaled down."""

    image: Image.Image
    size: tuple[int, int]


def read_picture(
    value: Any, folder: Path | None = None, max_pixels: int | None = MAX_PIXELS
) -> Picture:
    """The picture that viewers show of an image.

    Args:
        value: bytes, {"bytes", "path"} as stored by `datasets`, base64 text, a path, or a picture
            object of Pillow.
        folder: of relative paths.
        max_pixels: larger pictures are scaled down to so many; None: any size.

    Raises:
        BadImage: nothing there, no image, a damaged one, or one that is too large.
    """
    if not isinstance(value, Image.Image):
        value = source_of(value, folder)
    try:
        with stored_picture(value) as stored:
            _check_pixels(stored.size, max_pixels)
            # The size is checked before decoding, and the raw mode is gone after it.
            rawmode = _rawmode(stored)
            stored.load()
            picture = _rgb(_upright(stored), stored, rawmode)
            size = picture.size
            picture = _scaled(picture, max_pixels)
    except UNREADABLE as error:
        raise BadImage("broken image", _message(error)) from error
    # What is left of the file's facts (orientation, transparency) was applied: it must not be
    # applied again.
    picture.info = {}
    return Picture(picture, size)


def shown_size(value: Any, folder: Path | None = None) -> tuple[int, int] | None:
    """(width, height) of the picture that `read_picture` reads without a bound, from the header of
    a file alone; None where there is none.

    Args:
        value, folder: see `read_picture`.
    """
    stored_here = isinstance(value, Image.Image)
    try:
        with stored_picture(value if stored_here else source_of(value, folder)) as stored:
            _check_pixels(stored.size, None)
            if _orientation(stored, decode=stored_here) not in SIDEWAYS:
                return stored.size
            # Of TIFF files, some versions of Pillow say the size as it is stored and some as it is
            # shown.
            tags: Mapping[int, Any] = getattr(stored, "tag_v2", {}) or {}
            width, height = (tags[WIDTH], tags[HEIGHT]) if WIDTH in tags else stored.size
            return height, width
    except (BadImage, *UNREADABLE):
        return None


def _rawmode(picture: Image.Image) -> str:
    """How the file holds its pixels, before they are loaded."""
    tiles = getattr(picture, "tile", None) or [(None, None, None, "")]
    form = tiles[0][3]
    form = form[0] if isinstance(form, tuple) and form else form
    return form if isinstance(form, str) else ""


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuse what is too large to be decoded, and what has nothing to show."""
    width, height = size
    if width < 1 or height < 1:
        raise BadImage("image without pixels", f"it is {width} x {height} pixels")
    # Two bounds: what may be decoded at all, and what can be scaled down.
    limit = max(OPENED, max_pixels or 0)
    if width * height > limit:
        raise _too_many(size, limit, "")
    if max_pixels is not None and width * height > max_pixels and max(size) > max_pixels:
        # Scaling can make the shorter side one pixel, and no less.
        raise _too_many(size, max_pixels, f", and a side of {max(size)} cannot be scaled to that")


def _too_many(size: tuple[int, int], limit: int, why: str) -> BadImage:
    width, height = size
    return BadImage(
        TOO_MANY,
        f"{width} x {height} = {width * height} > {limit}{why}; scale the image down",
    )


def _message(error: BaseException) -> str:
    """What Pillow says is wrong, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- upright, eight bits, three channels ----------------------------------------------------------


def _upright(picture: Image.Image) -> Image.Image:
    step = UPRIGHT.get(_orientation(picture))
    return picture if step is None else picture.transpose(step)


def _orientation(picture: Image.Image, decode: bool = True) -> int:
    """The EXIF orientation, 1 where none is said; without `decode` what a PNG file says after its
    pixels is left."""
    try:
        exif = picture.getexif() if decode else Image.Image.getexif(picture)
        orientation = exif.get(ORIENTATION)
    # damaged facts about a whole picture: viewers show it as it is stored
    except (*UNREADABLE, AttributeError):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _rgb(picture: Image.Image, stored: Image.Image, rawmode: str) -> Image.Image:
    """Three channels of 8 bits; `stored` is the picture as it was loaded, with all that the file
    says."""
    if picture.mode == "I" or picture.mode == "F" or picture.mode.startswith("I;16"):
        return _from_numbers(picture, stored)
    if picture.mode == "LAB":
        return _from_lab(picture)
    if picture.mode == "La":
        picture = picture.convert("LA")
    # A color key is transparent too: it must be in the units of the loaded pixels.
    picture = _with_key(picture, rawmode)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return _over_white(layer.convert("RGB"), layer.getchannel("A"))


def _over_white(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    """What a viewer shows on a white page."""
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=alpha)
    return page


def _with_key(picture: Image.Image, rawmode: str) -> Image.Image:
    """The picture with its transparent color in units of the loaded pixels: Pillow has it in those
    of the file."""
    key = picture.info.get("transparency")
    if rawmode in KEYS and picture.mode != "P" and isinstance(key, int):
        key *= KEYS[rawmode]
    elif rawmode.startswith("RGB;16") and isinstance(key, tuple):
        key = tuple(int(part) >> 8 for part in key)
    else:
        return picture
    picture = picture.copy()  # the caller's object stays as it is
    picture.info["transparency"] = key
    return picture


def _from_numbers(picture: Image.Image, stored: Image.Image) -> Image.Image:
    """Gray of more than 8 bits, or of no known depth."""
    # TIFF may store white as 0, and any depth between 8 and 16 bits.
    values: NDArray[Any] = np.asarray(picture)  # in the mode's byte order
    tags: Mapping[int, Any] = getattr(stored, "tag_v2", {}) or {}
    gray = _gray(values, _depth(picture.mode, stored, tags))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        gray = 255 - gray
    opened = Image.fromarray(gray, "L").convert("RGB")
    key = stored.info.get("transparency")
    if not isinstance(key, int) or picture.mode == "F":
        return opened
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return _over_white(opened, Image.fromarray(alpha, "L"))


def _depth(mode: str, stored: Image.Image, tags: Mapping[int, Any]) -> int | None:
    """The number that is white; None where nothing says so."""
    bits = int(np.max(tags.get(BITS, 0)))
    if mode.startswith("I;16"):
        return 2**bits - 1 if 8 < bits < 16 else 65535
    if mode == "I" and bits == 16:  # with a sign
        return 32767
    return 65535 if mode == "I" and stored.format in ("PNG", "PPM") else None


def _gray(values: NDArray[Any], white: int | None) -> NDArray[np.uint8]:
    """[H W] of numbers up to `white` -> 0..255."""
    low, high = float(values.min()), float(values.max())  # nan where one is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImage("values out of range", "a pixel is not a number or infinite")
    # No depth is known: the smallest usual range that holds all values.
    if white is None:
        steps = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
        white = next((step for step in steps if high <= step), None)
    if white is None or low < 0 or high > white:
        raise BadImage(
            "values out of range",
            (
                f"pixels from {low:g} to {high:g} with no depth "
                "to go by; save them as 8 or 16 bits a channel"
            ),
        )
    return np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)


def _from_lab(picture: Image.Image) -> Image.Image:
    try:
        from PIL import ImageCms
    except ImportError as error:  # a build of Pillow without Little CMS
        raise BadImage(
            "broken image", "CIELAB needs a Pillow with littlecms2; save the image as RGB"
        ) from error
    try:
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise BadImage("broken image", f"CIELAB: {_message(error)}") from error
    assert converted is not None  # None is for inPlace=True
    return converted


def _scaled(picture: Image.Image, max_pixels: int | None) -> Image.Image:
    """At most `max_pixels` large, with its aspect ratio but for whole pixels."""
    width, height = picture.size
    if max_pixels is None or width * height <= max_pixels:
        return picture
    # Rounded down, so that the bound holds.
    scale = (max_pixels / (width * height)) ** 0.5
    shorter = max(1, int(min(width, height) * scale))
    longer = min(int(max(width, height) * scale), max_pixels // shorter)
    return picture.resize((longer, shorter) if width >= height else (shorter, longer))
