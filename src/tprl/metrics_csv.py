"""`metrics.csv`, which a resumed run goes on with."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from tprl.files import write_atomically


class MetricsCSV(CSVLogger):
    """Lightning's logger, except that it adds to a file that is there, where Lightning's deletes it.

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

    def count(self) -> int:
        """Rows in the file."""
        return len(self._read())

    @rank_zero_only
    def keep(self, count: int) -> None:
        """Cut the file after `count` rows: those of iterations that will be repeated."""
        if not self.path.is_file():
            return
        rows = self._read()[:count]
        names = sorted({name for row in rows for name, value in row.items() if value != ""})
        self._experiment = None  # a writer knows the columns of the file it began with
        if rows:
            _write(self.path, names, rows)
        else:
            self.path.unlink()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            whole = (row for row in csv.DictReader(file) if None not in row.values())  # a kill may cut the last one
            return list(whole)


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


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())
