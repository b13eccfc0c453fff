"""What every patch of a page shows, from what the renderer wrote about it in `elements.jsonl`.

Everything is in pixels of the page; a page may be shifted, and what leaves the picture is dropped.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .blueprint import CELLS, DIGITS, LETTERS, PATCH, SIDE, SPACE, vocabulary

IGNORE = -100
POINTS = 8  # places in a patch, from left to right, at which a character is asked for
STEP = PATCH // POINTS
CHARACTERS = LETTERS + DIGITS + "?"
OTHER = len(CHARACTERS) + 1  # class of every other sign; 0 is no text
NUMBER = 5  # digits of a number that are asked for
NAMES = 4  # words of a name
ROLES = (
    "button", "link", "tab", "menuitem", "field", "select", "checkbox", "radio", "switch", "page",
)  # fmt: skip
_ICONS = """
    trash pencil star heart bell search gear house person lock envelope phone camera
    calendar clock download upload printer cart gift flag key bookmark cloud sun moon
    microphone headphones image folder link paperclip play pause plus cross check eye
    filter globe map pin shield bug battery wifi truck umbrella wallet trophy lightbulb
    refresh undo share menu grid tag building book hammer scissors
"""
ICONS = tuple(_ICONS.split())
TALL = 0.5  # share of a line's height that a patch must see to read it

WORDS = {
    token.removeprefix(SPACE): number
    for number, token in enumerate(vocabulary())
    if token[:1] == SPACE
}
CLASSES = {character: number for number, character in enumerate(CHARACTERS, 1)}
Box = Sequence[float]


class Labels(NamedTuple):
    """Labels of the N patches of a page; 0 is nothing, IGNORE is not known."""

    characters: Int[np.ndarray, "N points"]  # the character at each point of the patch's line
    word: Int[np.ndarray, " N"]  # token of the word that fills most of the line in the patch
    number: Int[np.ndarray, "N digits"]  # its digits + 1 where it is a number, else IGNORE
    name: Int[np.ndarray, "N names"]  # tokens of the name of the element, IGNORE behind the last
    key: Int[np.ndarray, " N"]  # token of the name of the row or card around the element
    icon: Int[np.ndarray, " N"]
    role: Int[np.ndarray, " N"]
    checked: Int[np.ndarray, " N"]  # 0 no, 1 yes
    active: Int[np.ndarray, " N"]
    owner: Int[np.ndarray, " N"]  # number of the element + 1
    box: Float[np.ndarray, "N 4"]  # edges of the element; IGNORE where there is none


def labels(page: Mapping[str, Any], dx: float = 0, dy: float = 0) -> Labels:
    """Labels of a page that is shifted by (dx, dy) pixels."""
    grid = np.zeros((CELLS, CELLS), dtype=np.int64)
    characters = np.zeros((CELLS, CELLS, POINTS), dtype=np.int64)
    number = np.full((CELLS, CELLS, NUMBER), IGNORE, dtype=np.int64)
    word, best = grid.copy(), np.zeros((CELLS, CELLS))
    for run in page["runs"]:
        _write(run, dx, dy, characters, word, number, best)
    return Labels(
        characters.reshape(-1, POINTS),
        word.ravel(),
        number.reshape(-1, NUMBER),
        **_elements(page, dx, dy),
    )


# --- text -----------------------------------------------------------------------------------------


def _write(
    run: Mapping[str, Any],
    dx: float,
    dy: float,
    characters: Int[np.ndarray, "R C points"],
    word: Int[np.ndarray, "R C"],
    number: Int[np.ndarray, "R C digits"],
    best: Float[np.ndarray, "R C"],
) -> None:
    """Labels of one line of text, in the rows of patches that see enough of its height."""
    xs = np.array(run["xs"]) + dx
    y1, y2 = run["y1"] + dy, run["y2"] + dy
    text = run["text"].lower()
    points = np.arange(CELLS * POINTS) * STEP + STEP / 2
    at = np.searchsorted(xs, points, side="right") - 1
    on = (at >= 0) & (at < len(text))
    classes = np.array([_class(character) for character in text])
    line = np.zeros(len(points), dtype=np.int64)
    line[on] = IGNORE if run["covered"] else classes[at[on]]
    line, on = line.reshape(CELLS, POINTS), on.reshape(CELLS, POINTS)
    for row in _rows(y1, y2):
        characters[row] = np.where(on, line, characters[row])
        for match in re.finditer(r"[a-z]+|\d+|[^\sa-z\d]+", text):
            low, high = xs[match.start()], xs[match.end()]
            share = np.clip(np.minimum(high, _edges[1:]) - np.maximum(low, _edges[:-1]), 0, None)
            better = share > best[row]
            best[row] = np.where(better, share, best[row])
            token, digits = _token(match.group(), run["covered"])
            word[row] = np.where(better, token, word[row])
            number[row] = np.where(better[:, None], digits, number[row])


_edges = np.arange(CELLS + 1) * PATCH


def _rows(y1: float, y2: float) -> list[int]:
    """Rows of patches that see at least `TALL` of the height from y1 to y2."""
    seen = np.minimum(y2, _edges[1:]) - np.maximum(y1, _edges[:-1])
    return np.flatnonzero(seen >= TALL * min(y2 - y1, PATCH)).tolist()


def _class(character: str) -> int:
    return 0 if character.isspace() else CLASSES.get(character, OTHER)


def _token(text: str, hidden: bool) -> tuple[int, list[int]]:
    """The word's token, and digits where it is a number; IGNORE where a page's reader cannot
    know."""
    none = [IGNORE] * NUMBER
    if hidden or (not text.isdigit() and text not in WORDS):
        return IGNORE, none
    if not text.isdigit():
        return WORDS[text], none
    if len(text) > NUMBER:
        return IGNORE, none
    return IGNORE, [int(digit) + 1 for digit in text] + [0] * (NUMBER - len(text))


# --- elements -------------------------------------------------------------------------------------


def _elements(page: Mapping[str, Any], dx: float, dy: float) -> dict[str, np.ndarray]:
    elements = page["elements"]
    boxes = np.array([shifted(e["box"], dx, dy) for e in elements]).reshape(-1, 4)
    owner = owners(boxes)
    keys = {at: box["key"] for box in page["containers"] for at in box["elements"] if box["clear"]}
    table = [_element(e, keys.get(at, "")) for at, e in enumerate(elements)]
    blank = {
        "name": [IGNORE] * NAMES,
        "key": 0,
        "icon": 0,
        "role": 0,
        "checked": IGNORE,
        "active": IGNORE,
    }
    columns = {
        name: np.array([blank[name], *(row[name] for row in table)])[owner] for name in blank
    }
    box = np.concatenate([np.full((1, 4), float(IGNORE)), boxes])[owner]
    return {**columns, "owner": owner, "box": box}


def _element(e: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What is known about an element; of a covered one only that nothing is."""
    if e["covered"]:
        return dict.fromkeys(("key", "icon", "role", "checked", "active"), IGNORE) | {
            "name": [IGNORE] * NAMES
        }
    icon = e["icons"][0] if len(e["icons"]) == 1 else ""
    role = ROLES.index(e["role"]) + 1 if e["role"] in ROLES else IGNORE
    name = tokens(e["label"] or e["text"])[:NAMES]
    return {
        "name": name + [IGNORE] * (NAMES - len(name)),
        "key": (tokens(key) or [IGNORE])[0] if key else 0,
        "icon": ICONS.index(icon) + 1 if icon in ICONS else IGNORE if e["icons"] else 0,
        "role": role,
        "checked": IGNORE if e["checked"] is None else int(e["checked"]),
        "active": int(e["active"]) if e["role"] in ("tab", "menuitem", "page") else IGNORE,
    }


def tokens(text: str) -> list[int]:
    """Tokens of the known words of a name."""
    return [WORDS[word] for word in re.findall(r"[a-z]+|\d", text.lower()) if word in WORDS]


def shifted(box: Box, dx: float, dy: float) -> tuple[float, float, float, float]:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def coverage(boxes: Float[np.ndarray, "E 4"]) -> Float[np.ndarray, "E N"]:
    """Share of every patch that each box covers."""
    x = np.minimum(boxes[:, 2:3], _edges[1:]) - np.maximum(boxes[:, :1], _edges[:-1])
    y = np.minimum(boxes[:, 3:], _edges[1:]) - np.maximum(boxes[:, 1:2], _edges[:-1])
    area = np.clip(y, 0, None)[:, :, None] * np.clip(x, 0, None)[:, None]
    return area.reshape(len(boxes), CELLS * CELLS) / PATCH**2


def owners(boxes: Float[np.ndarray, "E 4"]) -> Int[np.ndarray, " N"]:
    """The element that covers most of a patch, if a quarter; of those nested the smaller; 0 is
    none."""
    if not len(boxes):
        return np.zeros(CELLS * CELLS, dtype=np.int64)
    share = coverage(boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rank = share - 1e-6 * area[:, None]
    return np.where(share.max(0) >= 0.25, rank.argmax(0) + 1, 0)


def whole(box: Box) -> bool:
    """Whether a box is still in the picture."""
    return box[0] >= -0.5 and box[1] >= -0.5 and max(box[2], box[3]) <= SIDE + 0.5
