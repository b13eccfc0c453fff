"""Schedules of drops between layers that have a given mean."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from tprl.errors import UserError


def solve(
    name: str,
    ratio: float,
    starts: Sequence[int],
    layers: int,
    keep: Callable[[float], Sequence[float]],
    high: float,
) -> float:
    """The x in (0, high] at which the mean over layers of the fraction of visual tokens is `ratio`.

    Args:
        name: of the method, for the sentence.
        ratio: the mean, in (0, 1].
        starts: the first layer after each drop, ascending; all tokens are there before the first
            one.
        layers: of the language model.
        keep: the fraction that lives from each of `starts` on; 0 at x = 0, continuous, and its mean
            grows with x.
        high: where the mean is 1.

    Raises:
        UserError: the layers before the first drop alone have a larger mean.
    """
    # Layers that run on each fraction: all tokens at first, then after each drop.
    spans = [stop - start for start, stop in pairwise([0, *starts, layers])]

    def mean(x: float) -> float:
        fractions = [1.0, *keep(x)]
        weighted = [span * alive for span, alive in zip(spans, fractions, strict=True)]
        return sum(weighted) / layers

    if ratio <= spans[0] / layers:
        raise UserError(
            f"{name} runs {spans[0]} of {layers} layers on all tokens, so their mean over "
            f"layers stays above {spans[0] / layers:.3g}: keep_ratio={ratio:.3g} is infeasible."
        )
    # Bisection: the mean grows with x, and 60 halvings exhaust double precision.
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < ratio else (low, middle)
    return high


def point(path: Sequence[Sequence[float]], x: float) -> list[float]:
    """Fractions on a path through lists of them: scaled down below the first one, log-linear
    between neighbors, which stand at x = 1, 2, ... Their mean grows along it: each piece is a sum
    of exponentials, so convex, and grows at its start."""
    if x < 1:
        return [x * value for value in path[0]]
    # Between neighbors a and b: a^(1 - s) b^s, with s the way from one to the other.
    low = min(int(x), len(path) - 1) - 1
    return [
        value ** (low + 2 - x) * other ** (x - low - 1)
        for value, other in zip(path[low], path[low + 1], strict=True)
    ]
