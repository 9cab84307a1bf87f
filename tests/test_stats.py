import itertools
import math

import numpy as np
import pytest
from oracles_agreement import literal_bca, literal_flip_p, literal_holm
from scipy import stats as peer

from consilience import stats
from consilience.stats import (
    Interval,
    holm,
    mean_interval,
    share_as_extreme,
    sign_flip_test,
    wilson,
)
from consilience.types import ConsilienceError

PUBLISHED = [
    0.1025,
    0.1692,
    0.1343,
    0.1007,
    0.1391,
    0.0924,
    0.1971,
    0.0790,
    0.1101,
    0.0739,
]


def test_student_by_hand():
    # mean 3, standard deviation sqrt(2.5), t(.975, 4) = 2.776445 from a printed table
    found = mean_interval([1, 2, 3, 4, 5])
    assert found.high - 3 == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert (found.mean, found.low + found.high, found.n, found.method) == (
        3.0,
        pytest.approx(6.0),
        5,
        "Student's t",
    )


def test_the_published_ten_have_an_interval_of_about_three_hundredths():
    # standard deviation .0401 of ten, t(.975, 9) = 2.262157
    found = mean_interval(PUBLISHED)
    spread = math.sqrt(sum((x - sum(PUBLISHED) / 10) ** 2 for x in PUBLISHED) / 9)
    assert found.mean == pytest.approx(0.11983, abs=1e-5)
    assert found.high - found.mean == pytest.approx(
        2.262157 * spread / math.sqrt(10), rel=1e-6
    )
    assert found.high - found.mean == pytest.approx(0.029, abs=1e-3)


def test_other_levels_by_hand():
    # t(.95, 4) = 2.131847
    assert mean_interval([1, 2, 3, 4, 5], level=0.9).high - 3 == pytest.approx(
        2.131847 * math.sqrt(0.5), rel=1e-6
    )


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bca_is_efrons_within_the_noise_of_resampling(level):
    x = np.random.default_rng(5).exponential(size=25)
    found = mean_interval(x, level)
    low, high = literal_bca(x.tolist(), level, 20_000, seed=11)
    width = high - low
    assert found.method == "BCa bootstrap"
    assert abs(found.low - low) < 0.02 * width
    assert abs(found.high - high) < 0.02 * width
    # a skewed sample: the correction must be seen against the plain percentile interval
    means = np.random.default_rng(1).choice(x, (20_000, 25)).mean(axis=1)
    assert abs(np.quantile(means, (1 + level) / 2) - high) > 0.03 * width


def test_from_twenty_values_the_bootstrap_is_used_and_it_is_seeded():
    x = np.random.default_rng(0).normal(size=20)
    assert mean_interval(x[:19]).method == "Student's t"
    assert mean_interval(x) == mean_interval(x)
    assert mean_interval(x).low != mean_interval(x, seed=1).low


def test_very_many_values_fall_back_to_student():
    x = np.random.default_rng(0).normal(size=6000)
    found = mean_interval(x)
    assert found.method == "Student's t"
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * x.std() / math.sqrt(6000), rel=1e-3
    )


def test_one_value_none_and_equal_ones_say_so():
    one = mean_interval([0.4])
    assert (one.mean, one.n, one.method) == (0.4, 1, "one value: no interval")
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval([])
    assert (none.n, none.method) == (0, "no values")
    assert math.isnan(none.mean)
    assert mean_interval([0.5] * 30) == Interval(
        0.5, 0.5, 0.5, 30, "no variance: all values are equal"
    )


def test_missing_values_are_refused_not_dropped():
    with pytest.raises(ConsilienceError, match="1 of 3 values are not finite"):
        mean_interval([1.0, math.nan, 2.0])


def test_wilson_by_hand():
    # 7 of 10, z = 1.959964: centre (.7 + z^2/20) / (1 + z^2/10), half width z / (1 +
    # z^2/10) sqrt(.021 + z^2/400)
    found = wilson(7, 10)
    assert found.low == pytest.approx(0.396778, abs=1e-6)
    assert found.high == pytest.approx(0.892209, abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 10), (10, 10), (1, 3), (69, 200), (1, 10_000)]
)
@pytest.mark.parametrize("level", [0.95, 0.9])
def test_wilson_is_scipys(successes, n, level):
    theirs = peer.binomtest(successes, n).proportion_ci(level, method="wilson")
    found = wilson(successes, n, level)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=1e-12),
        pytest.approx(theirs.high, abs=1e-12),
    )
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ConsilienceError, match="from 0 to n; got 4 of 3"):
        wilson(4, 3)


@pytest.mark.parametrize(
    "x",
    [
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [0.3, -0.1, 0.4, 0.0, 0.2, 0.1],
        [1, -1],
        [0.1] * 9,
        [2.0],
    ],
)
def test_sign_flips_are_counted_as_in_the_loop(x):
    assert sign_flip_test(x) == pytest.approx(literal_flip_p(x))


def test_sign_flips_by_hand():
    # five positive differences: of 32 patterns two are as extreme, one of them above
    assert sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32
    assert sign_flip_test([1, 2, 3, 4, 5], alternative="greater") == 1 / 32
    assert sign_flip_test([1, 2, 3, 4, 5], alternative="less") == 1.0


def test_many_differences_are_drawn_with_the_identity_among_them():
    strong = np.ones(40) + np.linspace(0, 0.1, 40)
    assert sign_flip_test(strong, draws=999) == 1 / 1000
    weak = np.random.default_rng(2).normal(0.2, 1, 16)
    exact = literal_flip_p(weak.tolist())
    assert sign_flip_test(weak, draws=20_000) == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000)
    )
    assert sign_flip_test(weak, seed=3) == sign_flip_test(weak, seed=3)


def test_sign_flips_hold_their_level():
    rng = np.random.default_rng(4)
    p = np.array([sign_flip_test(rng.normal(size=8)) for _ in range(400)])
    assert np.mean(p <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("x", [[], [1.0, math.nan]])
def test_sign_flips_need_finite_differences(x):
    with pytest.raises(ConsilienceError, match="needs finite differences"):
        sign_flip_test(x)


def test_the_share_as_extreme_counts_equals_up_to_rounding():
    null = np.array([0.1 + 0.2, 0.3, -0.3, 0.0])
    assert share_as_extreme(null, 0.3) == 0.5
    assert share_as_extreme(null, 0.3, "two-sided") == 0.75
    assert share_as_extreme(null, 0.0, "less") == 0.5


def test_holm_by_hand():
    np.testing.assert_allclose(
        holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]
    )


@pytest.mark.parametrize("seed", range(10))
def test_holm_is_the_step_down(seed):
    p = np.random.default_rng(seed).random(12).round(2) ** 2
    np.testing.assert_allclose(holm(p), literal_holm(p.tolist()))


def test_what_was_not_tested_is_not_counted_by_holm():
    np.testing.assert_allclose(holm([0.01, math.nan, 0.03]), [0.02, math.nan, 0.03])
    assert holm([]).size == 0


# ---- paired differences and orders


def test_effect_size_is_the_mean_over_the_standard_deviation():
    x = np.array([0.3, -0.1, 0.4, 0.2])
    by_hand = 0.2 / math.sqrt(((0.1) ** 2 + (0.3) ** 2 + (0.2) ** 2 + 0) / 3)
    assert stats.effect_size(x) == pytest.approx(by_hand)
    assert stats.effect_size(x) * 2 == pytest.approx(
        peer.ttest_1samp(x, 0).statistic
    )  # t = d_z sqrt(n)
    assert stats.effect_size([0.0, 0.0]) == 0
    assert stats.effect_size([-1.0, -1.0]) == -math.inf
    assert math.isnan(stats.effect_size([1.0]))
    with pytest.raises(ConsilienceError, match="not finite"):
        stats.effect_size([1.0, math.nan])


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_smallest_sign_flip_p_is_that_of_equal_differences(n, alternative):
    assert stats.smallest_sign_flip_p(n, alternative) == stats.sign_flip_test(
        np.ones(n), alternative=alternative
    )
    assert stats.smallest_sign_flip_p(40) == 1e-4


def test_a_family_is_named_and_counts_what_was_tested():
    found = stats.holm_family("three tests", {"a": 0.01, "b": math.nan, "c": 0.04})
    assert (found.name, found.size) == ("three tests", 2)
    assert found.adjusted["a"] == pytest.approx(0.02)
    assert found.adjusted["c"] == pytest.approx(0.04)
    assert math.isnan(found.adjusted["b"])


def test_critical_difference_of_demsars_example():
    """Demsar 2006, table 2 and section 3.2.2: AUC of four classifiers on 14 data sets."""
    auc = np.array(
        [
            [0.763, 0.768, 0.771, 0.798],
            [0.599, 0.591, 0.590, 0.569],
            [0.954, 0.971, 0.968, 0.967],
            [0.628, 0.661, 0.654, 0.657],
            [0.882, 0.888, 0.886, 0.898],
            [0.936, 0.931, 0.916, 0.931],
            [0.661, 0.668, 0.609, 0.685],
            [0.583, 0.583, 0.563, 0.625],
            [0.775, 0.838, 0.866, 0.875],
            [1.000, 1.000, 1.000, 1.000],
            [0.940, 0.962, 0.965, 0.962],
            [0.619, 0.666, 0.614, 0.669],
            [0.972, 0.981, 0.9751, 0.975],
            [0.957, 0.978, 0.946, 0.970],
        ]
    )
    found = stats.critical_difference(auc)
    assert found.mean_ranks.round(3).tolist() == [3.143, 2.0, 2.893, 1.964]
    assert found.difference == pytest.approx(1.25, abs=0.005)
    n, k = auc.shape
    uncorrected = (
        12 * n / (k * (k + 1)) * ((found.mean_ranks**2).sum() - k * (k + 1) ** 2 / 4)
    )
    assert uncorrected == pytest.approx(
        9.28, abs=0.01
    )  # the paper does not correct for ties
    assert found.chi2 == pytest.approx(peer.friedmanchisquare(*auc.T).statistic)
    assert found.f == pytest.approx((n - 1) * found.chi2 / (n * (k - 1) - found.chi2))
    assert [set(group) for group in found.groups] == [
        {0, 1, 2, 3}
    ]  # 3.143 - 1.964 is below 1.25: none can be told apart


def test_critical_difference_follows_the_sense_of_the_metric():
    x = np.random.default_rng(0).random((9, 3))
    np.testing.assert_allclose(
        stats.critical_difference(x, higher_is_better=False).mean_ranks,
        stats.critical_difference(-x).mean_ranks,
    )
    tied = stats.critical_difference(np.ones((5, 3)))
    assert (tied.chi2, tied.mean_ranks.tolist(), len(tied.groups)) == (
        0.0,
        [2, 2, 2],
        1,
    )
    with pytest.raises(ConsilienceError, match="two methods"):
        stats.critical_difference(np.ones((5, 1)))


def test_rank_stability_against_every_resample():
    """Three images: all 27 resamples counted by hand, which the seeded ones approach."""
    x = np.array([[1.0, 0.0, 0.2], [0.0, 0.4, 0.3], [0.5, 0.6, 0.1]])
    found = stats.rank_stability(x, resamples=40_000)
    kept, ranks = np.zeros((3, 3)), []
    sign = np.sign(np.subtract.outer(x.mean(0), x.mean(0)))
    for some in itertools.product(range(3), repeat=3):
        means = x[list(some)].mean(axis=0)
        gaps = np.subtract.outer(means, means)
        gaps[abs(gaps) < 1e-12] = 0
        kept += np.where(gaps == 0, 0.5, np.sign(gaps) == sign) / 27
        ranks.append(
            1
            + (np.round(means[None], 12) > np.round(means[:, None], 12)).sum(1)
            + 0.5 * ((gaps == 0).sum(1) - 1)
        )
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(found.kept[off], kept[off], atol=0.01)
    np.testing.assert_allclose(found.mean_rank, np.mean(ranks, axis=0), atol=0.02)
    assert np.isnan(np.diag(found.kept)).all()
    again = stats.rank_stability(x, resamples=40_000)
    np.testing.assert_array_equal(found.kept, again.kept)
    turned = stats.rank_stability(-x, higher_is_better=False, resamples=40_000)
    np.testing.assert_array_equal(found.mean_rank, turned.mean_rank)
    with pytest.raises(ConsilienceError, match="finite"):
        stats.rank_stability([[1.0, math.nan]])


def test_metric_correlation_is_within_methods():
    """Within each method the two metrics are opposed, though the methods' means rise
    together.
    """
    a = np.array([[1.0, 11], [2, 12], [3, 13], [4, math.nan]])
    b = np.array([[4.0, 14], [3, 13], [2, 12], [1, 11]])
    found = stats.metric_correlation(a, b)
    np.testing.assert_allclose(found.within, [-1, -1])
    assert found.mean == pytest.approx(-1)
    assert peer.spearmanr(a.ravel(), b.ravel(), nan_policy="omit").statistic > 0
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 30, 1))
    assert stats.metric_correlation(x, y).mean == pytest.approx(
        peer.spearmanr(x, y).statistic
    )
    assert math.isnan(
        stats.metric_correlation(np.ones((5, 1)), rng.random((5, 1))).mean
    )
