"""What all benchmarks share: reading past damaged rows, sources, images."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.rows import as_text, encoded, write_jsonl

from tprl.data.gqa import GQA
from tprl.data.pope import Pope
from tprl.data.taking import BadRow, batches, take, taken
from tprl.data.textvqa import TextVQA
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.scoring.validation import ServedScore
from tprl.stages.prompts import PromptStream


def row(i: int, **other: Any) -> dict[str, Any]:
    fields = {
        "question_id": str(i),
        "question": f"Is there a dog in image {i}?",
        "answer": "yes",
        "image_source": f"COCO_{i // 2}",
        "image": as_text(encoded(i // 2)),
        "category": "random",
    }
    return fields | other


def pope(
    folder: Path, count: int = 10, bad: dict[int, dict[str, Any]] | None = None, **options: Any
) -> Pope:
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

    def test_too_many_bad_rows_raise_an_error_that_lists_them(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad=BAD, max_bad_rows=0.2)
        with pytest.raises(
            UserError,
            match=r"pope: row 8 .*3 of 10 rows .*empty question: 1.*raise dataset\.max_bad",
        ):
            take(data, range(10))

    def test_training_reads_the_next_row_instead(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad=BAD, max_bad_rows=0.3)
        clean = [
            [s.uid for s in batch] for batch in PromptStream(pope(tmp_path / ".."), 5, 0, 2, seed=1)
        ]
        result = [[s.uid for s in batch] for batch in PromptStream(data, 5, 0, 2, seed=1)]
        order = [uid for batch in clean for uid in batch]
        bad = {order[i] for i in range(10) if order[i].rpartition("-")[2] in ("2", "3", "8")}
        expected = [next(uid for uid in (order + order)[i:] if uid not in bad) for i in range(10)]
        assert [len(batch) for batch in result] == [5, 5]
        assert [uid for batch in result for uid in batch] == expected

    def test_a_row_of_another_make_is_damaged_and_no_crash(self, tmp_path: Path) -> None:
        data = pope(tmp_path, bad={1: {"image": 7, "image_source": "new"}}, max_bad_rows=0.2)
        assert len(take(data, range(10))) == 9
        assert data.damage == {"no image": 1}
        textvqa = {
            "question": "what?",
            "answers": [[3]],
            "image_id": "a",
            "question_id": 1,
            "image": as_text(encoded(0)),
        }
        source = str(write_jsonl(tmp_path / "t.jsonl", [textvqa]))
        data = TextVQA(source=source, max_bad_rows=1.0)
        assert take(data, [0]) == []
        assert data.damage == {"value is not a text": 1}

    def test_a_dataset_of_damaged_rows_alone_is_refused(self, tmp_path: Path) -> None:
        data = pope(
            tmp_path, count=2, bad={0: {"question": ""}, 1: {"question": ""}}, max_bad_rows=1.0
        )
        with pytest.raises(UserError, match=r"\(empty question: 2\), so there is nothing to train"):
            next(iter(PromptStream(data, 1, 0, 1)))
        with pytest.raises(
            UserError, match=r"all 2 rows of pope .* \(empty question: 2\), so .* to validate"
        ):
            ServedScore(ToyLVLM(), data, [0.5])


class TestArguments:
    def test_one_file_is_not_all_splits(self, tmp_path: Path) -> None:
        source = str(
            write_jsonl(
                tmp_path / "rows.jsonl",
                [{"id": "1", "imageId": "a", "question": "q", "answer": "a"}],
            )
        )
        with pytest.raises(
            UserError,
            match=r"which gqa would read as train and as every other split: give .*folder",
        ):
            GQA("train", source=source)

    def test_line_separators_within_a_text_end_no_row(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        lines = [
            json.dumps(row(i, question=f"is it{mark}so?"), ensure_ascii=False)
            for i, mark in enumerate("\u2028\x85")
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert [s.question[:8] for s in take(Pope(source=str(path)), range(2))] == [
            "is it\u2028so",
            "is it\x85so",
        ]
        path.write_bytes(b'{"question": "caf\xe9"}\n')
        with pytest.raises(
            UserError, match=r"rows\.jsonl, line 1, is not UTF-8 text .*save the file as UTF-8"
        ):
            Pope(source=str(path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"limit": 0},
                "limit must be at least 1 or null, got 0; null reads all questions of pope",
            ),
            ({"max_bad_rows": 1.5}, r"max_bad_rows must be a share in \[0, 1\], got 1\.5"),
            (
                {"max_pixels": 0},
                "max_pixels=0 is not a number of pixels: use a whole number from 1 on",
            ),
            (
                {"split": "train"},
                "pope has no labelled split 'train', only test: train on another dataset",
            ),
        ],
    )
    def test_bad_ones(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            pope(tmp_path, **options)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("/nowhere/rows.jsonl", "does not exist: give a file, a folder, or a hub id"),
            (
                "nobody/nothing",
                "nobody/nothing is not a folder, and the hub does not answer; from the cache: ",
            ),
        ],
    )
    def test_missing_sources_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, source: str, message: str
    ) -> None:
        monkeypatch.setattr("tprl.data.tables.within_reach", lambda source: False)
        with pytest.raises(UserError, match=message):
            Pope(source=source)

    def test_a_broken_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n{"a": \n')
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2, is not JSON"):
            Pope(source=str(path))


class TestImages:
    def test_questions_about_one_image_share_the_object(self, tmp_path: Path) -> None:
        first, second, third = take(pope(tmp_path), range(3))
        assert first.images[0] is second.images[0]
        assert third.images[0] is not first.images[0]

    def test_huge_ones_are_scaled_down(self, tmp_path: Path) -> None:
        (sample,) = take(pope(tmp_path, max_pixels=24 * 16 // 4), [0])
        assert sample.images[0].size == (12, 8)

    @pytest.mark.parametrize(
        "value", [None, "", "nowhere.png", {"bytes": b"GIF89a, but no more", "path": None}]
    )
    def test_what_is_no_picture_is_a_bad_row(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(BadRow):
            pope(tmp_path).image(value, "key")

    def test_relative_paths_start_at_the_source(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.png").write_bytes(encoded(1)["bytes"])
        data = pope(
            tmp_path,
            2,
            bad={0: {"image": "images/a.png"}, 1: {"image": "images/b.png", "image_source": "b"}},
        )
        assert data[0].images[0].size == (24, 16)
        with pytest.raises(UserError, match=r"missing image file.*images/b\.png does not exist"):
            take(data, [1])

    def test_every_form_of_a_picture(self, tmp_path: Path) -> None:
        data, stored = pope(tmp_path), encoded(1, (40, 30))
        (tmp_path / "a.png").write_bytes(stored["bytes"])
        text = as_text(stored)["bytes"]
        uri = f"data:image/png;base64,{text}\n"
        forms: list[Any] = [stored, text, uri, "a.png", Image.open(tmp_path / "a.png")]
        pictures = [data.image(form, key, tmp_path) for key, form in enumerate(forms)]
        assert len({picture.tobytes() for picture in pictures}) == 1
        assert {picture.mode for picture in pictures} == {"RGB"}
