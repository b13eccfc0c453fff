"""Rows of text files: JSON lines, a JSON list, CSV and TSV, in any encoding that says which one it
is."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tprl.data.values import shortened
from tprl.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SAVE = "save the file as UTF-8"


class TextRows(list[dict[str, Any]]):
    """Rows of a text file; `lines[i]` is the line (from 1) on which row i begins, where the format
    has lines."""

    def __init__(self, rows: list[dict[str, Any]], lines: list[int] | None = None) -> None:
        super().__init__(rows)
        self.lines = lines


def text_suffix(path: Path) -> str | None:
    """The kind of text table by the file's name, a final .gz aside; None for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_text_table(path: Path) -> TextRows:
    """The rows of a .jsonl, .json, .csv or .tsv file, or of one of these packed as .gz.

    A byte order mark decides the encoding (UTF-8, UTF-16 or UTF-32), without one the file is UTF-8.
    Lines end in LF, CRLF or CR. In CSV and TSV the first line names the columns, an empty cell is a
    missing value, and a cell that holds a JSON list or object is one.

    Raises:
        UserError: the file cannot be read, is empty, or is damaged; the error names the line.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty: write at least one row.")
    suffix = text_suffix(path)
    # The suffix decides: a JSON list and JSON lines cannot be told apart by every first line.
    if suffix == ".json":
        return TextRows(_json_list(path, text))
    if suffix in DELIMITERS:
        return _cells(path, text, DELIMITERS[suffix])
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [_json_line(path, number, line) for number, line in lines]
    return TextRows(rows, [number for number, _ in lines])


def read_text(path: Path) -> str:
    """The text of a file, decoded by its byte order mark or as UTF-8, with LF at the end of lines.

    Raises:
        UserError: the file cannot be read or unpacked, or its bytes are no text in that encoding.
    """
    content = _content(path)
    mark, encoding = next(
        ((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8")
    )
    content = content[len(mark) :]
    # Zero bytes are valid UTF-8, and would end up in questions.
    if encoding == "utf-8" and b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}, holds zero bytes, as UTF-16 "
            f"text without a byte order mark does: {SAVE}."
        )
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}, is not {encoding.upper()} text "
            f"({error.reason} at byte {error.start + len(mark)}): {SAVE}."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}): it cannot be unpacked; fetch or pack it again."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be read ({reason}): make it readable, or give another file."
        ) from error


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        more = error.msg == "Extra data"
        remedy = "name a file of JSON lines .jsonl" if more else "mend the file"
        raise UserError(
            f"{path}, line {error.lineno}, is not JSON ({error.msg}): {remedy}."
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{path} is nested too deep: write a list of one object per row."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must be a list of objects: write one object per row.")
    if not rows:
        raise UserError(f"{path} is empty: write at least one row.")
    return rows


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}, line {number},"
    try:
        # a file that was put together from several has marks inside
        row = json.loads(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        remedy = (
            "name a file with a JSON list .json"
            if line.strip() in "[{"
            else "mend or remove the line"
        )
        raise UserError(f"{where} is not JSON ({error.msg}): {remedy}.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep: write one object per line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {shortened(row)}: write one JSON object per line.")
    return row


def _cells(path: Path, text: str, delimiter: str) -> TextRows:
    """Rows of CSV or TSV, read strictly: quotes that do not end are an error."""
    csv.field_size_limit(sys.maxsize)  # cells may hold images as base64 text
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        # Names may be padded with blanks, as spreadsheets write them.
        columns = [name.strip() for name in next(reader)]
        rows, lines = _records(path, reader, columns)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}, is damaged ({error}): repair the file."
        ) from error
    if len(set(columns)) < len(columns):
        raise UserError(
            f"{path} names a column twice ({', '.join(columns)}): give each its own name."
        )
    if not rows:
        raise UserError(f"{path} is empty below its line of column names: write at least one row.")
    return TextRows(rows, lines)


def _records(path: Path, reader: Any, columns: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    rows, lines = [], []
    for number, cells in _numbered(reader):
        if len(cells) != len(columns):
            raise UserError(
                f"{path}, line {number}, has {len(cells)} cells, and there are "
                f"{len(columns)} columns: put texts with the delimiter in quotes."
            )
        rows.append({name: _value(cell) for name, cell in zip(columns, cells, strict=True)})
        lines.append(number)
    return rows, lines


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, and the line on which each begins: quoted cells may go over
    several."""
    start = reader.line_num + 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield start, cells
        start = reader.line_num + 1


def _value(cell: str) -> Any:
    if not cell.strip():
        return None
    if cell.lstrip()[0] in "[{":
        try:
            return json.loads(cell)
        except json.JSONDecodeError:  # a text that begins with a bracket
            return cell
    return cell
