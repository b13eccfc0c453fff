"""Intervals that respect clusters: questions about one image are not independent observations, nor
are those that one training seed answered. One seed: a bootstrap over images. Several: seed and
image variance added, and Student's t."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import t as student

Floats = NDArray[np.float64]
CHUNK = 2_000_000  # resampled clusters held in memory at once


class Interval(NamedTuple):
    """A mean and its interval; both bounds are nan when one cluster leaves nothing to compare."""

    mean: float
    low: float
    high: float


class PairedInterval(NamedTuple):
    """Mean of a - b, its interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def image_key(uid: str) -> str:
    """The cluster of a sample: its uid without the question, `scenes/test/12/3` ->
    `scenes/test/12`."""
    return uid.rpartition("/")[0] or uid


def interval(
    values: ArrayLike,
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a cluster-bootstrap percentile interval, or with that of `over_seeds`
    for several seeds.

    Whole clusters are drawn with replacement, as many as there are (Field and Welsh 2007,
    "randomized cluster bootstrap"); the mean is over samples, so large clusters weigh more. The
    result depends on the pairs (value, cluster) and the seed only, not on their order. Where all
    values agree the interval has no width: that is what the bootstrap knows, not certainty; for 0/1
    scores see `open_side`.

    Args:
        values: [n] one number per sample, or [S, n] with a row per training seed.
        clusters: [n] the cluster of each sample, see `image_key`.
        level: coverage.
        resamples: bootstrap draws; several seeds need none.
        seed: of the draws.

    Raises:
        ValueError: no values, or lengths that differ.
    """
    arm = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if len(arm) > 1:
        return Interval(*over_seeds([arm], clusters, level)[:3])
    sums, counts = _per_cluster(arm[0], clusters)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"))
    means = _resampled_means(sums, counts, resamples, seed)
    return Interval(mean, *percentiles(means, level))


def open_side(estimate: Interval, clusters: int, z: float = 1.959963984540054) -> Interval:
    """A bootstrap interval without width at 0 or 1, opened to the inside by Wilson's score bound;
    any other unchanged.

    If `clusters` of `clusters` images are all right, the share of right ones is at least n / (n +
    z^2) (Wilson 1927, "Probable inference, the law of succession, and statistical inference", with
    p = 1): 0.84 for 20 images. Questions about one image count once, since here they all agree.

    Args:
        estimate: of scores in {0, 1}.
        clusters: how many were drawn from; 0 if that is unknown, which changes nothing.
        z: normal quantile of the coverage, 95 % as in `interval`.
    """
    has_width = not estimate.low == estimate.high == estimate.mean
    if clusters < 1 or has_width or estimate.mean not in (0.0, 1.0):
        return estimate
    # Wilson's bound at p = 1 is n / (n + z^2); at p = 0 it mirrors.
    away = z**2 / (clusters + z**2)
    low, high = (1 - away, 1.0) if estimate.mean else (0.0, away)
    return Interval(estimate.mean, low, high)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[str],
    *,
    same_seeds: bool = True,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> PairedInterval:
    """Mean of a - b over the same samples in the same order, with a 95 % interval.

    `a`, `b`: [n], or [S, n] with a row per training seed. One row each: a cluster bootstrap, and
    the p-value inverts the interval: twice the smaller share of draws on either side of 0 (each
    count plus one, so it is never 0; its floor is 2 / (resamples + 1)). It is below 1 - level
    exactly where the interval excludes 0, up to that correction. Several rows of either:
    `over_seeds`. With `same_seeds` rows of equal number are one seed each and are subtracted;
    otherwise seeds of a and b have nothing to do with each other. Raises as `interval` does.
    """
    first, second = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    # Broadcasting of one row against several is meant, of samples never.
    if first.shape[1] != second.shape[1] or (same_seeds and 1 < len(first) != len(second) > 1):
        raise ValueError(
            f"paired values of shapes {first.shape} and "
            f"{second.shape}: they must be the same samples."
        )
    if max(len(first), len(second)) > 1:
        together = same_seeds or min(len(first), len(second)) == 1
        return over_seeds([first - second] if together else [first, second], clusters, level)
    sums, counts = _per_cluster((first - second)[0], clusters)
    difference = float(sums.sum() / counts.sum())
    if len(counts) < 2:
        return PairedInterval(difference, float("nan"), float("nan"), float("nan"))
    means = _resampled_means(sums, counts, resamples, seed)
    # Draws at 0 count on both sides.
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return PairedInterval(difference, *percentiles(means, level), p_value)


def over_seeds(
    arms: Sequence[Floats], clusters: Sequence[str], level: float = 0.95
) -> PairedInterval:
    """Mean of an arm, or of the first minus the second, with an interval that speaks of training
    again.

    Seeds and images are crossed random effects: the variance of the mean is that of images
    (linearized for clusters of unequal sizes), plus for each arm that of its seeds' means over S,
    less what of it is the noise of questions and already counted with the images (never below 0).
    Searle, Casella and McCulloch 1992, "Variance components", chapter 4. The quantile is the mean
    of Student's t of these parts' degrees of freedom, weighted by their variances (Cochran 1964,
    "Approximate significance levels of the Behrens-Fisher test"): simulated coverage is 93.5 to 97
    % for 3 and 5 seeds whatever their spread, where Satterthwaite's degrees of freedom fall to 92
    %. Bounds may lie beyond the range of scores: nothing is cut. An arm of one row has no seed
    variance, and says nothing about training again.

    Args:
        arms: one or two of [S, n]; seeds of two arms are independent (subtract rows before, if they
            are the same).
        clusters: [n] the cluster of each sample.
        level: coverage.
    """
    # [C] the same for every row of every arm
    _, counts = _per_cluster(arms[0][0], clusters)
    sums = []
    for arm in arms:
        sums.append(np.stack([_per_cluster(row, clusters)[0] for row in arm]))
    return crossed(sums, counts, level)


def crossed(sums: Sequence[Floats], counts: Floats, level: float = 0.95) -> PairedInterval:
    """`over_seeds` of sums [S C] per seed and cluster, for each arm, and the clusters' sizes
    [C]."""
    # [C] mean over seeds, of one arm or of the difference.
    pooled = sums[0].mean(0) - (sums[1].mean(0) if len(sums) > 1 else 0.0)
    total, clusters = counts.sum(), len(counts)
    mean = float(pooled.sum() / total)
    if clusters < 2:
        return PairedInterval(mean, float("nan"), float("nan"), float("nan"))
    # from a sum of squares over clusters to a variance of the mean
    per_cluster = clusters / (clusters - 1) / total**2
    parts = [(per_cluster * float(np.square(pooled - mean * counts).sum()), clusters - 1)]
    # Spread of the seeds' means, less what residual noise of images makes of it (ANOVA).
    for arm in (arm for arm in sums if len(arm) > 1):
        means, free = arm.sum(1) / total, len(arm) - 1
        left = arm - counts * means[:, None]
        noise = per_cluster * float(np.square(left - left.mean(0)).sum()) / (free * len(arm))
        parts.append((max(float(means.var(ddof=1)) / len(arm) - noise, 0.0), free))
    variance = sum(part for part, _ in parts)
    if variance <= 1e-30:  # all seeds and all images agree
        return PairedInterval(mean, mean, mean, 1.0 if mean == 0 else 0.0)

    def quantile(p: float) -> float:
        spread = [(part, freedom) for part, freedom in parts if part]
        return sum(part * float(student.isf(p / 2, freedom)) for part, freedom in spread) / variance

    # Smaller p-values count as 0: with few seeds their quantiles leave the range of a float.
    error, least = variance**0.5, 1e-100
    # Half the interval; the p-value is the level at which the interval would end at 0.
    half, away = quantile(1 - level) * error, abs(mean) / error
    p_value = 0.0
    if away < quantile(least):
        p_value = cast(float, brentq(lambda p: quantile(p) - away, least, 1.0))
    return PairedInterval(mean, mean - half, mean + half, p_value)


def identical(difference: float, low: float, high: float) -> bool:
    """Whether a and b of a paired interval agree on every cluster: no draw differs from 0, which is
    no certainty."""
    return difference == low == high == 0


def _per_cluster(values: ArrayLike, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """[C] sums and [C] counts, clusters in sorted order."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or len(x) != len(clusters):
        raise ValueError(
            f"{x.shape} values for {len(clusters)} cluster "
            "keys: give one key per value, at least one."
        )
    _, index = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    # floating-point sums would otherwise depend on the samples' order
    order = np.lexsort((x, index))
    sums = np.bincount(index[order], weights=x[order])
    return sums.astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled_means(sums: Floats, counts: Floats, resamples: int, seed: int) -> Floats:
    """[resamples] means of as many clusters as there are, drawn with replacement from their `sums`
    [C]."""
    draws = _draws(len(counts), resamples, np.random.default_rng(seed))
    return np.concatenate([sums[i].sum(1) / counts[i].sum(1) for i in draws])


def _draws(
    clusters: int, resamples: int, rng: np.random.Generator, width: int = 1
) -> Iterator[NDArray[np.int64]]:
    """Indices of resampled clusters, in chunks small enough for `width` numbers of each."""
    rows = max(1, CHUNK // (clusters * width))
    for start in range(0, resamples, rows):
        yield rng.integers(clusters, size=(min(rows, resamples - start), clusters))


def resampled_sums(sums: Floats, resamples: int, seed: int) -> Floats:
    """[resamples F] sums over as many clusters as there are, drawn with replacement from the rows
    of `sums` [C F]."""
    draws = _draws(len(sums), resamples, np.random.default_rng(seed), sums.shape[1])
    return np.concatenate([sums[i].sum(1) for i in draws])


def percentiles(means: Floats, level: float) -> tuple[float, float]:
    """Bounds of the interval that holds the share `level` of the draws."""
    tail = (1 - level) / 2
    known = means[~np.isnan(means)]  # a draw may lack a rare group altogether
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
