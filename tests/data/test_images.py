"""What arrives of an image file is the picture that viewers show, or a reason."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from tests.data.rows import encoded, picture

from tprl.data.custom import Custom
from tprl.data.images import BadImage, read_picture, shown_size
from tprl.errors import UserError
from tprl.stages.prompts import PromptStream

WIDTH, HEIGHT = 64, 8
RAMP = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
GREY = np.stack([RAMP] * 3, -1)
DEEP = RAMP.astype(np.uint16) * 257
LEFT = np.tile(np.arange(WIDTH) < WIDTH // 2, (HEIGHT, 1))
BLANK_LEFT = np.where(LEFT[..., None], 255, GREY).astype(np.uint8)


def stored(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def seen(value: Any, **how: Any) -> NDArray[Any]:
    image = read_picture(value, **how).image
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(depth: int, color: int, rows: bytes, key: bytes = b"") -> bytes:
    """A file as Pillow cannot write it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        chunk(b"tRNS", key) if key else b"",
        chunk(b"IDAT", zlib.compress(rows)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def lines(values: NDArray[Any]) -> bytes:
    """[H W C] of 16 bits as PNG stores it."""
    return b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)


def tiff(bits: int, photometric: int, pixels: bytes, form: int = 1) -> bytes:
    """One strip of gray; `form` is 1 (unsigned), 2 (signed) or 3 (floats)."""
    short = {258: bits, 259: 1, 262: photometric, 277: 1, 339: form}
    long = {256: WIDTH, 257: HEIGHT, 273: 8, 278: HEIGHT, 279: len(pixels)}
    tags = b"".join(
        struct.pack("<HHI", tag, 3 if tag in short else 4, 1)
        + (struct.pack("<HH", short[tag], 0) if tag in short else struct.pack("<I", long[tag]))
        for tag in sorted(short | long)
    )
    body = struct.pack("<H", len(short) + len(long)) + tags + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + body


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_all_eight_orientations_are_applied(self, kind: str) -> None:
        """The sides of the stored picture, clockwise from the top: red, green, blue, white."""
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:8], pixels[8:, 56:], pixels[40:, 8:56], pixels[8:40, :8] = (
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
            255,
        )
        tops = {
            1: "red",
            2: "red",
            3: "blue",
            4: "blue",
            5: "white",
            6: "white",
            7: "green",
            8: "green",
        }
        lefts = {
            1: "white",
            2: "green",
            3: "green",
            4: "white",
            5: "red",
            6: "blue",
            7: "blue",
            8: "red",
        }
        names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
            content = stored(Image.fromarray(pixels), kind, exif=exif, **how)
            result = read_picture(content)
            assert result.size == result.image.size == ((64, 48) if orientation < 5 else (48, 64))
            middle = result.image.width // 2, result.image.height // 2
            places = (middle[0], 3), (3, middle[1])  # at the top, and at the left
            edges: Any = [result.image.getpixel(place) for place in places]
            bits = [tuple(int(value > 128) for value in pixel) for pixel in edges]
            colors = [names[color] for color in bits]
            assert colors == [tops[orientation], lefts[orientation]]
            # As an object, also after a conversion, which keeps the facts of the file; and never
            # twice.
            opened = Image.open(io.BytesIO(content))
            assert shown_size(content) == shown_size(Image.open(io.BytesIO(content))) == result.size
            for again in (opened, opened.convert("RGB"), result.image):
                assert read_picture(again).image.tobytes() == result.image.tobytes()
                assert shown_size(again) == result.size

    def test_boxes_are_in_pixels_of_the_upright_picture(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
        row = {"image": "a.jpg", "question": "Where?", "box": [0, 33, 32, 63]}
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        data = Custom(
            "all", source=str(tmp_path / "d.jsonl"), coordinates="absolute", max_pixels=512
        )
        assert (data[0].images[0].size, data.original_size) == ((16, 32), (32, 64))
        assert data[0].box == (0.0, 16.5, 16.0, 31.5)

    def test_what_is_no_picture_has_no_size(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no image")
        assert [
            shown_size(value, tmp_path) for value in ("text.png", "absent.png", b"", None, 3)
        ] == [None] * 5

    def test_damaged_facts_leave_the_picture(self) -> None:
        content = stored(Image.fromarray(GREY), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
        assert (seen(content) == GREY).all()


class TestModes:
    @pytest.mark.parametrize(
        "value",
        [
            Image.fromarray(DEEP),
            stored(Image.fromarray(DEEP), "PNG"),
            stored(Image.fromarray(DEEP), "TIFF"),
            Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()),
            b"P5 64 8 65535\n" + DEEP.astype(">u2").tobytes(),
            png(16, 2, lines(np.stack([DEEP] * 3, -1))),
            tiff(16, 0, (65535 - DEEP).tobytes()),
            tiff(16, 1, (RAMP.astype(int) * 32767 // 255).astype("<i2").tobytes(), form=2),
            tiff(32, 1, RAMP.astype("<u4").tobytes()),
            tiff(32, 0, (1 - RAMP / 255).astype("<f4").tobytes(), form=3),
            Image.fromarray(DEEP.astype(np.int32)),
            Image.fromarray(RAMP.astype(np.int32)),
            Image.fromarray(RAMP.astype(np.float32)),
            Image.fromarray((RAMP / 255).astype(np.float32)),
            Image.fromarray(DEEP.astype(np.float32)),
        ],
    )
    def test_grey_of_every_depth_is_scaled_and_never_clipped(self, value: Any) -> None:
        assert np.abs(seen(value) - GREY).max() <= 1

    def test_twelve_bits(self) -> None:
        pairs = (RAMP.astype(int) * 4095 // 255).reshape(-1, 2)
        pixels = b"".join(
            bytes([x >> 4, (x & 15) << 4 | y >> 8, y & 255]) for x, y in pairs.tolist()
        )
        assert np.abs(seen(tiff(12, 1, pixels)) - GREY).max() <= 1

    @pytest.mark.parametrize(
        "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "La", "RGBa"]
    )
    def test_colors_of_every_mode(self, mode: str) -> None:
        image = Image.new("RGB", (6, 4), (200, 40, 90))
        if mode == "LAB":
            to_lab = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
            converted = ImageCms.profileToProfile(image, *to_lab, outputMode="LAB")
            assert converted is not None
            image = converted
        else:
            image = image.quantize(2) if mode == "P" else image
            for step in {"La": ("LA", "La"), "LA": ("LA",), "RGBa": ("RGBA", "RGBa")}.get(
                mode, (mode,)
            ):
                image = image.convert(step)
        assert image.mode == mode
        wanted = {"1": (0, 0, 0), "L": (93,) * 3, "LA": (93,) * 3, "La": (93,) * 3}.get(
            mode, (200, 40, 90)
        )
        if mode == "1":
            image = Image.new("1", (6, 4), 0)
        assert np.abs(seen(image) - np.array(wanted)).max() <= 6

    def test_inverted_cmyk_of_adobe(self) -> None:
        content = stored(Image.new("CMYK", (16, 16), (0, 200, 100, 20)), "JPEG", quality=95)
        assert b"Adobe" in content
        assert np.abs(seen(content) - np.array([235, 51, 143])).max() <= 4

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
    def test_the_first_frame_of_several(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
        how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        content = stored(frames[0], kind, save_all=True, append_images=frames[1:], **how)
        assert (seen(content) == [255, 0, 0]).all()


class TestTransparency:
    """What is hidden is not black, nor what lies beneath, but the white of a page."""

    HIDDEN = np.where(LEFT[..., None], np.array([1, 2, 3]), GREY).astype(np.uint8)

    def test_alpha_channels(self) -> None:
        layers = Image.fromarray(np.dstack([self.HIDDEN, np.where(LEFT, 0, 255).astype(np.uint8)]))
        values = [
            layers,
            stored(layers, "PNG"),
            stored(layers, "WEBP", lossless=True),
            layers.convert("RGBa"),
        ]
        deep = np.stack([DEEP, np.where(LEFT, 0, 65535)], -1)
        for value in [*values, stored(layers, "TIFF"), png(16, 4, lines(deep))]:
            assert (seen(value) == BLANK_LEFT).all()
        half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
        assert (seen(half) == 127).all()

    def test_palettes_with_an_index_or_bytes(self) -> None:
        image = Image.fromarray(self.HIDDEN).quantize(64)
        index = image.getpixel((0, 0))
        wanted = np.asarray(image.convert("RGB")).copy()
        wanted[LEFT] = 255
        alpha = bytes(0 if number == index else 255 for number in range(64))
        for kind, key in (("PNG", index), ("GIF", index), ("PNG", alpha)):
            assert (seen(stored(image, kind, transparency=key)) == wanted).all()

    def test_color_keys(self) -> None:
        key = stored(Image.fromarray(self.HIDDEN), "PNG", transparency=(1, 2, 3))
        assert (seen(key) == BLANK_LEFT).all()
        black = np.where(GREY == 0, 255, GREY)
        assert (seen(stored(Image.fromarray(RAMP), "PNG", transparency=0)) == black).all()
        assert (seen(stored(Image.fromarray(DEEP), "PNG", transparency=0)) == black).all()
        assert (seen(png(16, 2, lines(np.stack([DEEP] * 3, -1)), b"\0" * 6)) == black).all()
        # gray of two bits: 0 1 2 3 ...
        packed = b"".join(b"\0" + bytes([0b00011011] * 16) for _ in range(HEIGHT))
        assert (seen(png(2, 0, packed, b"\0\1"))[0, :4, 0] == [0, 255, 170, 255]).all()

    def test_the_callers_image_is_unchanged(self) -> None:
        image = Image.fromarray(RAMP)
        image.info["transparency"] = 0
        read_picture(image)
        assert (image.mode, image.info) == ("L", {"transparency": 0})


class TestForms:
    def test_bytes_dicts_text_and_paths(self, tmp_path: Path) -> None:
        content = encoded(1)["bytes"]
        (tmp_path / "named.jpg").write_bytes(content)  # a PNG: its content decides
        text = base64.b64encode(content).decode()
        tiny = base64.b64encode(stored(Image.new("RGB", (2, 2)), "PNG")).decode()
        assert len(tiny) < 1000
        wanted = picture(1).tobytes()
        for value in (
            content,
            bytearray(content),
            {"bytes": content},
            {"bytes": text},
            text,
            f"data:image/png;base64,{text}",
        ):
            assert read_picture(value).image.tobytes() == wanted
        for value in ("named.jpg", {"bytes": None, "path": "named.jpg"}, tmp_path / "named.jpg"):
            assert read_picture(value, tmp_path).image.tobytes() == wanted
        assert read_picture(tiny).size == (2, 2)


class TestReasons:
    @pytest.mark.parametrize(
        ("value", "reason", "detail"),
        [
            (None, "no image", ""),
            (b"", "broken image", "0 bytes"),
            (stored(picture(0, (99, 99)), "PNG")[:2000], "broken image", "truncated"),
            (stored(picture(0, (99, 99)), "JPEG")[:2000], "broken image", "truncated"),
            (stored(picture(0), "PNG")[:20], "broken image", "Truncated"),
            (
                b"<!DOCTYPE html><html>",
                "broken image",
                "it is a web page; download the image itself",
            ),
            (b"version https://git-lfs.github.com/spec/v1", "broken image", "git lfs pull"),
            (b"\0\0\0\x18ftypheic", "broken image", "HEIC; convert it"),
            (b"hello", "broken image", "begins with b'hello'"),
            (Image.new("RGB", (0, 5)), "image without pixels", "0 x 5"),
            ("https://a.b/c.png", "missing image file", "download it"),
            ("x" * 500, "missing image file", "name too long"),
            ("data:text/plain,hi", "broken image", "not base64"),
            (Image.fromarray(RAMP.astype(np.float32) - 5), "values out of range", "from -5 to 250"),
            (
                Image.fromarray(np.full((2, 2), np.nan, np.float32)),
                "values out of range",
                "not a number",
            ),
            (
                Image.fromarray(np.full((2, 2), 1 << 20, np.int32)),
                "values out of range",
                "1.04858e",
            ),
            (
                Image.new("1", (20_000_000, 1)),
                "too many pixels",
                "20000000 x 1 = 20000000 > 16777216",
            ),
            (Image.new("1", (20_000, 10_000)), "too many pixels", "= 200000000 > 178956970"),
        ],
    )
    def test_the_actual_reason_is_reported(self, value: Any, reason: str, detail: str) -> None:
        with pytest.raises(BadImage) as error:
            read_picture(value)
        assert error.value.reason == reason
        assert detail in error.value.detail

    def test_the_option_raises_the_limit(self, tmp_path: Path) -> None:
        Image.new("1", (20_000_000, 1)).save(tmp_path / "strip.png")
        row = {"image": "strip.png", "question": "q", "answers": "a"}
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        source = str(tmp_path / "d.jsonl")
        with pytest.raises(
            UserError,
            match=r"too many pixels: 20000000 x 1 = 20000000 > 16777216.*dataset\.max_pixels",
        ):
            Custom("all", source=source, max_bad_rows=0.0)[0]
        assert Custom("all", source=source, max_pixels=20_000_000)[0].images[0].size == (
            20_000_000,
            1,
        )

    def test_what_a_model_refuses_is_damage_and_training_goes_on(self, tmp_path: Path) -> None:
        content = [{"image": f"{n}.png", "question": "q", "answers": "a"} for n in range(4)]
        for number in range(4):
            picture(number, (4 + 96 * (number == 2), 4)).save(tmp_path / f"{number}.png")
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, content)))
        data = Custom("all", source=str(tmp_path / "d.jsonl"), max_bad_rows=0.5)
        data.read_by(
            SimpleNamespace(
                refusal=lambda s: ("wide", "100 x 4") if s.images[0].width > 9 else None, workers=0
            )
        )
        read = [sample.images[0].width for batch in PromptStream(data, 4, 0, 2) for sample in batch]
        assert read == [4] * 8
        assert data.damage == {"wide": 1}
