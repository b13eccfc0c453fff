"""Where an image comes from: bytes, base64 text, a path, or an object of Pillow; and what is wrong
with one that cannot be opened."""

import base64
import binascii
import io
import os
import re
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image, UnidentifiedImageError

BASE64 = re.compile(r"data:|iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK")  # how images begin as text
KINDS = (  # what is no image for Pillow, by its first bytes
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer; fetch the file with `git lfs pull`",
    ),
    (re.compile(rb".{4}ftyp(?:hei|hev|mif|msf)", re.DOTALL), "HEIC; convert it to JPEG or PNG"),
    (re.compile(rb"\s*(?:<\?xml.*)?<svg", re.DOTALL), "SVG; convert it to PNG"),
    (
        re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE),
        "a web page; download the image itself",
    ),
    (re.compile(rb"%PDF"), "PDF; convert its page to PNG"),
)
# What Pillow raises on files that are damaged or that it does not know.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
_BOMB_LIMIT = Lock()  # Pillow's limit is one for all threads


class BadImage(Exception):
    """Something that is no picture.

    Args:
        reason: the same for all images of its kind.
        detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def embedded(value: str) -> bool:
    """Whether a text is an image itself and not a path."""
    return len(value) > 1000 or BASE64.match(value) is not None


def source_of(value: Any, folder: Path | None) -> Path | io.BytesIO:
    """The bytes or the file behind a value, see `images.read_picture`.

    Raises:
        BadImage: nothing there, an empty file, or a text that is neither a path nor base64.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return _filled(bytes(value))
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise BadImage("no image")
    # A path may be a base64 text for all we know: file first, then text, then address.
    text = str(value)
    path = (folder or Path()) / text
    try:
        is_file = len(text) < 4096 and not text.startswith("data:") and path.is_file()
    except OSError as error:
        is_file = False
        if not embedded(text):
            raise BadImage("missing image file", f"{_short(text)} ({error.strerror})") from error
    if is_file:
        if not path.stat().st_size:
            raise BadImage("broken image", f"{path} is empty (0 bytes)")
        return path
    if embedded(text):
        return _filled(_decoded(text))
    if re.match(r"https?://", text):
        raise BadImage(
            "missing image file", f"{_short(text)} is an address; download it and give its path"
        )
    raise BadImage("missing image file", f"{path} does not exist")


def _filled(content: bytes) -> io.BytesIO:
    if not content:
        raise BadImage("broken image", "it is empty (0 bytes)")
    return io.BytesIO(content)


def _decoded(text: str) -> bytes:
    content = text
    if text.startswith("data:"):
        head, _, content = text.partition(",")
        if not head.endswith(";base64"):
            raise BadImage(
                "broken image", f"its text begins with {_short(head)}, which is not base64"
            )
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(
            "broken image", f"its text is neither a path nor base64 ({error})"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


@contextmanager
def stored_picture(value: Image.Image | Path | io.BytesIO) -> Generator[Image.Image, None, None]:
    """The stored picture; its file is closed afterwards, but for an object that belongs to the
    caller."""
    if isinstance(value, Image.Image):
        yield value
        return
    with _open(value) as picture:
        yield picture


def _open(source: Path | io.BytesIO) -> Image.Image:
    """Pillow's own limit is off for the moment: it names no option, and `images.read_picture`
    checks the size before any pixel is decoded."""
    # The limit is a global of Pillow: set and restored by one thread at a time.
    with _BOMB_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        except UnidentifiedImageError as error:
            raise BadImage("broken image", _kind(source)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _kind(source: Path | io.BytesIO) -> str:
    """What a file is that Pillow cannot open."""
    name = str(source) if isinstance(source, Path) else "it"
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(64)
    else:
        start = source.getvalue()[:64]
    # The first bytes tell what people most often give in place of an image.
    kind = next((kind for pattern, kind in KINDS if pattern.match(start)), None)
    if kind:
        return f"{name} is {kind}"
    return f"{name} begins with {start[:12]!r}; give PNG, JPEG, WebP or the like"
