"""A file is the old one or the new one, whole, whatever happens while it is written."""

import os
from pathlib import Path

import pytest

from tprl.files import PART, replacing, sweep, write_atomically


def test_it_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "one")
    write_atomically(path, b"tw\xc3\xb6")
    assert path.read_text() == "twö"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "whole")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"{1 / 0}")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("rename") or rename(self, to))
    write_atomically(tmp_path / "a", "text")
    assert order == [str(tmp_path / f"a.{os.getpid()}{PART}"), "rename", str(tmp_path)]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "whole")
    path.with_name(f"a.json.{os.getpid()}{PART}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, "half")
    assert caught.value.filename == str(path)
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "pruner").mkdir()
    for name in ("last.ckpt", "last.ckpt.12.part", "pruner/config.json.9.part", "pruner/config.json"):
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "last.ckpt",
        "pruner/config.json",
    ]
