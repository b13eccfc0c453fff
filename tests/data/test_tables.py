"""Files of rows: encodings and line ends, CSV and TSV, damaged and empty files by their names."""

import codecs
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from tprl.data.tables import read_table
from tprl.errors import UserError

ROWS = [
    {"question": "Où?", "answers": ["a", "b"]},
    {"question": 'two,\tsaid "he"', "answers": ["c"]},
]
CSV = 'question,answers\nOù?,"[""a"", ""b""]"\n"two,\tsaid ""he""","[""c""]"\n'
TSV = 'question\tanswers\nOù?\t"[""a"", ""b""]"\n"two,\tsaid ""he"""\t"[""c""]"\n'
TEXTS = {
    "r.jsonl": "\n".join(map(json.dumps, ROWS)),
    "r.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "r.csv": CSV,
    "r.tsv": TSV,
}
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32": b"",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    table = read_table(str(path), None, "test")
    return [dict(table[i]) for i in range(len(table))]


def refusal(path: Path, split: str = "test") -> str:
    with pytest.raises(UserError) as error:
        read_table(str(path), None, split)
    return str(error.value)


class TestEncodings:
    @pytest.mark.parametrize("name", TEXTS)
    @pytest.mark.parametrize("encoding", MARKS)
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_marks_and_ends_of_lines(
        self, tmp_path: Path, name: str, encoding: str, end: str
    ) -> None:
        content = MARKS[encoding] + TEXTS[name].replace("\n", end).encode(encoding)
        (tmp_path / name).write_bytes(content)
        assert rows_of(tmp_path / name) == ROWS

    def test_files_put_together_keep_their_marks(self, tmp_path: Path) -> None:
        part = TEXTS["r.jsonl"].encode("utf-8-sig") + b"\r\n"
        (tmp_path / "r.jsonl").write_bytes(part + part)
        assert rows_of(tmp_path / "r.jsonl") == ROWS * 2

    @pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "shift_jis"])
    def test_others_are_one_sentence_with_line_and_remedy(
        self, tmp_path: Path, encoding: str
    ) -> None:
        text = (
            '{"question": "a"}\n{"question": "\u00a5 \u00b4"}'
            if encoding != "shift_jis"
            else '{"a": 1}\n{"a": "日本"}'
        )
        (tmp_path / "r.jsonl").write_bytes(text.encode(encoding))
        sentence = refusal(tmp_path / "r.jsonl")
        line = 1 if encoding == "utf-16-le" else 2
        assert sentence.startswith(f"{tmp_path / 'r.jsonl'}, line {line}, ")
        assert sentence.endswith("save the file as UTF-8.")

    def test_lines_of_another_end_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\r\r{"a": 1}\r{"a"}')
        assert f"{tmp_path / 'r.jsonl'}, line 4, is not JSON" in refusal(tmp_path / "r.jsonl")


class TestCells:
    def test_an_empty_cell_is_a_missing_value_and_a_number_stays_a_text(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "r.csv").write_text("a,b,c\n007,,[not json\n\n\n1,2,3\n")
        assert rows_of(tmp_path / "r.csv") == [
            {"a": "007", "b": None, "c": "[not json"},
            {"a": "1", "b": "2", "c": "3"},
        ]

    def test_cells_may_be_as_long_as_an_image(self, tmp_path: Path) -> None:
        (tmp_path / "r.tsv").write_text(f"image\tn\n{'A' * 300_000}\t1\n")
        assert len(rows_of(tmp_path / "r.tsv")[0]["image"]) == 300_000

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("a,b\n1\n", "line 2, has 1 cells, and there are 2 columns"),
            ('a,b\n"x\ny",2\n1,2,3\n', "line 4, has 3 cells"),
            ('a,b\n"1,2\n', "is damaged"),
            ("a,a\n1,2\n", "names a column twice"),
            ("a,b\n", "is empty below its line of column names"),
        ],
    )
    def test_damage(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "r.csv").write_text(text)
        assert reason in refusal(tmp_path / "r.csv")
        assert str(tmp_path / "r.csv") in refusal(tmp_path / "r.csv")


class TestPacked:
    def test_gz_is_read(self, tmp_path: Path) -> None:
        for name, text in TEXTS.items():
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
            assert rows_of(tmp_path / f"{name}.gz") == ROWS

    @pytest.mark.parametrize("kept", [slice(0, 40), slice(5, None), slice(0, -4)])
    def test_a_damaged_one_is_named(self, tmp_path: Path, kept: slice) -> None:
        path = tmp_path / "r.jsonl.gz"
        path.write_bytes(gzip.compress(TEXTS["r.jsonl"].encode() * 9)[kept])
        assert refusal(path).startswith(f"{path} is damaged (")


class TestDamagedFiles:
    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow"])
    def test_an_empty_one(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name} is empty")

    @pytest.mark.parametrize("suffix", ["parquet", "arrow"])
    @pytest.mark.parametrize("damage", ["other", "cut", "inside"])
    def test_a_damaged_one_is_named_with_the_reason(
        self, tmp_path: Path, suffix: str, damage: str
    ) -> None:
        path = tmp_path / f"r.{suffix}"
        table = datasets.Dataset.from_list([{"a": os.urandom(40).hex()} for _ in range(500)])
        if suffix == "parquet":
            table.to_parquet(path)
        else:
            table.save_to_disk(tmp_path / "saved")
            path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
        assert len(read_table(str(path), None, "test")) == 500
        content = bytearray(path.read_bytes())
        if damage == "inside" and suffix == "arrow":
            content[1:8] = os.urandom(7)
        elif damage == "inside":
            content[20 : len(content) // 2] = os.urandom(len(content) // 2 - 20)
        path.write_bytes(
            {"other": b"hello\n", "cut": content[: len(content) // 2], "inside": content}[damage]
        )
        sentence = refusal(path)
        assert sentence.startswith(str(path))
        assert "damaged" in sentence
        assert sentence.endswith("fetch or write it again.")

    def test_the_damaged_one_of_several(self, tmp_path: Path) -> None:
        for number in range(2):
            datasets.Dataset.from_list([{"a": number}]).to_parquet(
                tmp_path / f"test-0000{number}-of-00002.parquet"
            )
        assert len(read_table(str(tmp_path), None, "test")) == 2
        (tmp_path / "test-00001-of-00002.parquet").write_bytes(b"PAR1")
        assert f"{tmp_path / 'test-00001-of-00002.parquet'} is damaged (" in refusal(tmp_path)

    def test_a_damaged_folder_of_save_to_disk(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list([{"a": "x" * 50} for _ in range(500)]).save_to_disk(tmp_path)
        file = next(tmp_path.glob("*.arrow"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert refusal(tmp_path).startswith(f"{file} is damaged (")


class TestFolders:
    def test_files_of_two_kinds_for_one_split(self, tmp_path: Path) -> None:
        (tmp_path / "test.jsonl").write_text('{"a": 1}')
        (tmp_path / "train.csv").write_text("a\n1\n")
        assert rows_of(tmp_path) == [{"a": 1}]
        (tmp_path / "test-1.csv").write_text("a\n1\n")
        sentence = refusal(tmp_path)
        assert (
            f"{tmp_path} holds split test in files of two kinds (test-1.csv, test.jsonl)"
            in sentence
        )

    def test_parts_of_a_split_are_read_in_order(self, tmp_path: Path) -> None:
        for number in (1, 0):
            (tmp_path / f"test-0000{number}-of-00002.jsonl").write_bytes(
                codecs.BOM_UTF8 + json.dumps({"a": number}).encode()
            )
        assert [row["a"] for row in rows_of(tmp_path)] == [0, 1]

    def test_a_list_in_a_file_of_lines_and_lines_in_a_file_of_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "r.jsonl").write_text(TEXTS["r.json"])
        assert "line 1, is not JSON" in refusal(tmp_path / "r.jsonl")
        assert refusal(tmp_path / "r.jsonl").endswith("name a file with a JSON list .json.")
        (tmp_path / "r.json").write_text(TEXTS["r.jsonl"])
        assert refusal(tmp_path / "r.json").endswith("name a file of JSON lines .jsonl.")
