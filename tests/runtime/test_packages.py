"""Packages that do not fit each other."""

import sys
from pathlib import Path

import pytest

from tprl.errors import UserError
from tprl.runtime.packages import check_torchvision


def test_a_torchvision_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(
        UserError, match=r"does not fit torch 2\..*torchvision::nms.*pip uninstall torchvision"
    ):
        check_torchvision()


def test_none_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    monkeypatch.setattr("tprl.runtime.packages.find_spec", looked_for.append)
    check_torchvision()
    assert looked_for == ["torchvision"]
