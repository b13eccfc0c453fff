"""A promise of quality: which of several settings keep a share of the unpruned model's score, and
with which confidence.

A setting keeps the promise where the expected score of a question, pruned, is at least
`retention` times the expected score with all tokens. Each setting is tested on calibration
questions against "the promise is broken", from the one with most tokens to the one with fewest,
until a test fails: then the probability that a setting is chosen which breaks the promise is at
most 1 - confidence, whatever the scores are distributed like and however few questions there are
(Learn then Test with fixed-sequence testing, Angelopoulos et al. 2021, arXiv 2110.01052).

Questions about one image are no independent draws, so images are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import logsumexp
from scipy.stats import binom

from tprl.errors import UserError

# Constant bets whose wealth is averaged, as shares of the largest one, and their weights: few
# images take the largest ones, many images whose scores vary the smallest.
BETS = np.array([1, 0.8, 0.5, 0.25, 0.12, 0.05])
WEIGHTS = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
MOST = 10_000_000  # images beyond which nobody is told how many are needed


class Trials(NamedTuple):
    """Of N calibration questions at K settings."""

    images: Int[ndarray, " N"]  # number of the image of each
    full: Float[ndarray, " N"]  # score in [0, 1] with all tokens
    pruned: Float[ndarray, "N K"]
    agreement: bool = False  # scores are 1 where the answer is that with all tokens, else 0


def check_share(name: str, value: object, below: bool = False) -> float:
    """A share in (0, 1], or in (0, 1) with `below`.

    Raises:
        UserError: it is none.
    """
    try:
        # True is 1.0 to float(), and was surely meant otherwise; words cannot be compared later.
        unlike = isinstance(value, bool | str)
        share = math.nan if unlike else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # Not a number fails both comparisons below and gets the same sentence.
        share = math.nan
    if not 0 < share <= 1 or (below and share == 1):
        end, example = (")", 0.9) if below else ("]", 0.98)
        raise UserError(f"{name} must be a number in (0, 1{end}, got {value}; use e.g. {example}.")
    return share


def margins(trials: Trials, retention: float) -> Float[ndarray, "G K"]:
    """By image: pruned - retention * full, summed over its questions and divided by the largest
    number of questions about an image.

    Over images its mean is at least 0 where the promise holds, and no value is below -retention.
    Images with fewer questions weigh less, as they do in a mean over questions.
    """
    # Division by the largest group bounds every margin below by -retention, which the bets rely on.
    _, group = np.unique(trials.images, return_inverse=True)
    sums = np.zeros((int(group.max()) + 1, trials.pruned.shape[1]))
    np.add.at(sums, group, trials.pruned - retention * trials.full[:, None])
    return sums / np.bincount(group).max()


def log_wealth(margin: Float[ndarray, "G K"], retention: float) -> Float[ndarray, "J K"]:
    """Logarithm of what one unit becomes at each of J constant bets that the mean margin is
    positive: prod_g (1 + bet * margin_g)."""
    # The largest bet loses everything at the lowest margin, and never more.
    bets = BETS / retention
    with np.errstate(divide="ignore"):
        steps = np.log(np.maximum(1 + bets[:, None, None] * margin, 0))
    return steps.sum(1)


def p_values(trials: Trials, retention: float) -> Float[ndarray, " K"]:
    """P-value of "the promise is broken" for every setting.

    Agreement of one question per image is a coin, so its test is the exact binomial one. Otherwise
    a gambler bets against the hypothesis: if it holds, the mean wealth of constant bets has an
    expectation of at most 1, and its inverse is a p-value by Markov's inequality (testing by
    betting, Waudby-Smith and Ramdas 2024). It adapts to the variance: where pruning changes few
    answers, few images are enough.
    """
    # P(at least this many agree) if the true rate is exactly `retention`.
    if _is_coin(trials):
        return binom.sf(trials.pruned.sum(0) - 1, len(trials.full), retention)
    # A p-value cannot exceed 1: a gambler who lost proves nothing.
    wealth = logsumexp(
        log_wealth(margins(trials, retention), retention), b=WEIGHTS[:, None], axis=0
    )
    return np.exp(-np.maximum(wealth, 0))


def _is_coin(trials: Trials) -> bool:
    return trials.agreement and len(np.unique(trials.images)) == len(trials.images)


def last_accepted(p: Float[ndarray, " K"], confidence: float) -> int | None:
    """Number of the last setting before the first whose p-value is above 1 - confidence; settings
    go from most tokens to fewest. None: the first one fails."""
    # Comparing with a rounded 1 - confidence would refuse 0.1 at a confidence of 0.9.
    failed = np.flatnonzero(p > (1 - confidence) * (1 + 1e-9))
    count = int(failed[0]) if len(failed) else len(p)
    return count - 1 if count else None


def check_enough(trials: Trials, retention: float, confidence: float) -> None:
    """Refuse calibration questions with which no setting could pass, even one that changes no
    answer.

    Raises:
        UserError: with the number of images that such a setting needs.
    """
    # Even a setting that changes no answer must be able to pass: with fewer images no test can
    # succeed.
    unchanged = trials._replace(pruned=trials.full[:, None])
    if p_values(unchanged, retention)[0] <= (1 - confidence) * (1 + 1e-9):
        return
    # The sentence names a number, so that the next calibration is large enough.
    count = len(np.unique(trials.images))
    needed = _needed(unchanged, retention, confidence)
    what = "no number of images is enough" if needed is None else f"about {needed} are needed"
    raise UserError(
        f"retention={retention:g} with confidence={confidence:g} cannot be promised from "
        f"{count} calibration images: {what} where pruning changes no answer; "
        "calibrate on more questions with calibrate.limit, or ask for less."
    )


def _needed(unchanged: Trials, retention: float, confidence: float) -> int | None:
    """Images like these that let a setting pass which changes no answer."""
    # All n images agree with probability retention^n at most, which must fall to 1 - confidence.
    if _is_coin(unchanged):
        return math.ceil(math.log(1 - confidence) / math.log(retention)) if retention < 1 else None
    # [J] growth of the wealth per image at each bet.
    count = len(np.unique(unchanged.images))
    growth = log_wealth(margins(unchanged, retention), retention)[:, 0] / count

    def enough(images: int) -> bool:
        return bool(logsumexp(growth * images, b=WEIGHTS) >= -math.log(1 - confidence))

    # The wealth grows with the images, so the smallest sufficient number is bisected.
    low, high = count, MOST
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Promise(NamedTuple):
    """What keeps a promise: one setting of several, or None for all tokens."""

    setting: int | None
    p_values: Float[ndarray, " K"]


def smallest(trials: Trials, retention: float, confidence: float) -> Promise:
    """The setting with fewest tokens that keeps `retention` of the unpruned score with
    `confidence`; settings go from most tokens to fewest. All tokens always keep it.

    Raises:
        UserError: numbers outside their range, or too few images.
    """
    check_share("retention", retention)
    check_share("confidence", confidence, below=True)
    # At retention=1 unchanged answers prove nothing, and all tokens are the valid choice.
    if retention < 1:
        check_enough(trials, retention, confidence)
    p = p_values(trials, retention)
    return Promise(last_accepted(p, confidence), p)


def retained(full: Sequence[float], pruned: Sequence[float]) -> float:
    """The share of the unpruned score that is left; nan where there was none."""
    return float(np.sum(pruned) / np.sum(full)) if np.sum(full) else math.nan
