"""Tokens on disk come back as they were added."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tprl.errors import UserError
from tprl.stages.token_file import TokenFile


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_rows_follow_each_other_in_half_precision() -> None:
    file, parts = TokenFile(5), [rows(3, 0).half(), rows(0, 1).half(), rows(4, 2).half()]
    for part in parts:
        file.add(part)
    assert torch.equal(file.mapped(), torch.cat(parts))
    assert file.mapped().dtype == torch.half


def test_one_number_too_large_makes_all_rows_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tprl.stages.token_file.PIECE", 2)
    file, parts = TokenFile(5), [rows(3, 0).half(), 1e6 * rows(2, 1), rows(4, 2).half()]
    for part in parts:
        file.add(part)
    assert torch.equal(file.mapped(), torch.cat([part.float() for part in parts]))


def test_the_folder_goes_with_the_file() -> None:
    file = TokenFile(5)
    file.add(rows(2, 0))
    folder, whole = file.path.parent, file.mapped()
    file.folder.cleanup()
    assert not folder.exists()
    assert torch.equal(whole, rows(2, 0))  # what is mapped stays until it is let go


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    file = TokenFile(5)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot be written to .* \(No space left.*TMPDIR"):
        file.add(rows(2, 0).half())
