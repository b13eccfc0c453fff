"""python experiments/screens/pack.py <folder> <zip> [questions a page] [of a family]: what ships of
a split.

Pictures become lossless WebP. Of the questions of a page a few stay, chosen so that families, and
answers inside a family, come equally often; a page is visited in the order of its number, and ties
go to the digest of the question.
"""

import hashlib
import io
import json
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = Mapping[str, Any]
OLD = (1980, 1, 1, 0, 0, 0)  # the same pictures make the same zip
DROPPED = ("of", "kind")  # columns that only the renderer needs


def chosen(pages: Mapping[int, Sequence[Row]], most: int, each: int = 1) -> list[Row]:
    """At most `most` questions of each page, at most `each` of a family."""
    families: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    rows: list[Row] = []
    for page in sorted(pages):
        left = defaultdict(list)
        for row in pages[page]:
            left[row["family"]].append(row)
        # Families that were asked least come first; of a family the answer that was given least.
        order = sorted(left, key=lambda name: (families[name], name)) * each
        asked = 0
        for family in order:
            if not left[family] or asked == most:
                continue
            row = min(left[family], key=lambda row: (answers[family, kind_of(row)], digest(row)))
            left[family].remove(row)
            families[family] += 1
            answers[family, kind_of(row)] += 1
            asked += 1
            rows.append(row)
    return rows


def kind_of(row: Row) -> str:
    """What is balanced inside a family: the answer, or for names of things that hardly repeat, that
    it is a name."""
    if row["family"] == "state":
        return row["answer"] if row["answer"] in ("yes", "no") else "a name"
    return row["answer"]


def digest(row: Row) -> str:
    return hashlib.blake2b(
        f"{row['page']} {row['instruction']}".encode(), digest_size=8
    ).hexdigest()


def pack(folder: Path, archive: Path, most: int, each: int) -> Counter[str]:
    """Write the zip; gives how many questions each family has."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    pages: dict[int, list[Row]] = defaultdict(list)
    for row in map(json.loads, lines):
        pages[row["page"]].append(row)
    rows = chosen(pages, most, each)
    stored = [{name: value for name, value in row.items() if name not in DROPPED} for row in rows]
    pictures: dict[str, bytes] = {}
    for row in stored:
        name = row["img_filename"]
        row["img_filename"] = f"images/{Path(name).stem}.webp"
        if row["img_filename"] not in pictures:
            pictures[row["img_filename"]] = webp(folder / name)
    text = "".join(f"{json.dumps(row, separators=(',', ':'))}\n" for row in stored)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("questions.jsonl", OLD), text, zipfile.ZIP_DEFLATED, 9)
        for name, data in pictures.items():
            file.writestr(zipfile.ZipInfo(name, OLD), data)
    return Counter(row["family"] for row in rows)


def webp(path: Path) -> bytes:
    """The picture as lossless WebP."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5) or not (Path(sys.argv[1]) / "questions.jsonl").is_file():
        sys.exit(
            "usage: pack.py <folder that render.mjs made> <zip> [questions a page] [of a family]"
        )
    source, target, *numbers = sys.argv[1:]
    most, each = (*map(int, numbers), *(6, 1)[len(numbers) :])
    counts = pack(Path(source), Path(target), most, each)
    print(target, Path(target).stat().st_size, "bytes,", counts.total(), "questions", dict(counts))
