"""`metrics.csv`, which a resumed run goes on with."""

import csv
import io
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from tprl.errors import UserError
from tprl.runtime import files
from tprl.runtime.files import write_atomically

log = logging.getLogger(__name__)


class MetricsCSV(CSVLogger):
    """Lightning's logger, except that it adds to a file that is there, where Lightning's deletes
    it.

    Args:
        save_dir: where `metrics.csv` is.
        options: see `lightning.pytorch.loggers.CSVLogger`.
    """

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self.path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Adding(self.log_dir)
        return self._experiment

    def mark(self) -> dict[str, Any]:
        """The number of rows in the file and their checksum, for `keep`. What they count is on
        disk."""
        rows = self._read()
        if rows:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {"count": len(rows), "checksum": _checksum(rows)}

    @rank_zero_only
    def keep(self, count: int, checksum: str | None = None) -> None:
        """Cut the file after `count` rows: those of iterations that will be repeated.

        Args:
            count: rows that stay.
            checksum: what `mark` gave for them.

        Raises:
            UserError: they are not the rows that were marked. The file stays as it is.
        """
        if not self.path.is_file():
            if count:
                log.warning(
                    "%s is gone: the %d rows before this point are missing from it",
                    self.path,
                    count,
                )
            return
        # Rows behind the mark are of iterations that the resumed run does again.
        rows = self._read()[:count]
        if len(rows) < count or (checksum is not None and count and _checksum(rows) != checksum):
            raise UserError(
                f"{self.path} is damaged (its first {count} rows are not those that the checkpoint "
                "counts): move it away, and the run goes on without these rows."
            )
        # Columns that only cut rows had filled go too.
        names = sorted({name for row in rows for name, value in row.items() if value != ""})
        self._experiment = None  # a writer knows the columns of the file it began with
        if rows:
            _write(self.path, names, rows)
        else:
            self.path.unlink()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        rows = list[dict[str, str]]()
        # Bytes that are no text, or no table, are for the checksum of the rows to find.
        with (
            self.path.open(encoding="utf-8", errors="replace", newline="") as file,
            suppress(csv.Error),
        ):
            for row in csv.DictReader(file):
                if None not in row.values():  # a kill may cut the last one
                    rows.append(row)
        return rows


class _Adding(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """Lightning's own deletes the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning's own empties the file first."""
        with Path(self.metrics_file_path).open(encoding="utf-8", newline="") as file:
            _write(Path(self.metrics_file_path), fieldnames, list(csv.DictReader(file)))


def _checksum(rows: Sequence[dict[str, str]]) -> str:
    """Of the values, whatever columns the file has got meanwhile."""
    values = []
    for row in rows:
        values.append(sorted((str(name), value) for name, value in row.items() if value != ""))
    return files.checksum(json.dumps(values))


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())
