"""python experiments/screens/travel.py pack <train folder> <out> [--mib 20], or unpack <parts>
<out>: rendered pages, and the fonts of sheets, on their way to a machine that renders none.

Pictures become lossless WebP, lines of JSON are compressed together; each part is a tar of its own,
in a folder of its own (0, 1, ...), and no larger than asked for. `unpack` adds the pages of parts
to a folder as the training reads it, in the order of the parts, and puts fonts where sheets look
for them.
"""

import argparse
import io
import json
import lzma
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
FONTS = (
    "@fontsource/*/files/*-latin-[47]00-normal.woff2",
    "bootstrap-icons/font/bootstrap-icons.json",
    "bootstrap-icons/font/fonts/bootstrap-icons.woff2",
)  # what sheets.py opens
TEXT = 1700  # bytes that a page's lines take when compressed, about
TABLES = ("questions", "elements")  # a page is there when its elements are


def pages(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and lines of every page whose questions are there."""
    asked: dict[int, list[str]] = defaultdict(list)
    with (folder / "questions.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                asked[json.loads(line)["page"]].append(line)
    with (folder / "elements.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            number = json.loads(line)["page"] if line.endswith("\n") else -1
            rows = asked.get(number, [])
            if rows and len(rows) >= json.loads(rows[0])["of"]:
                yield number, {"elements": line, "questions": "".join(rows)}


def picture(folder: Path, number: int) -> bytes:
    """A page as lossless WebP."""
    name = f"{number:08d}"
    stream = io.BytesIO()
    with Image.open(folder / f"images/{name[:5]}/{name}.png") as opened:
        opened.convert("RGB").save(stream, "webp", lossless=True, quality=100, method=4)
    return stream.getvalue()


class Part:
    """A tar under way."""

    def __init__(self, out: Path, number: int) -> None:
        file = out / f"{number}/part-{number}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.tar = file, tarfile.TarFile(file, "w")
        self.size = self.count = 0
        self.lines: dict[str, list[str]] = {name: [] for name in TABLES}

    def add(self, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self.tar.addfile(entry, io.BytesIO(content))
        self.size += 512 + -(-len(content) // 512) * 512

    def page(self, number: int, lines: Mapping[str, str], content: bytes) -> None:
        self.add(f"images/{number:08d}.webp", content)
        for name in TABLES:
            self.lines[name].append(lines[name])
        self.size += TEXT
        self.count += 1

    def close(self) -> None:
        """With the lines of all its pages."""
        for name in TABLES:
            text = "".join(self.lines[name]).encode()
            self.add(f"{name}.jsonl.xz", lzma.compress(text))
        self.tar.close()
        print(f"{self.file}: {self.count} pages, {self.file.stat().st_size / 2**20:.1f} MiB")


def pack(folder: Path, out: Path, most: int) -> None:
    """Parts of at most so many bytes."""
    for old in out.glob("*/part-*.tar"):
        old.unlink()
    part = Part(out, 0)
    modules = HERE / "node_modules"
    fonts = sorted(file for pattern in FONTS for file in modules.glob(pattern))
    if not fonts:
        sys.exit(f"error: there are no fonts in {modules}: run npm install in {HERE}.")
    for file in fonts:
        part.add(f"fonts/{file.relative_to(modules)}", file.read_bytes())
    number = 0
    for page, lines in pages(folder):
        content = picture(folder, page)
        if part.size + len(content) + TEXT + 1024 > most:
            part.close()
            number += 1
            part = Part(out, number)
        part.page(page, lines, content)
    part.close()


def unpack(parts: Sequence[Path], out: Path) -> None:
    """Add the pages of parts to a folder; those that are there already stay."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "unpacked").touch()
    known = set((out / "unpacked").read_text(encoding="utf-8").split())
    for file in sorted(parts, key=lambda file: int(file.stem.removeprefix("part-"))):
        if file.name in known:
            continue
        with tarfile.open(file) as tar:
            for entry in tar:
                stream = tar.extractfile(entry)
                if stream is not None:
                    _put(entry.name, stream.read(), out)
        with (out / "unpacked").open("a", encoding="utf-8") as stream:
            stream.write(f"{file.name}\n")


def _put(name: str, content: bytes, out: Path) -> None:
    """One file of a part: a picture, lines, or a font."""
    if name.endswith(".jsonl.xz"):
        with (out / name.removesuffix(".xz")).open("ab") as stream:
            stream.write(lzma.decompress(content))
        return
    kind, _, path = name.partition("/")
    target = (
        HERE / "node_modules" / path
        if kind == "fonts"
        else out / "images" / path[:5] / path  # as render.mjs lays them
    )
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("folder", type=Path, help="rendered pages, or a folder of parts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--mib", type=float, default=20, help="of a part at most")
    options = parser.parse_args()
    if not options.folder.is_dir():
        sys.exit(f"error: there is no folder {options.folder}.")
    if options.what == "pack":
        pack(options.folder, options.out, int(options.mib * 2**20))
    else:
        unpack(list(options.folder.rglob("part-*.tar")), options.out)


if __name__ == "__main__":
    main()
