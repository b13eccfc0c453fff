"""Rendered pages on their way to a machine with a GPU: what arrives is what the training reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from experiments.screens import travel
from experiments.screens.tiny.pages import Folder
from PIL import Image

PAGES = 5


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as render.mjs writes it, the questions of its last page still under way, and a
    font."""
    monkeypatch.setattr(travel, "HERE", tmp_path / "here")
    font = tmp_path / "here/node_modules/@fontsource/lato/files/lato-latin-400-normal.woff2"
    font.parent.mkdir(parents=True)
    font.write_bytes(b"a font")
    folder = tmp_path / "train-0"
    (folder / "images/00000").mkdir(parents=True)
    for number in range(1, PAGES + 1):
        picture = np.full((320, 320, 3), 200, np.uint8)
        picture[10 * number : 10 * number + 5] = (255, 40, number)
        Image.fromarray(picture).save(folder / f"images/00000/{number:08d}.png")
        rows = [{"page": number, "of": 2, "instruction": f"click {name}"} for name in "ab"]
        with (folder / "elements.jsonl").open("a") as stream:
            stream.write(json.dumps({"page": number, "elements": [], "runs": []}) + "\n")
        with (folder / "questions.jsonl").open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows[: 1 + (number < PAGES)])
    return folder


def test_what_is_unpacked_is_what_was_packed(
    tmp_path: Path, rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of a size, none twice; a page whose questions are not all there stays behind."""
    most = 11_000  # room for the font and three of these pages
    travel.pack(rendered, tmp_path / "parts", most)
    parts = sorted((tmp_path / "parts").glob("*/*.tar"))
    assert len(parts) == 2
    assert max(part.stat().st_size for part in parts) <= most
    monkeypatch.setattr(travel, "HERE", tmp_path / "there")
    travel.unpack(parts[:1], tmp_path / "pages")
    travel.unpack(parts, tmp_path / "pages")
    before, after = Folder(rendered), Folder(tmp_path / "pages")
    assert len(after) == len(before) == PAGES - 1
    for at in range(len(after)):
        for old, new in zip(before.page(at), after.page(at), strict=True):
            assert np.array_equal(old, new)
    fonts = [file.read_bytes() for file in (tmp_path / "there").rglob("*.woff2")]
    assert fonts == [b"a font"]


def test_without_fonts_nothing_is_packed(
    tmp_path: Path, rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(travel, "HERE", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"there are no fonts in .*nowhere.*: run npm install"):
        travel.pack(rendered, tmp_path / "parts", 1 << 20)
