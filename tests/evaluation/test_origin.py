"""Where numbers come from."""

import subprocess
from pathlib import Path

import pytest
import torch

from tprl.evaluation import origin


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_clone_and_local_changes_are_said(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert origin._commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "--short=10", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert origin._commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert origin._commit(tmp_path) == f"{commit} with local changes"
    (tmp_path / "installed").mkdir()
    assert origin._commit(tmp_path / "installed") is None  # somebody else's clone


def test_without_git_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin._commit(tmp_path) is None


def test_the_processor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text("flags : a\nmodel name\t: Abacus 7 @ 1 Hz\nmodel name\t: Abacus 7 @ 1 Hz\n")
    monkeypatch.setattr(origin, "CPUINFO", tmp_path / "cpuinfo")
    found = origin.origin()
    assert found["hardware"].startswith("Abacus 7 @ 1 Hz, ")
    assert f"torch {torch.__version__}" in found["versions"]
    monkeypatch.setattr(origin, "CPUINFO", tmp_path / "none")
    assert " cores" in origin.origin()["hardware"]
