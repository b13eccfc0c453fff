"""Where numbers come from."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tprl.runtime import provenance


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_clone_and_local_changes_are_said(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert provenance._git(tmp_path) == {}  # nothing committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert provenance._git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance._git(tmp_path) == {"commit": commit, "dirty": True}
    (tmp_path / "installed").mkdir()
    assert provenance._git(tmp_path / "installed") == {}  # somebody else's clone


def test_without_git_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._git(tmp_path) == {}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, None),
        ({"commit": "a" * 40, "dirty": False}, "a" * 10),
        ({"commit": "a" * 40, "dirty": True}, f"{'a' * 10} with local changes"),
    ],
)
def test_a_report_has_the_commit_in_words(
    facts: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_git", lambda root: facts)
    assert provenance.origin().get("commit") == words


def test_the_processor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text(
        "flags : a\nmodel name\t: Abacus 7 @ 1 Hz\nmodel name\t: Abacus 7 @ 1 Hz\n"
    )
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    facts = provenance.origin()
    assert facts["hardware"].startswith("Abacus 7 @ 1 Hz, ")
    assert f"torch {torch.__version__}" in facts["versions"]
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "none")
    assert " cores" in provenance.origin()["hardware"]


def test_a_run_knows_the_code_and_the_machine() -> None:
    facts = provenance.provenance()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert facts["git"].get("commit", "") == head.stdout.strip()  # a copy without git has neither
    assert {"torch", "transformers", "device", "threads", "command"} <= facts["environment"].keys()
