"""python experiments/screens/look.py <folder> [first page] [pages]: pictures with boxes and
questions."""

import json
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw

SCALE, LINE = 2, 11  # picture pixels per rendered pixel; height of a line of text


def sheet(folder: Path, first: int, count: int) -> Image.Image:
    """Each page twice: with numbered boxes of its questions, and the questions beside it."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    pages = defaultdict(list)
    for row in map(json.loads, lines):
        pages[row["page"]].append(row)
    chosen = sorted(pages)[first : first + count]
    tiles = [_tile(folder, pages[page]) for page in chosen]
    width, height = tiles[0].size
    out = Image.new("RGB", (2 * width, height * ((len(tiles) + 1) // 2)), "white")
    for number, tile in enumerate(tiles):
        out.paste(tile, (number % 2 * width, number // 2 * height))
    return out


def _tile(folder: Path, rows: list[dict]) -> Image.Image:
    picture = Image.open(folder / rows[0]["img_filename"]).convert("RGB")
    picture = picture.resize(
        (picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST
    )
    tile = Image.new("RGB", (picture.width + 330, picture.height + 4), "white")
    tile.paste(picture)
    draw = ImageDraw.Draw(tile)
    for number, row in enumerate(rows):
        color = "red" if row["kind"] == "point" else "blue"
        box = [value * SCALE for value in row["bbox"]]
        draw.rectangle(box, outline=color)
        draw.text(
            (box[0] + 1, box[1] - 2), str(number), fill=color, stroke_width=1, stroke_fill="white"
        )
        text = f"{number} {row['family']}: {row['instruction']} {row['answer']}"
        draw.text((picture.width + 6, number * (LINE + 5)), text, fill=color)
    return tile


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    first, count = (*map(int, numbers), *(0, 6)[len(numbers) :])
    sheet(Path(place), first, count).save("/tmp/screens.png")
    print("/tmp/screens.png")
