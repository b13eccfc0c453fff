"""A file is the old one or the new one, whole, whatever happens while it is written."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tprl.runtime.files import (
    PART,
    SUMS,
    Damaged,
    check,
    open_row,
    read_sealed,
    remove,
    replacing,
    sealed_row,
    sweep,
    write_atomically,
    write_sealed,
)


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


def test_the_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    rename = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: order.append("rename") or rename(self, to)
    )
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
    for name in (
        "last.ckpt",
        "last.ckpt.12.part",
        "pruner/config.json.9.part",
        "pruner/config.json",
    ):
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "last.ckpt",
        "pruner/config.json",
    ]


class Killed(BaseException):
    """Ends a write where a kill would."""


class TestChecksums:
    @pytest.mark.parametrize("before", ["sealed", "from an older version", "nothing"])
    def test_a_kill_between_any_two_writes_leaves_a_whole_file(
        self, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = Path.replace
        seen = set()
        for steps in range(4):
            path, left = tmp_path / str(steps) / "a.json", [steps]
            path.parent.mkdir()
            if before != "nothing":
                (write_sealed if before == "sealed" else write_atomically)(path, "old")

            def step(self: Path, to: Path, left: list[int] = left) -> Path:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return rename(self, to)

            for content in ("new", "newer"):  # killed twice at the same place
                left[0] = steps
                with monkeypatch.context() as patch, suppress(Killed):
                    patch.setattr(Path, "replace", step)
                    write_sealed(path, content)
                if path.exists():
                    seen.add(read_sealed(path))
        assert seen == {b"new", b"newer"} | ({b"old"} if before != "nothing" else set())

    def test_sha256sum_accepts_the_checksum_files(self, tmp_path: Path) -> None:
        write_sealed(tmp_path / "a.json", "text")
        command = ["sha256sum", "--check", "--strict", f"{SUMS}/a.json.sha256"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert process.stdout == "a.json: OK\n"

    def test_a_file_of_an_older_version_loads(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("text")
        check(tmp_path / "a")
        assert read_sealed(tmp_path / "a") == b"text"

    def test_a_damaged_checksum_file_is_reported(self, tmp_path: Path) -> None:
        write_sealed(tmp_path / "a", "text")
        (tmp_path / SUMS / "a.sha256").write_bytes(b"")
        with pytest.raises(Damaged, match=r"a\.sha256 is unreadable; without that file"):
            check(tmp_path / "a")
        write_sealed(tmp_path / "a", "text")
        check(tmp_path / "a")

    def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, read = tmp_path / "a", Path.read_bytes
        write_sealed(path, "old")
        contents = iter(["new"])

        def slow(self: Path) -> bytes:
            for content in contents:
                write_sealed(path, content)
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", slow)
        assert read_sealed(path) == b"new"

    def test_removing_takes_the_checksum_along(self, tmp_path: Path) -> None:
        write_sealed(tmp_path / "a", "text")
        remove(tmp_path / "a")
        remove(tmp_path / "a")
        assert not list(tmp_path.rglob("*a*"))

    def test_rows_come_back_and_any_flipped_byte_is_seen(self) -> None:
        value = {"a/ü": [0.1, None], "b": "two\nlines"}
        line = sealed_row(value)
        assert open_row(line) == value
        assert open_row(b'{"a": 1}') == {"a": 1}  # of an older version
        for place in range(len(line)):
            with pytest.raises(Damaged):
                open_row(line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :])
            with pytest.raises(Damaged):
                open_row(line[:place])
