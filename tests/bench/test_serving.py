"""The serving benchmark, on an engine of paper whose clock is its work."""

from collections.abc import Iterable
from typing import Any

import pytest

from tprl.bench.serving import Point, Step, drive, measure, quantile, rows, serving_table, verdict


class Paper:
    """Reads a prompt of n tokens in n seconds, alone; then writes a token a second for all requests
    together."""

    def __init__(self) -> None:
        self.now, self.most = 0.0, 0
        self.reading: list[Any] = []
        self.writing: dict[str, Any] = {}

    def add(self, request: str, prompt: int) -> None:
        self.reading.append((request, prompt))
        self.most = max(self.most, len(self.reading) + len(self.writing))

    def step(self) -> Iterable[Step]:
        if self.reading:
            request, length = self.reading.pop(0)
            self.now += length
            self.writing[request] = 1
            return [Step(request, 1, False)]
        self.now += 1
        self.writing = {request: written + 1 for request, written in self.writing.items()}
        steps = [Step(request, written, written == 3) for request, written in self.writing.items()]
        self.writing = {
            request: written for request, written in self.writing.items() if written < 3
        }
        return steps

    def blocks(self) -> int:
        return 2 * len(self.writing)


def test_one_at_a_time() -> None:
    engine = Paper()
    point = drive(engine, [10, 20], 1, clock=lambda: engine.now)
    assert point == Point(2 / 34, [10.0, 20.0], [12.0, 22.0], 2)


def test_several_wait_for_each_other() -> None:
    engine = Paper()
    point = drive(engine, [10, 20, 10], 2, clock=lambda: engine.now)
    assert engine.most == 2
    assert point.first == [10.0, 30.0, 10.0]
    assert point.latency == [32.0, 32.0, 12.0]
    assert point.blocks == 4
    assert point.requests == 3 / 44


def test_loads_take_turns_and_say_where_pruning_pays() -> None:
    engine = Paper()
    loads = {"all": lambda n: [30] * n, "few": lambda n: [3] * n, "same": lambda n: [30] * n}
    points = measure(engine, loads, (1, 4), 2, clock=lambda: engine.now)
    lines = {(row.load, row.concurrency): row for row in rows(points, "all")}
    assert lines["all", 1].pays == "-"
    assert lines["few", 1].gain == pytest.approx(32 / 5)
    assert lines["few", 4].pays == "yes"
    assert lines["same", 4].pays == "no difference"
    assert all(len(rounds) == 2 for rounds in points.values())
    assert serving_table(list(lines.values())).count("\n") == 7


def test_the_spread_over_rounds_is_reported() -> None:
    rounds = {"all": [1.0, 2.0, 1.0], "few": [3.0, 2.0, 4.0]}
    points = {(n, 8): [Point(rate, [0.1], [0.2], 1) for rate in of] for n, of in rounds.items()}
    (every, few) = rows(points, "all")
    assert (few.least, few.gain, few.most) == (1.0, 3.0, 4.0)
    assert "| 3.00x (1.00 to 4.00) | yes |" in serving_table([every, few])
    assert "| 1.00x | - |" in serving_table([every, few])


def test_a_verdict_needs_more_than_noise() -> None:
    assert [verdict(gain) for gain in (0.9, 0.97, 1.04, 1.05, 3.0)] == [
        "no",
        "no difference",
        "no difference",
        "yes",
        "yes",
    ]


def test_quantiles_are_values_that_were_seen() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.95)] == [1.0, 2.0, 3.0]
