"""The sentence at the top of the report."""

import pytest

from tprl.evaluation.analysis import headline
from tprl.evaluation.report import Paired
from tprl.evaluation.results import Row


def row(pruner: str, ratio: float | None, kept: float, value: float, flops: float) -> Row:
    return Row("m", "d", pruner, 0, ratio, kept, "accuracy", value, value - 0.01, value + 0.01, 1e9, flops)


ROWS = [
    row("keep_all", 1.0, 144.0, 0.98, 1.0),
    row("tprl", 1 / 3, 48.0, 0.97, 0.62),
    row("tprl", 1 / 18, 8.0, 0.9544, 0.4849),
    row("tprl_adaptive", 1 / 18, 8.1, 0.96, 0.49),
]


def paired(other: str, difference: float, low: float, high: float, ratio: float = 1 / 18) -> Paired:
    return Paired("tprl", other, ratio, difference, low, high, 0.01)


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (paired("divprune", 0.043, 0.035, 0.051), "4.3 points below (95 % interval of the difference +3.5 to +5.1)."),
        (
            paired("divprune", 0.01, -0.01, 0.03),
            "1.0 points below (95 % interval of the difference -1.0 to +3.0, which includes zero).",
        ),
        (paired("divprune", -0.02, -0.03, -0.01), "2.0 points above (95 % interval of the difference -3.0 to -1.0)."),
    ],
)
def test_the_smallest_ratio_against_the_best_other_pruner(best: Paired, words: str) -> None:
    """Our own variants are no rivals, and neither is a difference at another ratio."""
    others = [paired("random", 0.3, 0.2, 0.4), paired("tprl_adaptive", -0.2, -0.3, -0.1), best]
    others.append(paired("tome", -0.5, -0.6, -0.4, ratio=1 / 3))
    assert headline(ROWS, others, "tprl") == (
        "With 8 of 144 visual tokens (5.56 %) and 0.48 of the FLOPs, tprl scores 95.4 %; all tokens score 98.0 %, "
        f"and the best other pruner (divprune) is {words}"
    )


def test_without_a_reference_or_a_ratio_it_claims_nothing() -> None:
    assert headline(ROWS[1:], [], "tprl") == "tprl on d with m."
    assert headline([ROWS[0], row("own", None, 20.0, 0.9, 0.5)], [], "own") == "own on d with m."
