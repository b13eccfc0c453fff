"""What all benchmarks share: reading past damaged rows, sources, images."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.rows import as_text, encoded, write_jsonl

from tprl.data import benchmark
from tprl.data.benchmark import BadRow, batches, take, taken
from tprl.data.pope import Pope
from tprl.data.prompts import PromptStream
from tprl.errors import UserError


def row(i: int, **other: Any) -> dict[str, Any]:
    made = {
        "question_id": str(i),
        "question": f"Is there a dog in image {i}?",
        "answer": "yes",
        "image_source": f"COCO_{i // 2}",
        "image": as_text(encoded(i // 2)),
        "category": "random",
    }
    return made | other


def pope(folder: Path, count: int = 10, bad: dict[int, dict[str, Any]] | None = None, **options: Any) -> Pope:
    rows = [row(i, **(bad or {}).get(i, {})) for i in range(count)]
    return Pope(source=str(write_jsonl(folder / "rows.jsonl", rows)), **options)


BAD = {2: {"question": " "}, 3: {"answer": "maybe"}, 8: {"image": {"bytes": None, "path": None}}}


class TestDamage:
    def test_readers_pass_over_damaged_rows_and_fill_their_batches(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad=BAD, max_bad_rows=0.3)
        assert [len(batch) for batch in batches(data, None, 3)] == [3, 3, 1]
        assert [len(batch) for batch in batches(data, 4, 3)] == [2]
        assert [s.uid.rpartition("-")[2] for s in taken(data, [0, 2, 8, 9])] == ["0", "9"]
        assert data.damage == {"empty question": 1, "no answer": 1, "no image": 1}
        take(data, range(10))
        assert sum(data.damage.values()) == 3  # each row once

    def test_one_too_many_is_an_error_that_lists_them(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad=BAD, max_bad_rows=0.2)
        with pytest.raises(UserError, match=r"pope: row 8 .*3 of 10 rows .*empty question: 1.*raise dataset\.max_bad"):
            take(data, range(10))

    def test_training_reads_the_next_row_instead(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad=BAD, max_bad_rows=0.3)
        clean = [[s.uid for s in batch] for batch in PromptStream(pope(tmp_path / ".."), 5, 0, 2, seed=1)]
        found = [[s.uid for s in batch] for batch in PromptStream(data, 5, 0, 2, seed=1)]
        order = [uid for batch in clean for uid in batch]
        bad = {order[i] for i in range(10) if order[i].rpartition("-")[2] in ("2", "3", "8")}
        expected = [next(uid for uid in (order + order)[i:] if uid not in bad) for i in range(10)]
        assert [len(batch) for batch in found] == [5, 5]
        assert [uid for batch in found for uid in batch] == expected


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"limit": 0}, "limit=0 leaves no question of pope"),
            ({"max_bad_rows": 1.5}, r"max_bad_rows=1\.5 is not a share"),
            ({"split": "train"}, "pope has no labelled split 'train', only test: train on another dataset"),
        ],
    )
    def test_bad_ones(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            pope(tmp_path, **options)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("/nowhere/rows.jsonl", "does not exist: give a file, a folder, or a hub id"),
            ("nobody/nothing", "nobody/nothing is no folder and not in the cache, and the hub does not answer"),
        ],
    )
    def test_sources_that_are_not_there(self, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
        monkeypatch.setattr("tprl.data.tables.within_reach", lambda source: False)
        with pytest.raises(UserError, match=message):
            Pope(source=source)

    def test_a_broken_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n{"a": \n')
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2, is no JSON"):
            Pope(source=str(path))


class TestImages:
    def test_questions_about_one_image_share_the_object(self, tmp_path: Path) -> None:
        first, second, third = take(pope(tmp_path), range(3))
        assert first.images[0] is second.images[0]
        assert third.images[0] is not first.images[0]

    def test_huge_ones_are_scaled_down(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(benchmark, "MAX_PIXELS", 24 * 16 // 4)
        (sample,) = take(pope(tmp_path), [0])
        assert sample.images[0].size == (12, 8)

    @pytest.mark.parametrize("value", [None, "", "nowhere.png", {"bytes": b"GIF89a, but no more", "path": None}])
    def test_what_is_no_picture_is_a_bad_row(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(BadRow):
            pope(tmp_path).image(value, "key")

    def test_every_form_of_a_picture(self, tmp_path: Path) -> None:
        data, stored = pope(tmp_path), encoded(1, (40, 30))
        (tmp_path / "a.png").write_bytes(stored["bytes"])
        forms: list[Any] = [stored, as_text(stored)["bytes"], "a.png", Image.open(tmp_path / "a.png")]
        pictures = [data.image(form, key, tmp_path) for key, form in enumerate(forms)]
        assert len({picture.tobytes() for picture in pictures}) == 1
        assert {picture.mode for picture in pictures} == {"RGB"}
