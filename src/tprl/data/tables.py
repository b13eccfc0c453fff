"""Rows of a benchmark: from the hub, from a local copy of it, or from a file of one's own."""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tprl.errors import UserError
from tprl.hub import within_reach

FILES = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@runtime_checkable
class Table(Protocol):
    """Rows by number: a list of dicts, or a table of `datasets`, which is no `Sequence`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_table(source: str, subset: str | None, split: str) -> Table:
    """The rows of one split; images arrive undecoded, as {"bytes", "path"}.

    Args:
        source: a .jsonl, .json (a list), .parquet or .arrow file, whose rows are the split; a folder of such files,
            `<split>.jsonl`, or `<subset>/<split>.jsonl` where there are subsets; a folder written by `save_to_disk`; a
            local clone of a hub repository; or a hub id.
        subset: the repository's configuration.
        split: the repository's own name of the split.

    Raises:
        UserError: nothing there, a line that is no JSON object, no such split, or `datasets` is not installed.
    """
    path = Path(source)
    named = [path / (subset or "") / f"{split}{suffix}" for suffix in FILES]
    path = next((file for file in named if file.is_file()), path)
    if path.is_file():
        kind = FILES.get(path.suffix)
        if kind is None:
            raise UserError(f"{path} is none of {', '.join(FILES)}: convert it, or give a folder or a hub id.")
        return _json_rows(path) if kind in ("jsonl", "json") else _loaded(kind, None, "train", data_files=str(path))
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    if path.suffix in FILES or (source.startswith((".", "/")) and not path.exists()):
        raise UserError(f"{source} does not exist: give a file, a folder, or a hub id.")
    if not path.is_dir() and not within_reach(source):
        return _cached(source, subset, split)
    return _loaded(source, subset, split)


def column(table: Table, name: str) -> list[Any]:
    """One column, None where a row lacks it; the others (images) are not read.

    Raises:
        UserError: no row has it.
    """
    stored: Any = table
    there = {key for row in table for key in row} if isinstance(table, list) else set(stored.column_names)
    if name not in there:
        raise UserError(f"the rows have no column {name}, only {', '.join(sorted(there))}: is it the right dataset?")
    return [row.get(name) for row in table] if isinstance(table, list) else list(stored[name])


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Read here and not by `datasets`, which wants the same type in every row and names none that has another."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    try:
        rows = json.loads(text) if path.suffix == ".json" else None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, is no JSON ({error.msg}): mend the file.") from error
    if rows is None:
        rows = [_json_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no list of objects: write one object per row.")
    return rows


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}, is no JSON ({error.msg}): mend or remove the line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}, holds {row!r}: write one JSON object per line.")
    return row


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("this dataset needs the library `datasets`: pip install 'tprl[data]'.") from error
    datasets.disable_progress_bars()
    return datasets


def _loaded(source: str, subset: str | None, split: str, **options: Any) -> Any:
    library = _library()
    try:
        found = library.load_dataset(source, subset, split=split, **options)
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source} has no rows of split {split}, subset {subset} ({reason}).") from error
    return _undecoded(library, found)


def _cached(source: str, subset: str | None, split: str) -> Any:
    """A dataset of the hub from the cache; `datasets` would first try the network for minutes."""
    config = _library().config
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return _loaded(source, subset, split)
    except UserError as error:
        raise UserError(
            f"{source} is no folder, and the hub does not answer; from the cache: {error} Give dataset.source=<a local "
            "copy>, or connect."
        ) from error
    finally:
        config.HF_HUB_OFFLINE = before


def _saved(path: Path, split: str) -> Any:
    library = _library()
    found = library.load_from_disk(str(path))
    if isinstance(found, library.DatasetDict):
        if split not in found:
            raise UserError(f"{path} has no split {split}: it holds {', '.join(found)}.")
        found = found[split]
    return _undecoded(library, found)


def _undecoded(library: Any, table: Any) -> Any:
    """Images as they are stored: a damaged one must be one bad row, not the end of the run."""
    for name, feature in table.features.items():
        if isinstance(feature, library.Image):
            table = table.cast_column(name, library.Image(decode=False))
        elif isinstance(feature, library.List) and isinstance(feature.feature, library.Image):
            table = table.cast_column(name, library.List(library.Image(decode=False)))
    return table
