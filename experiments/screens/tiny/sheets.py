"""Sheets: pictures full of words, numbers, buttons, ticks and icons, drawn by Pillow in
milliseconds.

They look less like a page than a browser's, hold four times as many words and never run out. The
tower learns letters on them while pages are still being rendered. What is returned has the form of
a line of `elements.jsonl`.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from tprl.errors import UserError

from .blueprint import LETTERS, PATCH, SIDE, words
from .labels import ICONS

MODULES = Path(__file__).parents[1] / "node_modules"
FONTS = ("inter", "lato", "noto-sans", "open-sans", "roboto", "source-sans-3")
# Names that the icon font has for ours; the same as in lib/words.mjs.
BOOTSTRAP = {
    "phone": "telephone", "microphone": "mic", "link": "link-45deg", "plus": "plus-lg",
    "cross": "x-lg", "check": "check-lg", "filter": "funnel", "battery": "battery-half",
    "wallet": "wallet2", "refresh": "arrow-clockwise", "undo": "arrow-counterclockwise",
    "menu": "list",
}  # fmt: skip
Color = tuple[int, int, int]


@cache
def font(name: str, weight: int, size: float) -> ImageFont.FreeTypeFont:
    return _open(MODULES / f"@fontsource/{name}/files/{name}-latin-{weight}-normal.woff2", size)


@cache
def icon_font(size: float) -> ImageFont.FreeTypeFont:
    return _open(MODULES / "bootstrap-icons/font/fonts/bootstrap-icons.woff2", size)


@cache
def icon_codes() -> dict[str, str]:
    file = MODULES / "bootstrap-icons/font/bootstrap-icons.json"
    codes = json.loads(file.read_text(encoding="utf-8"))
    return {name: chr(codes[BOOTSTRAP.get(name, name)]) for name in ICONS}


def _open(file: Path, size: float) -> ImageFont.FreeTypeFont:
    if not file.is_file():
        raise UserError(f"the font {file} is missing: run npm install in {MODULES.parent}.")
    return ImageFont.truetype(str(file), size)


@cache
def advance(letters: ImageFont.FreeTypeFont, character: str) -> float:
    return letters.getlength(character)


def edges(letters: ImageFont.FreeTypeFont, text: str) -> Float[np.ndarray, " edges"]:
    """Where characters begin and end; kerning is spread over all of them."""
    steps = np.cumsum([0.0, *(advance(letters, character) for character in text)])
    return steps * letters.getlength(text) / steps[-1]


class Sheet:
    """One sheet, drawn line by line.

    Args:
        rng: decides everything.
        aligned: every line lies in the middle of a row of patches; else anywhere.
    """

    def __init__(self, rng: np.random.Generator, aligned: bool = False) -> None:
        self.rng = rng
        self.dark = bool(rng.random() < 0.3)
        self.image = Image.new("RGB", (SIDE, SIDE), self.ground())
        self.draw = ImageDraw.Draw(self.image)
        self.runs: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.name = FONTS[rng.integers(len(FONTS))]
        self.size = float(rng.integers(22, 30)) / 2
        y = 0.0 if aligned else float(rng.integers(0, 12))
        while y < SIDE - 8:
            y = self.aligned_line(y) if aligned else self.line(y)

    # --- layout ---------------------------------------------------------------------------------

    def aligned_line(self, y: float) -> float:
        """Words alone take one row of patches, other things two, with the text in the second."""
        plain = self.rng.random() < 0.5
        high = PATCH * (1 if plain else 2)
        self.things(y + high - PATCH / 2, self.panel(y, high), plain)
        return y + high

    def line(self, y: float) -> float:
        """A line of things from left to right, anywhere; the y of the next one."""
        rng = self.rng
        height = self.size * 1.4 + float(rng.integers(0, 14))
        self.things(y + height / 2, self.panel(y, height), False)
        return y + height + float(rng.integers(0, 7))

    def panel(self, y: float, height: float) -> Color:
        """The ground of a line, painted anew for some lines."""
        if self.rng.random() < 0.7:
            return self.image.getpixel((0, min(SIDE - 1, int(y) + 3)))
        ground = self.ground()
        self.draw.rectangle((0, y, SIDE, y + height), fill=ground)
        return ground

    def things(self, y: float, ground: Color, plain: bool) -> None:
        """Words, and other things if not `plain`, around the height y."""
        rng = self.rng
        x = float(rng.integers(1, 30)) + float(rng.random())
        while x < SIDE - 12:
            kind = 0.0 if plain else rng.random()
            thing = (
                self.word
                if kind < 0.6
                else self.button
                if kind < 0.8
                else self.tick
                if kind < 0.9
                else self.icon
            )
            x = thing(x, y, ground) + float(rng.integers(3, 26))

    def word(self, x: float, y: float, ground: Color) -> float:
        return self.text(self.phrase(), x, y, self.ink(ground), -1)

    def button(self, x: float, y: float, ground: Color) -> float:
        text, pad = self.phrase(), float(self.rng.integers(3, 9))
        face = self.face(ground)
        end = x + 2 * pad + self.letters(700 if self.dark else 400).getlength(text)
        high = self.size * 0.75 + float(self.rng.integers(1, 5))
        box = (x, y - high, end, y + high)
        self.draw.rounded_rectangle(
            box, radius=int(self.rng.integers(0, 5)), fill=face, outline=self.ink(ground)
        )
        self.element("button", box, text=text)
        self.text(
            text, x + pad, y, self.ink(face), len(self.elements) - 1, 700 if self.dark else 400
        )
        return end

    def tick(self, x: float, y: float, ground: Color) -> float:
        role = ("checkbox", "radio")[self.rng.integers(2)]
        checked, ink, half = (
            bool(self.rng.random() < 0.5),
            self.ink(ground),
            float(self.rng.integers(9, 14)) / 2,
        )
        box = (x, y - half, x + 2 * half, y + half)
        shape = self.draw.ellipse if role == "radio" else self.draw.rectangle
        shape(
            box,
            outline=ink,
            fill=self.face(ground) if checked and self.rng.random() < 0.7 else None,
        )
        if checked and role == "radio":
            self.draw.ellipse(
                (box[0] + 3, box[1] + 3, box[2] - 3, box[3] - 3), fill=self.ink(ground)
            )
        elif checked:
            middle = (x + half * 0.8, y + half * 0.5)
            self.draw.line(
                [(x + 2, y), middle, (box[2] - 2, box[1] + 2)], fill=self.ink(ground), width=2
            )
        text, start = self.phrase(), box[2] + float(self.rng.integers(3, 7))
        end = self.text(text, start, y, ink, len(self.elements))
        self.element(
            role, (x, y - half - 1, end, y + half + 1), text=text, label=text, checked=checked
        )
        return end

    def icon(self, x: float, y: float, ground: Color) -> float:
        name, size = ICONS[self.rng.integers(len(ICONS))], float(self.rng.integers(11, 17))
        pad = float(self.rng.integers(2, 9))
        box = (x, y - size / 2 - 4, x + size + 2 * pad, y + size / 2 + 4)
        face = self.face(ground) if self.rng.random() < 0.5 else ground
        if face != ground:
            self.draw.rounded_rectangle(box, radius=3, fill=face)
        self.draw.text(
            (x + pad, y), icon_codes()[name], font=icon_font(size), fill=self.ink(face), anchor="lm"
        )
        self.element("button", box, icons=[name])
        return box[2]

    # --- what things are made of ----------------------------------------------------------------

    def text(
        self, text: str, x: float, y: float, ink: Color, owner: int, weight: int | None = None
    ) -> float:
        letters = self.letters(weight or (400, 400, 700)[self.rng.integers(3)])
        self.draw.text((x, y), text, font=letters, fill=ink, anchor="lm")
        xs = (x + edges(letters, text)).tolist()
        half = self.size * 0.68
        faint = {"covered": xs[-1] > SIDE + 2, "cut": xs[-1] > SIDE}
        self.runs.append(
            {"text": text, "xs": xs, "y1": y - half, "y2": y + half, "owner": owner} | faint
        )
        return xs[-1]

    def phrase(self) -> str:
        """A word or two of the list, a number, or letters that no list holds."""
        kind = self.rng.random()
        if kind < 0.15:
            return str(self.rng.integers(10 ** self.rng.integers(1, 5)))
        if kind < 0.25:
            picked = self.rng.integers(len(LETTERS), size=self.rng.integers(2, 9))
            return self.case("".join(LETTERS[at] for at in picked))
        count = 2 if kind > 0.85 else 1
        return self.case(" ".join(words()[self.rng.integers(len(words()))] for _ in range(count)))

    def case(self, text: str) -> str:
        return text if self.rng.random() < 0.15 else text[0].upper() + text[1:]

    def letters(self, weight: int) -> ImageFont.FreeTypeFont:
        return font(self.name, weight, self.size)

    def element(self, role: str, box: tuple[float, float, float, float], **known: Any) -> None:
        cut = box[2] > SIDE or box[3] > SIDE
        blank = {"icons": [], "label": "", "text": "", "checked": None, "active": False}
        self.elements.append(
            {"role": role, "box": list(box), "cut": cut, "covered": cut} | blank | known
        )

    def ground(self) -> Color:
        low, high = (10, 60) if self.dark else (225, 256)
        base = int(self.rng.integers(low, high))
        return self.mixed((base, base, base), 12)

    def ink(self, ground: Color) -> Color:
        """A color that differs enough from the ground in brightness."""
        bright = (0.3, 0.59, 0.11) @ np.array(ground)
        low, high = (0, bright - 90) if bright > 140 else (bright + 90, 255)
        base = int(self.rng.integers(round(low), round(high) + 1))
        return self.mixed((base, base, base), 30)

    def face(self, ground: Color) -> Color:
        """Of a button: the ground's, grey, or a strong color."""
        kind = self.rng.random()
        if kind < 0.3:
            return ground
        base = int(self.rng.integers(60, 240))
        return self.mixed((base, base, base), 20 if kind < 0.6 else 120)

    def mixed(self, color: Color, spread: int) -> Color:
        values = np.clip(np.array(color) + self.rng.integers(-spread, spread + 1, 3), 0, 255)
        return int(values[0]), int(values[1]), int(values[2])


class Words(Sheet):
    """A sheet of words alone, in the middle of every row of patches; each row has a font, a size
    and colors of its own, so that a few sheets show most of what text looks like."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng, aligned=True)

    def aligned_line(self, y: float) -> float:
        rng = self.rng
        self.name = FONTS[rng.integers(len(FONTS))]
        self.size = float(rng.integers(22, 30)) / 2
        ground = self.ground()
        self.draw.rectangle((0, y, SIDE, y + PATCH), fill=ground)
        self.things(y + PATCH / 2, ground, True)
        return y + PATCH


def draw_words(
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
    """A picture of words, and what it shows."""
    return _drawn(Words(rng))


def draw(
    rng: np.random.Generator, aligned: bool = False
) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
    """A picture, and what it shows."""
    return _drawn(Sheet(rng, aligned))


def _drawn(sheet: Sheet) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
    visible = {"runs": sheet.runs, "elements": sheet.elements, "containers": []}
    return np.asarray(sheet.image), visible
