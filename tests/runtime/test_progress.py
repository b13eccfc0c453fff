"""Lines in a log, one bar in a terminal."""

import io
import re
import sys
import time

import pytest

from tprl.runtime.progress import Progress, in_terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From within a test: pytest puts its own stdout in place before each phase."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def test_a_log_gets_few_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ppo", lines=4) as progress:
        for done in range(1, 101):
            progress(done, 100, "kl 0.010")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[1].split()[0] for line in lines] == [
        "25/100",
        "50/100",
        "75/100",
        "100/100",
    ]
    assert all(line.isascii() and line.endswith("kl 0.010") for line in lines)


def test_what_was_done_before_took_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tprl.runtime.progress.time.monotonic", iter([0.0, 60.0]).__next__)
    Progress("ppo", lines=100, before=50)(60, 100)
    assert "1:00<4:00" in capsys.readouterr().out  # 10 a minute, 40 left


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    progress = Progress("ppo")
    for done in range(1, 101):
        progress(done, 100, f"kl {done}")
    text = terminal.getvalue()
    assert "100/100" in text
    assert "kl 100" in text
    assert text.count("\n") == 1
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_a_bar_has_the_rate_and_what_is_left_of_its_first_step_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = open_terminal(monkeypatch)
    progress = Progress("demonstrate", before=500)
    monkeypatch.setattr("tprl.runtime.progress.time.monotonic", lambda: progress.start + 10)
    progress(500, 1000)
    assert "/s" not in terminal.getvalue()  # nothing to go by yet
    progress(600, 1000)
    progress.close()
    assert re.search(r"600/1000\S* \S*0:00:00\S* < 0:40  10/s", terminal.getvalue())


def test_an_error_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)

    def broken() -> None:
        with Progress("ppo") as progress:
            progress(1, 10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_ci_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal(monkeypatch)
    assert in_terminal()
    monkeypatch.setenv("CI", "true")
    assert not in_terminal()


def test_rate_and_eta_are_of_what_this_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    show = Progress("demonstrate", before=500)
    show(600, 1000)
    show(601, 1000)  # too soon
    show(1000, 1000, "note")
    assert capsys.readouterr().out.splitlines() == [
        "demonstrate  [############        ] 600/1000  0:10<0:40  10/s",
        "demonstrate  [####################] 1000/1000  0:20<0:00  25/s  note",
    ]


def test_nothing_to_do_is_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluate") as tick:
        tick(0, 0)
    assert "0/0" in capsys.readouterr().out
