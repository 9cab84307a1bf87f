import math

import numpy as np
import pytest
from oracles_agreement import literal_bca, literal_flip_p, literal_holm
from scipy import stats as peer

from consilience.stats import Interval, holm, mean_interval, share_as_extreme, sign_flip_test, wilson
from consilience.types import ConsilienceError

PUBLISHED = [0.1025, 0.1692, 0.1343, 0.1007, 0.1391, 0.0924, 0.1971, 0.0790, 0.1101, 0.0739]


def test_student_by_hand():
    # mean 3, standard deviation sqrt(2.5), t(.975, 4) = 2.776445 from a printed table
    found = mean_interval([1, 2, 3, 4, 5])
    assert found.high - 3 == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert (found.mean, found.low + found.high, found.n, found.method) == (3.0, pytest.approx(6.0), 5, "Student's t")


def test_the_published_ten_have_an_interval_of_about_three_hundredths():
    # standard deviation .0401 of ten, t(.975, 9) = 2.262157
    found = mean_interval(PUBLISHED)
    spread = math.sqrt(sum((x - sum(PUBLISHED) / 10) ** 2 for x in PUBLISHED) / 9)
    assert found.mean == pytest.approx(0.11983, abs=1e-5)
    assert found.high - found.mean == pytest.approx(2.262157 * spread / math.sqrt(10), rel=1e-6)
    assert found.high - found.mean == pytest.approx(0.029, abs=1e-3)


def test_other_levels_by_hand():
    # t(.95, 4) = 2.131847
    assert mean_interval([1, 2, 3, 4, 5], level=0.9).high - 3 == pytest.approx(2.131847 * math.sqrt(0.5), rel=1e-6)


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
    assert found.high - found.low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(6000), rel=1e-3)


def test_one_value_none_and_equal_ones_say_so():
    one = mean_interval([0.4])
    assert (one.mean, one.n, one.method) == (0.4, 1, "one value: no interval")
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval([])
    assert (none.n, none.method) == (0, "no values")
    assert math.isnan(none.mean)
    assert mean_interval([0.5] * 30) == Interval(0.5, 0.5, 0.5, 30, "no variance: all values are equal")


def test_missing_values_are_refused_not_dropped():
    with pytest.raises(ConsilienceError, match="1 of 3 values are not finite"):
        mean_interval([1.0, math.nan, 2.0])


def test_wilson_by_hand():
    # 7 of 10, z = 1.959964: centre (.7 + z^2/20) / (1 + z^2/10), half width z / (1 + z^2/10) sqrt(.021 + z^2/400)
    found = wilson(7, 10)
    assert found.low == pytest.approx(0.396778, abs=1e-6)
    assert found.high == pytest.approx(0.892209, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 3), (69, 200), (1, 10_000)])
@pytest.mark.parametrize("level", [0.95, 0.9])
def test_wilson_is_scipys(successes, n, level):
    theirs = peer.binomtest(successes, n).proportion_ci(level, method="wilson")
    found = wilson(successes, n, level)
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ConsilienceError, match="from 0 to n; got 4 of 3"):
        wilson(4, 3)


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0, 4.0, 5.0], [0.3, -0.1, 0.4, 0.0, 0.2, 0.1], [1, -1], [0.1] * 9, [2.0]])
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
    assert sign_flip_test(weak, draws=20_000) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
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
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("seed", range(10))
def test_holm_is_the_step_down(seed):
    p = np.random.default_rng(seed).random(12).round(2) ** 2
    np.testing.assert_allclose(holm(p), literal_holm(p.tolist()))


def test_what_was_not_tested_is_not_counted_by_holm():
    np.testing.assert_allclose(holm([0.01, math.nan, 0.03]), [0.02, math.nan, 0.03])
    assert holm([]).size == 0
