"""Who gets how many tokens."""

import numpy as np
import pytest

from tprl.evaluation.results import SampleRow
from tprl.report.spread import QUANTILES, spread_section, token_spreads


def sample(
    i: int, pruner: str, ratio: float | None, score: float, kept: int, seed: int = 0
) -> SampleRow:
    return SampleRow(
        f"scenes/test/{i}/x",
        "count" if i % 2 else "attribute",
        pruner,
        seed,
        ratio,
        None,
        score,
        kept,
    )


ROWS = [
    *(sample(i, "tprl", 0.05, float(i % 3 > 0), 8) for i in range(12)),
    *(sample(i, "tprl", 0.2, 1.0, 32) for i in range(12)),
    *(sample(i, "tprl_adaptive", 0.2, 1.0, 10 + i) for i in range(12)),
    *(sample(i, "random", 0.2, 1.0, 32) for i in range(12)),
]


def test_only_adaptive_pruners_by_family_and_difficulty() -> None:
    result = {(item.group, item.pruner, item.keep_ratio): item for item in token_spreads(ROWS)}
    assert {key[0] for key in result} == {"attribute", "count", "easy", "hard"}
    assert {key[1:] for key in result} == {("tprl_adaptive", 0.2)}
    hard = result["hard", "tprl_adaptive", 0.2]
    counts = [10, 13, 16, 19]  # questions 0, 3, 6, 9 are wrong with the fewest tokens
    assert (hard.questions, hard.mean) == (4, 14.5)
    assert hard.quantiles == pytest.approx(np.quantile(counts, QUANTILES))
    assert result["count", "tprl_adaptive", 0.2].mean == 16


def test_difficulty_is_that_of_the_same_seed() -> None:
    rows = [sample(0, "a", 0.1, float(seed), 5, seed) for seed in (0, 1)]
    rows += [sample(0, "a_adaptive", 0.1, 1.0, 20 + seed, seed) for seed in (0, 1)]
    result = {item.group: item.mean for item in token_spreads(rows)}
    assert (result["hard"], result["easy"]) == (20, 21)


def test_without_the_exact_mode_there_is_nothing_to_compare_with() -> None:
    assert token_spreads([row for row in ROWS if row.pruner != "tprl"]) == []
    assert spread_section([], ["tprl"]) is None


def test_the_section_names_every_group_and_its_mean() -> None:
    section = spread_section(token_spreads(ROWS), ["tprl", "tprl_adaptive"])
    assert section is not None
    assert section.heading == "How many tokens each question gets"
    ((text,),) = (figure["drawings"] for figure in section.values["figures"])
    for label in ("attribute (15)", "count (16)", "hard (14)", "mean 20"):
        assert label in text
    assert text.count("<svg") == 1
