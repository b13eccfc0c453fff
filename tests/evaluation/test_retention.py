"""Promises of quality: the bound holds in simulations where settings lie on both sides of it."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy import ndarray

from tprl.errors import UserError
from tprl.evaluation.retention import (
    Trials,
    check_share,
    last_accepted,
    log_wealth,
    margins,
    p_values,
    smallest,
)

DRAWS = 300
# What each setting loses of the answers that were right, from most tokens to fewest: at a retention
# of 0.95 the fourth breaks the promise by a hair.
LOST = np.array([0.0, 0.01, 0.03, 0.052, 0.15])


def questions(draw: np.random.Generator, images: int = 250, of_image: int = 2) -> Trials:
    """Right in 9 of 10 cases with all tokens. Whole images lose their answers together, which is
    the worst for a method that takes questions for independent; where an answer was wrong, pruning
    makes it right in as many cases as the setting would have lost a tenth of it."""
    right = draw.random((images, of_image)) < 0.9
    lost = draw.random((images, 1, 1)) < LOST
    pruned = right[:, :, None] & ~lost
    number = np.repeat(np.arange(images), of_image)
    return Trials(number, right.ravel().astype(float), pruned.reshape(-1, len(LOST)).astype(float))


def agreements(draw: np.random.Generator) -> Trials:
    same = draw.random((300, len(LOST))) >= LOST
    return Trials(np.arange(300), np.ones(300), same.astype(float), agreement=True)


def naive(trials: Trials, retention: float) -> int:
    """The last setting before the first that loses more than it may on the questions at hand."""
    shares = trials.pruned.sum(0) / trials.full.sum()
    return int(np.flatnonzero(shares < retention).min(initial=len(LOST))) - 1


@pytest.mark.parametrize("world", [questions, agreements])
def test_promises_are_kept_with_the_stated_confidence(
    world: Callable[[np.random.Generator], Trials],
) -> None:
    draw = np.random.default_rng(0)
    broken = {"promised": 0, "naive": 0}
    kept = []
    for _ in range(DRAWS):
        trials = world(draw)
        setting = smallest(trials, 0.95, 0.9).setting
        kept.append(-1 if setting is None else setting)
        broken["promised"] += kept[-1] >= 3
        broken["naive"] += naive(trials, 0.95) >= 3
    # 10 % may be broken; choosing by what was seen breaks far more in the same world.
    assert broken["promised"] <= 0.1 * DRAWS
    assert broken["naive"] > 0.3 * DRAWS
    # It is no empty promise: the setting that loses 1 % is good enough most of the time.
    assert np.mean(np.array(kept) >= 1) > 0.75


def test_a_p_value_is_one_where_the_hypothesis_holds() -> None:
    """P(p <= a) <= a on the edge: the share that is kept is exactly the promised one."""
    draw = np.random.default_rng(1)
    p = []
    for _ in range(400):
        full = np.ones(60)
        pruned = (draw.random((60, 1)) < 0.9).astype(float)
        p.append(p_values(Trials(np.arange(60), full, pruned), 0.9)[0])
    for level in (0.05, 0.1, 0.3):
        assert np.mean(np.array(p) <= level) <= level


def test_margins_count_questions_and_are_bounded() -> None:
    trials = Trials(np.array([0, 0, 7]), np.array([1.0, 0.0, 1.0]), np.array([[0.0], [1.0], [1.0]]))
    assert margins(trials, 0.8).ravel() == pytest.approx([(0 - 0.8 + 1) / 2, 0.2 / 2])
    worst = Trials(np.zeros(2, int), np.ones(2), np.zeros((2, 1)))
    assert margins(worst, 0.8).ravel() == pytest.approx([-0.8])
    assert log_wealth(margins(worst, 0.8), 0.8)[0, 0] == -np.inf


def test_agreement_of_single_questions_is_the_exact_binomial_test() -> None:
    """45 of 45 at 0.95: 0.95 ** 45 = 0.0994; 44 are one too few."""
    for count, setting in ((45, 0), (44, None)):
        trials = Trials(np.arange(count), np.ones(count), np.ones((count, 1)), agreement=True)
        p = p_values(trials, 0.95)
        assert p[0] == pytest.approx(0.95**count)
        assert last_accepted(p, 0.9) == setting


@pytest.mark.parametrize(
    ("p", "setting"), [([0.01, 0.1, 0.2, 0.01], 1), ([0.2, 0.01], None), ([0.0, 0.0], 1)]
)
def test_the_sequence_stops_at_the_first_failure(p: list[float], setting: int | None) -> None:
    assert last_accepted(np.array(p), 0.9) == setting


def ones(count: int) -> tuple[ndarray, ndarray, ndarray]:
    return np.arange(count), np.ones(count), np.ones((count, 1))


def test_bad_input_is_refused() -> None:
    trials = Trials(*ones(500))
    for value in (0.0, 1.2, float("nan"), -0.5):
        with pytest.raises(UserError, match=r"retention must be a number in \(0, 1\], got"):
            smallest(trials, value, 0.9)
    for value in (True, "0.9"):
        with pytest.raises(
            UserError, match=rf"retention must be a number in \(0, 1\], got {value}"
        ):
            check_share("retention", value)
    for value in (0.0, 1.0):
        with pytest.raises(UserError, match=r"confidence must be a number in \(0, 1\), got"):
            smallest(trials, 0.9, value)
    with pytest.raises(
        UserError,
        match=r"retention=0\.95 with confidence=0\.9 cannot be promised from 44 calibration "
        r"images: about 45 are needed where pruning changes no answer; calibrate on more",
    ):
        smallest(Trials(*ones(44), agreement=True), 0.95, 0.9)
    with pytest.raises(UserError, match="no number of images is enough"):
        smallest(Trials(np.arange(9), np.zeros(9), np.zeros((9, 1))), 0.9, 0.9)


def test_as_many_images_as_the_sentence_says_are_enough() -> None:
    with pytest.raises(UserError, match="about") as refusal:
        smallest(Trials(*ones(20)), 0.95, 0.9)
    needed = int(str(refusal.value).partition("about ")[2].split()[0])
    assert smallest(Trials(*ones(needed)), 0.95, 0.9).setting == 0
    with pytest.raises(UserError, match="about"):
        smallest(Trials(*ones(needed - 1)), 0.95, 0.9)


def test_all_tokens_keep_everything() -> None:
    """Nothing else can promise not to lose any: it needs no questions."""
    assert smallest(Trials(*ones(3)), 1.0, 0.9).setting is None
