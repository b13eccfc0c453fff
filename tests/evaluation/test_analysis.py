"""The sentence at the top of the report."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tprl.build import load_component
from tprl.commands.evaluate import _pictured
from tprl.data.scenes import Scenes
from tprl.evaluation.analysis import (
    Paired,
    by_arm,
    difference,
    evaluation_headline,
    say,
    with_open_sides,
)
from tprl.evaluation.analysis import paired as compared
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.pictures import _together, gallery, guided
from tprl.evaluation.results import Row, SampleRow
from tprl.pruners.learned import load_pruner
from tprl.scoring.scorer import Scorer
from tprl.types import Encoded, Sample


def row(pruner: str, ratio: float | None, kept: float, value: float, flops: float) -> Row:
    return Row(
        "m", "d", pruner, 0, ratio, kept, "accuracy", value, value - 0.01, value + 0.01, 1e9, flops
    )


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
        (
            paired("divprune", 0.043, 0.035, 0.051),
            "4.3 points below (95 % interval of the difference +3.5 to +5.1).",
        ),
        (
            paired("divprune", 0.01, -0.01, 0.03),
            "1.0 points below (95 % interval of the difference -1.0 to +3.0, which includes zero).",
        ),
        (paired("divprune", 0.0, 0.0, 0.0), "level."),
        (
            paired("divprune", 0.0004, -0.01, 0.01),
            "level (95 % interval of the difference -1.0 to +1.0, which includes zero).",
        ),
        (
            paired("tprl_two", -0.02, -0.03, -0.01),
            "2.0 points above (95 % interval of the difference -3.0 to -1.0).",
        ),
        (
            paired("divprune", -0.02, -0.03, -0.01),
            "2.0 points above (95 % interval of the difference -3.0 to -1.0).",
        ),
    ],
)
def test_the_smallest_ratio_against_the_best_other_pruner(best: Paired, words: str) -> None:
    """Our own variants are no rivals, and neither is a difference at another ratio."""
    others = [paired("random", 0.3, 0.2, 0.4), paired("tprl_adaptive", -0.2, -0.3, -0.1), best]
    others.append(paired("tome", -0.5, -0.6, -0.4, ratio=1 / 3))
    assert evaluation_headline(ROWS, others, "tprl") == (
        "With 8 of 144 visual tokens (5.56 %) and 0.48 of the FLOPs, tprl scores 95.4 %; "
        f"all tokens score 98.0 %, and the best other pruner ({best.other}) is {words}"
    )


def test_the_headline_names_the_cost_of_the_best_rival() -> None:
    rows = [*ROWS, row("word_attention", 1 / 18, 8.0, 0.96, 0.664)]
    sentence = evaluation_headline(rows, [paired("word_attention", -0.02, -0.03, -0.01)], "tprl")
    assert "best other pruner (word_attention, 0.66 of the FLOPs) is 2.0 points above" in sentence


def test_without_a_reference_or_a_ratio_there_is_no_claim() -> None:
    assert evaluation_headline(ROWS[1:], [], "tprl") == "tprl on d with m."
    assert (
        evaluation_headline([ROWS[0], row("own", None, 20.0, 0.9, 0.5)], [], "own")
        == "own on d with m."
    )


def test_a_rival_may_begin_with_the_same_letters() -> None:
    names = ("keep_all", "prumerge", "prumerge_adaptive", "prumerge_plus", "divprune", "divprune")
    entries = [
        Entry(name, load_component("pruner", "divprune"), (0.5,), i // 5)
        for i, name in enumerate(names)
    ]
    rows = [SampleRow("a/0", "", e.name, e.seed, 0.5, None, 1.0, 8) for e in entries]
    assert list(_pictured(entries, entries[1], 0.5, rows)) == [
        "prumerge",
        "divprune",
        "prumerge_plus",
    ]


def test_pictures_are_of_questions_that_were_answered() -> None:
    lvlm, data = load_component("model", "tiny_llava"), Scenes("test")
    pruners = {"random": load_component("pruner", "random")}
    result = gallery(Scorer(lvlm, data), data, pruners, 0.1111, limit=4)
    assert {item.question for item in result} == {data[i].question for i in range(4)}
    assert len(result) == 4


def test_tables_open_the_interval_of_scores_that_all_agree() -> None:
    """16 of 16 images right, three questions each: at least 16 / (16 + 1.96^2) = 80.6 %."""
    samples = [
        SampleRow(f"s/{i}/{j}", "count", "tprl", 0, 0.5, None, 1.0, 8)
        for i in range(16)
        for j in range(3)
    ]
    whole = Row("m", "d", "tprl", 0, 0.5, 8.0, "accuracy", 1.0, 1.0, 1.0, 1.0, 0.5)
    family, none = (
        replace(whole, metric="accuracy/count"),
        replace(whole, value=0.0, ci_low=0.0, ci_high=0.0),
    )
    result = [
        (row.value, row.ci_low, row.ci_high)
        for row in with_open_sides([whole, family, none], samples)
    ]
    assert result[0] == result[1] == (1.0, pytest.approx(0.8064, abs=1e-4), 1.0)
    assert result[2] == (0.0, 0.0, pytest.approx(0.1936, abs=1e-4))
    other = [
        replace(whole, metric="mean_iou"),
        replace(whole, ci_low=0.9),
        replace(whole, pruner="other"),
    ]
    assert with_open_sides(other, samples) == other


class Counting:
    """An LVLM that counts how often it encodes."""

    def __init__(self, lvlm: Any) -> None:
        self.lvlm, self.sizes = lvlm, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lvlm, name)

    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        self.sizes.append(len(samples))
        return self.lvlm.encode(samples, extras)


def test_questions_of_several_images_are_swapped_in_one_batch() -> None:
    lvlm: Any = Counting(load_component("model", "tiny_llava"))
    data = Scenes("test")
    pruner = load_pruner("tprl_tiny_llava")
    result = [
        guided(Scorer(lvlm, data), data, pruner, 0.03, 24, batch_size=size) for size in (1, 24)
    ]
    alone, together = lvlm.sizes[:-2], lvlm.sizes[-2:]
    assert together == [24, 24]
    assert len(alone) > 8
    entry, many = result
    assert entry is not None
    assert many is not None
    assert (entry.questions, entry.images, entry.overlap) == (
        many.questions,
        many.images,
        many.overlap,
    )
    assert (entry.accuracy, entry.shuffled) == (many.accuracy, many.shuffled)
    assert entry.accuracy.mean > entry.shuffled.mean  # the swap does something
    assert [pair.answers for pair in entry.pairs] == [pair.answers for pair in many.pairs]
    assert len(entry.pairs) == 3


def test_a_batch_holds_whole_groups() -> None:
    sizes = [3, 2, 4, 9, 1]
    groups = [[Sample(str(n), (), "?", ("a",))] * n for n in sizes]
    assert _together(groups, 5) == [[0, 1], [2], [3], [4]]
    assert _together(groups, 100) == [[0, 1, 2, 3, 4]]


def scored(pruner: str, seed: int, scores: list[float]) -> list[SampleRow]:
    return [
        SampleRow(f"s/{i}/0", "count", pruner, seed, 0.5, None, score, 8)
        for i, score in enumerate(scores)
    ]


def test_seeds_are_paired_by_their_number_not_by_their_order() -> None:
    """Each seed of ours is .5 better than the same seed of theirs on every second image, whatever
    the order."""
    other_scores = {
        seed: [float((i * (seed + 3)) % 7 < 3) / 2 for i in range(40)] for seed in range(3)
    }
    ours = {
        seed: [score + 0.5 * (i % 2) for i, score in enumerate(scores)]
        for seed, scores in other_scores.items()
    }
    samples = [row for seed in (0, 1, 2) for row in scored("tprl", seed, ours[seed])]
    others = [
        row
        for seed in (2, 0, 1)
        for row in scored("random", seed, other_scores[seed])[:: -1 if seed else 1]
    ]
    (result,) = compared([*samples, *others], "tprl")
    (same,) = compared([*samples, *sorted(others, key=lambda row: (row.seed, row.uid))], "tprl")
    assert result == same
    # t with 39 degrees of freedom; seeds differ in nothing
    half = 0.25 * (40 / 39) ** 0.5 / 40**0.5 * 2.0226908
    assert (result.difference, result.low, result.high) == pytest.approx(
        (0.25, 0.25 - half, 0.25 + half)
    )


def test_other_seeds_are_not_paired() -> None:
    arms = by_arm([*scored("a", 0, [1.0, 0.0] * 9), *scored("a", 1, [1.0] * 18)])["a", 0.5]
    shifted = {seed + 1: scores for seed, scores in arms.items()}
    uids = list(arms[0])
    assert difference(arms, dict(reversed(arms.items())), uids) == (0.0, 0.0, 0.0, 1.0)
    apart = difference(arms, shifted, uids)
    assert apart.difference == 0.0
    assert apart.low < -0.5
    assert apart.high > 0.5


def test_only_questions_that_all_seeds_answered_are_compared() -> None:
    samples = [
        *scored("tprl", 0, [1.0] * 9),
        *scored("tprl", 1, [1.0] * 6),
        *scored("random", 0, [0.0] * 8),
    ]
    (result,) = compared(samples, "tprl")
    assert (result.difference, result.low, result.high) == (1.0, 1.0, 1.0)


def test_tables_show_one_interval_of_an_arm_of_several_seeds() -> None:
    values = {0: [1.0] * 18 + [0.0] * 2, 1: [1.0] * 14 + [0.0] * 6, 2: [1.0] * 20}
    samples = [row for seed, scores in values.items() for row in scored("tprl", seed, scores)]
    rows = [
        Row("m", "d", "tprl", seed, 0.5, 8.0, "accuracy", sum(scores) / 20, 0.8, 0.9, 1.0, 0.5)
        for seed, scores in values.items()
    ]
    result = with_open_sides(rows, samples)
    assert len({(row.ci_low, row.ci_high) for row in result}) == 1
    assert [row.value for row in result] == [0.9, 0.7, 1.0]
    assert result[0].ci_low < 0.6  # seeds differ by .15: t with about two degrees of freedom
    assert result[0].ci_high == 1.0  # cut
    single = [row for row in rows if row.seed == 0]
    assert with_open_sides(single, samples[:20]) == single


def test_a_difference_on_one_image_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    say({}, [Paired("tprl", "random", 0.1111, 0.5, math.nan, math.nan, math.nan)], None)
    assert capsys.readouterr().out.splitlines()[1] == (
        "tprl - random at 11.1 %: +50.0 points (no interval: one image says nothing about others)"
    )
