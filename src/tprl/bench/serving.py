"""Does pruning pay in an engine? Requests a second, time to the first token, latencies, and blocks
of the KV cache, with all visual tokens and with fewer, in turns in one engine."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any, NamedTuple, Protocol, runtime_checkable

PAYS = 1.05  # a gain below it is within what a busy machine does


class Step(NamedTuple):
    """What one step of an engine says of a request."""

    request: str
    tokens: int  # written so far
    finished: bool


@runtime_checkable
class Engine(Protocol):
    """As much of an engine as is measured."""

    def add(self, request: str, prompt: Any) -> None:
        """Queue a request."""

    def step(self) -> Iterable[Step]:
        """Compute once, for all requests together."""
        ...

    def blocks(self) -> int:
        """Blocks of the KV cache in use."""
        ...


class Point(NamedTuple):
    """One measurement: a load of one kind at one concurrency."""

    requests: float  # a second
    first: list[float]  # seconds from queueing to the first token, per request
    latency: list[float]  # seconds from queueing to the last token, per request
    blocks: int  # in use at most


def drive(
    engine: Engine,
    prompts: Sequence[Any],
    concurrency: int,
    name: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Point:
    """Answer all prompts, so many at a time; the next one is queued when one is finished.

    Args:
        engine: idle.
        prompts: as the engine takes them.
        concurrency: requests in the engine at a time.
        name: begins the requests' names, which must not come twice in an engine's life.
        clock: seconds.
    """
    queued: dict[str, float] = {}
    first: dict[str, float] = {}
    latency: dict[str, float] = {}
    waiting, blocks, begin = list(enumerate(prompts)), 0, clock()
    while waiting or len(latency) < len(queued):
        # Filled up before each step: the engine is never short of requests.
        while waiting and len(queued) - len(latency) < concurrency:
            number, prompt = waiting.pop(0)
            request = f"{name}-{number}"
            queued[request] = clock()
            engine.add(request, prompt)
        steps = list(engine.step())
        # The clock is read after a step: what it wrote is there only then.
        now, blocks = clock(), max(blocks, engine.blocks())
        for request, tokens, finished in steps:
            if tokens and request not in first:
                first[request] = now - queued[request]
            if finished:
                latency[request] = now - queued[request]
    rate = len(prompts) / (clock() - begin)
    return Point(rate, list(first.values()), list(latency.values()), blocks)


def measure(
    engine: Engine,
    loads: Mapping[str, Callable[[int], Sequence[Any]]],
    concurrencies: Sequence[int],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[tuple[str, int], list[Point]]:
    """All loads in turns at every concurrency: what slows the machine for a while slows all of
    them.

    Args:
        engine: see `Engine`.
        loads: makes fresh prompts for a concurrency, by name.
        concurrencies: requests at a time.
        rounds: measurements of each point; the order turns round from one to the next.
        clock: seconds.
    """
    points: dict[tuple[str, int], list[Point]] = {}
    for turn in range(rounds):
        for concurrency in concurrencies:
            names = list(loads) if turn % 2 == 0 else list(loads)[::-1]
            for name in names:
                prompts = loads[name](concurrency)
                point = drive(engine, prompts, concurrency, f"{turn}-{concurrency}-{name}", clock)
                points.setdefault((name, concurrency), []).append(point)
    return points


class ServingRow(NamedTuple):
    """A line of the table."""

    load: str
    concurrency: int
    requests: float
    first: float
    p50: float
    p95: float
    blocks: int
    gain: float  # requests a second against all tokens, median over rounds
    least: float  # that of the worst round
    most: float  # that of the best round
    pays: str


def rows(points: Mapping[tuple[str, int], Sequence[Point]], full: str) -> list[ServingRow]:
    """One line per load and concurrency; `full` names the load with all visual tokens."""
    lines = []
    for (name, concurrency), rounds in points.items():
        # Rounds are compared with themselves; latencies of all rounds go together.
        pairs = zip(rounds, points[full, concurrency], strict=True)
        # Median over rounds: one disturbed round moves it little.
        gains = [point.requests / base.requests for point, base in pairs]
        latency = list(chain.from_iterable(point.latency for point in rounds))
        lines.append(
            ServingRow(
                name,
                concurrency,
                median(point.requests for point in rounds),
                median(chain.from_iterable(point.first for point in rounds)),
                quantile(latency, 0.5),
                quantile(latency, 0.95),
                max(point.blocks for point in rounds),
                median(gains),
                min(gains),
                max(gains),
                "-" if name == full else verdict(median(gains)),
            )
        )
    return lines


def verdict(gain: float) -> str:
    """Whether pruning pays at a point."""
    return "yes" if gain >= PAYS else "no" if gain <= 1 / PAYS else "no difference"


def _gain(row: ServingRow) -> str:
    """Median over rounds, and between which values they were where they differ."""
    return f"{row.gain:.2f}x" + (
        "" if row.least == row.most else f" ({row.least:.2f} to {row.most:.2f})"
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def serving_table(lines: Sequence[ServingRow]) -> str:
    """Markdown."""
    head = (
        "| load | at a time | requests/s | first token, s | "
        "p50, s | p95, s | KV blocks | against all | pays |"
    )
    rule = "|" + " --- |" * 9
    body = [
        (
            f"| {r.load} | {r.concurrency} | {r.requests:.2f} | {r.first:.2f} | "
            f"{r.p50:.2f} | {r.p95:.2f} | {r.blocks} | {_gain(r)} | {r.pays} |"
        )
        for r in sorted(lines, key=lambda row: row.concurrency)
    ]
    return "\n".join([head, rule, *body])
