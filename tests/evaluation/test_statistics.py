"""Intervals against analytic cases, clustering, invariance and coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from tprl.evaluation.statistics import crossed, image_key, interval, paired_interval


def singles(n: int) -> list[str]:
    return [f"scenes/test/{i}" for i in range(n)]


def test_image_key() -> None:
    assert image_key("scenes/test/12/3") == "scenes/test/12"
    assert image_key("lonely") == "lonely"


def test_matches_the_normal_approximation() -> None:
    """300 of 400 right: the standard error is sqrt(.75 * .25 / 400) = 0.02165."""
    values = np.repeat([1.0, 0.0], [300, 100])
    mean, low, high = interval(values, singles(400))
    assert mean == 0.75
    assert low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.004)


def test_two_clusters_enumerated() -> None:
    """Two clusters 0 and 1 resample to means 0, .5, 1 with probabilities 1/4, 1/2, 1/4."""
    assert interval([0.0, 1.0], ["a", "b"]) == (0.5, 0.0, 1.0)
    assert interval([0.0, 1.0], ["a", "b"], level=0.4) == (0.5, 0.5, 0.5)


def test_mean_is_over_samples_not_clusters() -> None:
    assert interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).mean == 0.75


def test_identical_samples_of_a_cluster_carry_no_information() -> None:
    rng = np.random.default_rng(1)
    single = rng.random(100) < 0.6
    four = np.repeat(single, 4).astype(float)
    clustered = interval(four, [key for key in singles(100) for _ in range(4)])
    assert clustered == pytest.approx(interval(single.astype(float), singles(100)))
    naive = interval(four, singles(400))
    assert clustered.high - clustered.low == pytest.approx(2 * (naive.high - naive.low), rel=0.15)


def test_order_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(200), rng.random(200)
    keys = [f"x/{i}" for i in rng.integers(50, size=200)]
    shuffle = rng.permutation(200)
    moved = [keys[i] for i in shuffle]
    assert interval(a[shuffle], moved) == interval(a, keys)
    assert paired_interval(a[shuffle], b[shuffle], moved) == paired_interval(a, b, keys)
    assert interval(a, keys, seed=1) != interval(a, keys)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(60)
    whole = interval(values, singles(60))
    monkeypatch.setattr("tprl.evaluation.statistics.CHUNK", 1000)
    assert interval(values, singles(60)) == whole


def test_one_cluster_has_no_interval() -> None:
    mean, low, high = interval([1.0, 0.0], ["a", "a"])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(paired_interval([1.0], [0.0], ["a"]).p_value)


def test_pairing_removes_the_shared_noise() -> None:
    rng = np.random.default_rng(4)
    difficulty = rng.normal(size=300)
    a, b = difficulty + 0.1 + rng.normal(size=300) * 0.1, difficulty
    result = paired_interval(a, b, singles(300))
    assert result.difference == pytest.approx(float((a - b).mean()))
    assert 0 < result.low < result.difference < result.high
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(300), rel=0.15)
    alone = interval(a, singles(300))
    assert alone.high - alone.low > 5 * (result.high - result.low)


def test_p_value_is_two_sided() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(150) < 0.6, rng.random(150) < 0.5
    up, down = paired_interval(a, b, singles(150)), paired_interval(b, a, singles(150))
    assert up.p_value == pytest.approx(down.p_value, abs=1e-12)
    assert up.difference == -down.difference
    assert paired_interval(a, a, singles(150)).p_value == 1
    sure = paired_interval(np.ones(150), np.zeros(150), singles(150), resamples=999)
    assert sure.p_value == pytest.approx(2 / 1000)


def test_p_value_approximates_the_z_test() -> None:
    """Differences +1 (60 times), -1 (40), 0 (100): z = 0.1 / (sqrt(.5 - .01) / sqrt(200)) = 2.02, p
    = 0.043."""
    d = np.repeat([1.0, -1.0, 0.0], [60, 40, 100])
    assert paired_interval(
        d, np.zeros(200), singles(200), resamples=20_000
    ).p_value == pytest.approx(0.043, abs=0.012)


def test_coverage_on_clustered_data() -> None:
    """Intervals of 200 simulated experiments (60 images, 1-6 questions each, shared difficulty)
    hold the truth."""
    rng = np.random.default_rng(6)
    hits = naive = 0
    for seed in range(200):
        sizes = rng.integers(1, 7, size=60)
        chance = rng.beta(1.4, 0.6, size=60)  # mean 0.7
        keys = np.repeat(np.arange(60), sizes).astype(str)
        values = (rng.random(sizes.sum()) < np.repeat(chance, sizes)).astype(float)
        _, low, high = interval(values, list(keys), resamples=500, seed=seed)
        hits += low <= 0.7 <= high
        _, low, high = interval(values, singles(len(values)), resamples=500, seed=seed)
        naive += low <= 0.7 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert naive < hits


@pytest.mark.parametrize(("values", "keys"), [([], []), ([1.0], ["a", "b"])])
def test_bad_input_is_refused(values: list[float], keys: list[str]) -> None:
    with pytest.raises(ValueError, match="one key per value"):
        interval(values, keys)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired_interval([1.0, 2.0], [1.0], ["a", "b"])


class TestSeeds:
    """Several training seeds: rows of either argument."""

    def test_one_row_equals_a_vector(self) -> None:
        a, b = np.random.default_rng(0).random((2, 120))
        assert paired_interval(a[None], b, singles(120)) == paired_interval(a, b, singles(120))
        assert interval(a[None], singles(120)) == interval(a, singles(120))

    def test_equal_rows_leave_the_variance_of_images(self) -> None:
        a, b = np.random.default_rng(0).random((2, 120))
        estimate = paired_interval(np.stack([a, a, a]), b, singles(120))
        test = stats.ttest_rel(a, b)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(test.confidence_interval()))
        assert estimate.p_value == pytest.approx(test.pvalue)

    @pytest.mark.parametrize("seeds", [2, 3, 4])  # scipy loses the far tail of 3 degrees
    def test_p_value_and_interval_agree_where_seeds_do(self, seeds: int) -> None:
        """Seeds that differ less than chance makes them add no variance, however few they are."""
        for draw in range(20):
            rng = np.random.default_rng(draw)
            common = rng.standard_normal(60) + 0.2
            a = common + 0.01 * (rng.standard_normal((seeds, 60)))
            estimate = paired_interval(
                a - a.mean(1, keepdims=True) + common.mean(), 0 * common, singles(60)
            )
            assert estimate.p_value == pytest.approx(stats.ttest_1samp(common, 0).pvalue, rel=0.05)
            assert (estimate.low <= 0 <= estimate.high) == (estimate.p_value >= 0.05)

    def test_with_equal_images_only_the_variance_of_seeds_remains(self) -> None:
        """Images say nothing, seeds everything: Student's t with two degrees of freedom over -1, 0
        and +1."""
        a = np.repeat([[-1.0], [0.0], [1.0]], 200, axis=1)
        estimate = paired_interval(a, np.zeros(200), singles(200))
        half = stats.t.ppf(0.975, 2) / 3**0.5
        assert estimate == pytest.approx((0.0, -half, half, 1.0))

    def test_balanced_data_give_the_textbooks_mean_squares(self) -> None:
        """Two-way layout without repetition: Var = (MS seeds + MS images - MS rest) / (S C)."""
        s, c = 4, 30
        rng = np.random.default_rng(1)
        y = (
            0.3 * rng.standard_normal((s, 1))
            + rng.standard_normal((1, c))
            + rng.standard_normal((s, c))
        )
        seeds = c * np.var(y.mean(1), ddof=1)
        images = s * np.var(y.mean(0), ddof=1)
        residual = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
        noise = np.square(residual).sum() / ((s - 1) * (c - 1))
        variance = (seeds + images - noise) / (s * c)
        share = (seeds - noise) / (seeds + images - noise)
        half = (
            share * stats.t.ppf(0.975, s - 1) + (1 - share) * stats.t.ppf(0.975, c - 1)
        ) * variance**0.5
        assert seeds > noise
        # Every image asked twice, which is one observation.
        values, keys = np.repeat(y, 2, axis=1), [str(i // 2) for i in range(2 * c)]
        assert interval(values, keys) == pytest.approx((y.mean(), y.mean() - half, y.mean() + half))

    def test_independent_seeds_of_both_sides_add_up(self) -> None:
        rng = np.random.default_rng(2)
        a = np.repeat(rng.standard_normal((3, 1)), 50, axis=1)
        b = np.repeat(rng.standard_normal((5, 1)), 50, axis=1)
        estimate = paired_interval(a, b, singles(50), same_seeds=False)
        ours, others = np.var(a[:, 0], ddof=1) / 3, np.var(b[:, 0], ddof=1) / 5
        quantile = (ours * stats.t.ppf(0.975, 2) + others * stats.t.ppf(0.975, 4)) / (ours + others)
        middle, half = a.mean() - b.mean(), quantile * (ours + others) ** 0.5
        assert estimate[:3] == pytest.approx((middle, middle - half, middle + half))
        at_p = paired_interval(a, b, singles(50), same_seeds=False, level=1 - estimate.p_value)
        # the interval that just reaches 0
        assert min(abs(at_p.low), abs(at_p.high)) == pytest.approx(0.0, abs=1e-6)

    def test_seeds_of_the_other_side_count_too(self) -> None:
        rng = np.random.default_rng(3)
        a, b = rng.random(60), rng.random((3, 60)) + np.array([[0.0], [0.3], [-0.3]])
        ours, others, single = (
            paired_interval(x, y, singles(60))
            for x, y in ((a, b), (b, a), (a, b[0] - b[0].mean() + b.mean()))
        )
        assert (ours.low, ours.high) == pytest.approx((-others.high, -others.low))
        assert ours.high - ours.low > 2 * (single.high - single.low)

    def test_where_all_agree_there_is_no_width(self) -> None:
        assert interval(np.ones((3, 20)), singles(20)) == (1.0, 1.0, 1.0)
        assert paired_interval(np.ones((3, 20)), np.ones(20), singles(20)) == (0.0, 0.0, 0.0, 1.0)
        assert np.isnan(interval(np.random.default_rng(0).random((3, 4)), ["a"] * 4)[1:]).all()

    def test_seeds_of_other_numbers_are_not_the_same(self) -> None:
        with pytest.raises(ValueError, match="same samples"):
            paired_interval(np.zeros((3, 4)), np.zeros((2, 4)), singles(4))

    @pytest.mark.parametrize(
        ("spread", "seeds"),
        [
            (0.02, 3),  # images and seeds
            *(
                pytest.param(spread, seeds, marks=pytest.mark.slow)
                for spread, seeds in (
                    (0.0, 3),  # images alone
                    (0.0, 5),
                    (0.005, 3),
                    (0.005, 5),
                    (0.02, 5),
                    (0.05, 3),
                    (0.05, 5),
                )
            ),
        ],
    )
    def test_coverage(self, spread: float, seeds: int) -> None:
        """1,000 images x 5 questions of accuracy .85, in which seeds share most of their mistakes:
        92 to 97 %."""
        rng, trials, images = np.random.default_rng(seeds), 800, 1000
        # Sums of five questions: spread .36 each; .3 between images, .2 of a seed's own.
        image = 0.3 * rng.standard_normal((trials, 1, images), dtype=np.float32)
        level = spread * rng.standard_normal((trials, seeds, 1), dtype=np.float32)
        covered = 0
        for trial in range(trials):
            noise_of_seeds = 0.2 * rng.standard_normal((seeds, images), dtype=np.float32)
            sums = 5.0 * (0.85 + level[trial] + image[trial] + noise_of_seeds)
            _, low, high, _ = crossed([sums.astype(np.float64)], np.full(images, 5.0))
            covered += low <= 0.85 <= high
        assert 0.92 <= covered / trials <= 0.97
