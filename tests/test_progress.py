"""One line now and then, with rate and time left."""

import time

import pytest

from tprl.progress import Progress


def test_rate_and_eta_are_of_what_this_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    show = Progress("demonstrate", done=500)
    show(600, 1000)
    show(601, 1000)  # too soon
    show(1000, 1000, "note")
    assert capsys.readouterr().out.splitlines() == [
        "demonstrate  [############        ] 600/1000  0:10<0:40  10/s",
        "demonstrate  [####################] 1000/1000  0:20<0:00  25/s  note",
    ]
