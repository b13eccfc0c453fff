"""Rows of a benchmark: from the hub, from a local copy of it, or from a file of one's own."""

import logging
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tprl.data.text_tables import SUFFIXES, TextRows, read_text_table, text_suffix
from tprl.errors import UserError
from tprl.runtime.hub import within_reach

BINARY = (".parquet", ".arrow")
FILES = (*SUFFIXES, *BINARY)


@runtime_checkable
class Table(Protocol):
    """Rows by number: a list of dicts, or a table of `datasets`, which is no `Sequence`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_table(source: str, subset: str | None, split: str) -> Table:
    """The rows of one split; images arrive undecoded, as {"bytes", "path"}.

    Args:
        source: a .jsonl, .json (a list), .csv, .tsv, .parquet or .arrow file, whose rows are the
            split; a folder of such files, `<split>.jsonl`, or `<subset>/<split>.jsonl` where there
            are subsets; a folder written by `save_to_disk`; a local clone of a hub repository; or a
            hub id.
        subset: the repository's configuration.
        split: the repository's own name of the split.

    Raises:
        UserError: nothing there, a damaged file, no such split, files of two kinds for one split,
            or `datasets` is not installed.
    """
    # Files first, then a folder of `datasets`, then what only `datasets` can read.
    path = Path(source)
    if path.is_dir():
        shards = _shards(path / (subset or ""), split)
        if shards and all(text_suffix(file) for file in shards):
            return TextRows(list(chain.from_iterable(read_text_table(file) for file in shards)))
        path = shards[0] if len(shards) == 1 else path
    if path.is_file():
        return _file(path)
    marks = [path / name for name in ("dataset_dict.json", "state.json")]
    if path.is_dir() and any(mark.is_file() for mark in marks):
        return _saved(path, split)
    if _kind(path) or (source.startswith((".", "/")) and not path.exists()):
        raise UserError(f"{source} does not exist: give a file, a folder, or a hub id.")
    if not path.is_dir() and not within_reach(source):
        return _cached(source, subset, split)
    return _loaded(source, subset, split)


def _file(path: Path) -> Table:
    """The rows of one file, whatever the split is called."""
    kind = _kind(path)
    if kind is None:
        raise UserError(
            f"{path} is none of {', '.join(FILES)}: convert it, or give a folder or a hub id."
        )
    if kind in SUFFIXES:
        return read_text_table(path)
    # pyarrow names the fault of a file in one line, `datasets` in a page.
    _library()
    check_file(path)
    return _loaded(kind.removeprefix("."), None, "train", path, data_files=str(path))


def _kind(path: Path) -> str | None:
    """The suffix in `FILES` that a file's name ends with, a .gz after that of a text aside."""
    return text_suffix(path) or next(
        (suffix for suffix in BINARY if path.suffix.lower() == suffix), None
    )


def _shards(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold a split: `<split>.jsonl`, or `<split>-00000-of-00002.parquet`
    and the like.

    Raises:
        UserError: they are of two kinds, of which one would be ignored.
    """
    # "val" must not take val2.jsonl: what follows a split's name begins with a separator.
    name = re.compile(rf"{re.escape(split)}(?:[-_.]\d[\w-]*)?\.\w+(?:\.gz)?", re.IGNORECASE)
    # Shards in the order of their numbers.
    files = sorted(
        file
        for file in folder.glob("*")
        if name.fullmatch(file.name) and file.is_file() and _kind(file)
    )
    if len({_kind(file) for file in files}) > 1:
        listed = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder} holds split {split} in files of two "
            f"kinds ({listed}): keep those of one kind."
        )
    return files


def check_file(path: Path) -> None:
    """Refuse an empty or damaged .parquet or .arrow file by its name.

    Raises:
        UserError: it is empty, or not of the kind that its name says.
    """
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes): fetch or write it again.")
    # The index alone, which takes milliseconds; rows are looked at where reading them fails.
    if reason := _fault(path, whole=False):
        raise UserError(
            f"{path} is not a {path.suffix.lower()} file, or it "
            f"is damaged ({reason}): fetch or write it again."
        )


def _fault(path: Path, whole: bool) -> str | None:
    """What is wrong with a .parquet or .arrow file: with its index, or with all its rows."""
    from pyarrow import ArrowException, ipc, memory_map, parquet

    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                for _ in file.iter_batches() if whole else ():
                    pass
        elif path.suffix.lower() == ".arrow":
            with memory_map(str(path)) as file:
                for _ in _arrow_batches(ipc, file) if whole else ():
                    pass
    except (ArrowException, OSError, ValueError) as error:
        return _line(error)
    return None


def _arrow_batches(ipc: Any, file: Any) -> Iterable[Any]:
    """`datasets` writes streams, others files with an index at their end."""
    # Only batches are read: rows of images need not fit into memory.
    if file.read(6) == b"ARROW1":
        reader = ipc.open_file(file)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    file.seek(0)
    return ipc.open_stream(file)


def column(table: Table, name: str) -> list[Any]:
    """One column, None where a row lacks it; the others (images) are not read.

    Raises:
        UserError: no row has it.
    """
    stored: Any = table
    # Rows of text files may differ in their columns.
    columns = chain.from_iterable(table) if isinstance(table, list) else stored.column_names
    there = set(columns)
    if name not in there:
        raise UserError(
            f"the rows have no column {name}, only {', '.join(sorted(there))}: choose the dataset "
            "that fits them, or rename the column."
        )
    return [row.get(name) for row in table] if isinstance(table, list) else list(stored[name])


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "this dataset needs the library `datasets`: pip install 'tprl[data]'."
        ) from error
    datasets.disable_progress_bars()
    # what it would say before it fails is in our sentence
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _loaded(
    source: str, subset: str | None, split: str, file: Path | None = None, **options: Any
) -> Any:
    library = _library()
    try:
        table = library.load_dataset(source, subset, split=split, **options)
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        # The library names no file: each is read through until one fails.
        where = file or Path(source)
        paths = sorted(where.rglob("*")) if where.is_dir() else []
        for path in [where] if where.is_file() else paths:
            if reason := _fault(path, whole=True):
                raise UserError(
                    f"{path} is damaged ({reason}): fetch or write it again."
                ) from error
        name = "" if subset is None else f", subset {subset}"
        raise UserError(
            f"{where} has no rows of split {split}{name} that can be read ({_line(error)})."
        ) from error
    return _undecoded(library, table)


def _line(error: BaseException) -> str:
    """What went wrong, in one line: `datasets` gives its reasons as causes."""
    # The innermost one names the file or the value; those around it say where they were.
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(cause).__name__


def _cached(source: str, subset: str | None, split: str) -> Any:
    """A dataset of the hub from the cache; `datasets` would first try the network for minutes."""
    config = _library().config
    # A global of the library: set for this call, and put back.
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return _loaded(source, subset, split)
    except UserError as error:
        raise UserError(
            f"{source} is not a folder, and the hub does not answer; from the "
            f"cache: {error} Give dataset.source=<a local copy>, or connect."
        ) from error
    finally:
        config.HF_HUB_OFFLINE = before


def _saved(path: Path, split: str) -> Any:
    library = _library()
    try:
        dataset = library.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, TypeError, library.exceptions.DatasetsError) as error:
        # The library does not say which of the files it could not read.
        damaged = next(
            (file for file in sorted(path.rglob("*.arrow")) if _fault(file, whole=True)), path
        )
        raise UserError(
            f"{damaged} is damaged ({_line(error)}): write it again by save_to_disk."
        ) from error
    if isinstance(dataset, library.DatasetDict):
        if split not in dataset:
            raise UserError(
                f"{path} has no split {split}, only {', '.join(dataset)}: choose one of these."
            )
        dataset = dataset[split]
    return _undecoded(library, dataset)


def _undecoded(library: Any, table: Any) -> Any:
    """Images as they are stored: a damaged one must be one bad row, not the end of the run."""
    # Columns with one image, and those with a list of them.
    for name, feature in table.features.items():
        if isinstance(feature, library.Image):
            table = table.cast_column(name, library.Image(decode=False))
        elif isinstance(feature, library.List) and isinstance(feature.feature, library.Image):
            table = table.cast_column(name, library.List(library.Image(decode=False)))
    return table
