"""What W&B wrote about an offline run, read with its own tool."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class OfflineRun:
    """The records of one `wandb/offline-run-*`; call `wandb.teardown()` before, or the file may be
    unflushed."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def about(self) -> dict[str, Any]:
        """Name, group, job type, ... of the run."""
        return self._of("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        updates = [self.about["config"], *self._of("config")]
        return {key: value for entry in updates for key, value in entry.get("update", {}).items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged, one dictionary for each call; of pictures and tables a dictionary of
        their parts."""
        return [_joined(entry["item"]) for entry in self._of("history")]

    @property
    def axes(self) -> dict[str, str | None]:
        """The x axis of each metric by name; None for the axes themselves."""
        return {entry["name"]: entry.get("step_metric") for entry in self._of("metric")}

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs below a folder, oldest first."""
    import wandb

    wandb.teardown()
    return [
        OfflineRun(path)
        for path in sorted(
            (folder / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime
        )
    ]


def _joined(item: dict[str, Any]) -> dict[str, Any]:
    media = {key.removesuffix("._type"): dict[str, Any]() for key in item if key.endswith("._type")}
    out: dict[str, Any] = {key: value for key, value in item.items() if not key.startswith("_")}
    for name, parts in media.items():
        keys = [key for key in out if key.startswith(f"{name}.")]
        parts |= {key.removeprefix(f"{name}."): out.pop(key) for key in keys}
    return out | media
