import itertools
import math

import numpy as np
import pytest
from oracles_agreement import literal_bootstrap_t, literal_flip_p, literal_holm
from scipy import stats as peer

from consilience import stats
from consilience.stats import (
    holm,
    mean_interval,
    paired_test,
    resampled_t,
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
    # mean 2, standard deviation 1, t(.975, 2) = 4.302653 from a printed table
    found = mean_interval([1, 2, 3])
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.mean, found.low + found.high, found.n, found.method) == (
        2.0,
        pytest.approx(4.0),
        3,
        "Student's t",
    )
    # t(.95, 2) = 2.919986
    assert mean_interval([1, 2, 3], level=0.9).high - 2 == pytest.approx(
        2.919986 / math.sqrt(3), rel=1e-6
    )


def student(x, level=0.95):
    """Student's interval, from scipy."""
    return peer.t.interval(level, len(x) - 1, np.mean(x), peer.sem(x))


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("count", [9, 25])
def test_an_interval_is_the_hull_of_student_and_bootstrap_t(level, count):
    x = np.random.default_rng(5).exponential(size=count)
    found = mean_interval(x, level)
    low, high, _ = literal_bootstrap_t(x.tolist(), level, 20_000, seed=11)
    of_student = student(x, level)
    expected = min(low, of_student[0]), max(high, of_student[1])
    width = expected[1] - expected[0]
    assert found.method == "Student's t and bootstrap-t"
    assert found.low == pytest.approx(expected[0], abs=0.04 * width)
    assert found.high == pytest.approx(expected[1], abs=0.04 * width)
    # of a long tail the upper end is the bootstrap's, the lower one Student's
    assert high > of_student[1] + 0.04 * width
    assert found.low == pytest.approx(of_student[0], abs=1e-12)


def test_the_published_ten():
    # standard deviation .0401 of ten, t(.975, 9) = 2.262157: half of Student's is .029
    found = mean_interval(PUBLISHED)
    assert found.mean == pytest.approx(0.11983, abs=1e-5)
    spread = math.sqrt(sum((x - sum(PUBLISHED) / 10) ** 2 for x in PUBLISHED) / 9)
    half = 2.262157 * spread / math.sqrt(10)
    assert half == pytest.approx(0.029, abs=1e-3)
    assert found.low <= found.mean - half
    assert found.high >= found.mean + half
    assert found.high - found.low < 1.3 * 2 * half


def test_the_bootstrap_is_used_from_five_values_and_it_is_seeded():
    x = np.random.default_rng(0).exponential(size=20)
    assert mean_interval(x[:4]).method == "Student's t"
    assert mean_interval(x[:5]).method == "Student's t and bootstrap-t"
    assert mean_interval(x) == mean_interval(x)
    assert mean_interval(x).high != mean_interval(x, seed=1).high


def test_kept_and_streamed_resamples_are_the_same(monkeypatch):
    x = np.random.default_rng(0).exponential(size=300)
    kept = resampled_t(x, 4)
    monkeypatch.setattr(stats, "_kept_counts", None)
    monkeypatch.setattr(
        stats,
        "_resample_counts",
        lambda n, seed: stats._drawn_counts(n, np.random.default_rng(seed)),
    )
    assert resampled_t(x, 4).tobytes() == kept.tobytes()
    assert len(kept) == 9999


def test_very_many_values_fall_back_to_student():
    x = np.random.default_rng(0).normal(size=6000)
    found = mean_interval(x)
    assert found.method == "Student's t"
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * x.std() / math.sqrt(6000), rel=1e-3
    )


@pytest.mark.parametrize(
    ("values", "mean", "method"),
    [
        ([0.4], 0.4, "one value: no interval"),
        ([], math.nan, "no values"),
        ([0.5] * 30, 0.5, "no interval: all 30 values are equal"),
        ([0.0] * 11 + [1.0], 1 / 12, "no interval: most values are equal"),
        ([1.0] * 28 + [0.2, 0.7], 28.9 / 30, "no interval: most values are equal"),
    ],
)
def test_where_no_interval_can_be_had_there_is_none(values, mean, method):
    found = mean_interval(values)
    assert (found.n, found.method) == (len(values), method)
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_enough_other_values_give_an_interval():
    # (1 - 5/30)^30 = .0042 of the resamples show none of the five
    found = mean_interval([1.0] * 25 + [0.2, 0.7, 0.5, 0.1, 0.9])
    assert found.method == "Student's t and bootstrap-t"
    low, _, _ = literal_bootstrap_t(
        [1.0] * 25 + [0.2, 0.7, 0.5, 0.1, 0.9], 0.95, 20_000, 3
    )
    assert found.low == pytest.approx(low, abs=0.05)
    assert low < student([1.0] * 25 + [0.2, 0.7, 0.5, 0.1, 0.9])[0]


@pytest.mark.parametrize(
    ("draw", "mean", "count", "least"),
    [
        (lambda rng, n: rng.exponential(size=n), 1, 8, 0.92),
        (lambda rng, n: rng.exponential(size=n), 1, 20, 0.93),
        (lambda rng, n: rng.beta(5, 0.5, n), 5 / 5.5, 12, 0.92),
        (lambda rng, n: rng.standard_t(3, n), 0, 12, 0.93),
        (lambda rng, n: rng.random(n) * (rng.random(n) < 0.1), 0.05, 20, 0.95),
        (lambda rng, n: rng.lognormal(size=n), math.exp(0.5), 20, 0.86),
    ],
    ids=["exponential 8", "exponential 20", "beta", "t3", "mostly 0", "lognormal"],
)
def test_intervals_cover(draw, mean, count, least):
    rng = np.random.default_rng(8)
    found = [mean_interval(draw(rng, count)) for _ in range(400)]
    told = [one for one in found if not math.isnan(one.low)]
    held = np.mean([one.low <= mean <= one.high for one in told])
    assert held >= least - 2 * math.sqrt(least * (1 - least) / len(told))


# ---- paired differences whose mean is asked for


def literal_paired_p(x, t, alternative):
    """The larger p of sign flips and of the t values of resamples (the identity
    counts).
    """
    n = len(x)
    observed = np.mean(x) / np.std(x, ddof=1) * math.sqrt(n)
    above = (1 + sum(one >= observed - 1e-9 for one in t)) / (1 + len(t))
    below = (1 + sum(one <= observed + 1e-9 for one in t)) / (1 + len(t))
    own = {
        "greater": above,
        "less": below,
        "two-sided": min(1, 2 * min(above, below)),
    }
    return max(sign_flip_test(x, alternative=alternative), own[alternative])


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("seed", range(4))
def test_the_paired_test_is_the_larger_of_two(alternative, seed):
    rng = np.random.default_rng(seed)
    x = 0.5 + 1 - rng.exponential(size=9) if seed % 2 else rng.normal(0.4, 1, 9)
    t = literal_bootstrap_t(x.tolist(), 0.95, 20_000, seed=2)[2]
    found = paired_test(x, alternative=alternative)
    assert found == pytest.approx(literal_paired_p(x, t, alternative), abs=0.012)


def test_the_paired_test_by_hand():
    # all equal: the signs alone, 1/16 and 2/16
    assert paired_test([0.3] * 4, alternative="greater") == 1 / 16
    assert paired_test([0.3] * 4) == 2 / 16
    assert paired_test([0.0] * 4, alternative="greater") == 1.0
    assert paired_test([0.5]) == 1.0
    # left-skewed: signs see evidence for a mean above 0, the studentised mean less
    skewed = [0.9, 1.0, 1.1, 0.8, 0.9, 1.0, 0.7, -0.9]
    assert sign_flip_test(skewed, alternative="greater") == 6 / 256
    assert paired_test(skewed, alternative="greater") > 0.05


@pytest.mark.parametrize("count", [8, 12])
def test_skewed_differences_of_mean_zero_are_rarely_called_above_it(count):
    rng = np.random.default_rng(6)
    drawn = [1 - rng.exponential(size=count) for _ in range(500)]
    both = np.mean([paired_test(x, alternative="greater") <= 0.05 for x in drawn])
    signs = np.mean([sign_flip_test(x, alternative="greater") <= 0.05 for x in drawn])
    assert both <= 0.075 + 2 * math.sqrt(0.075 * 0.925 / 500)
    assert signs > 0.1


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


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
@pytest.mark.parametrize("n", [3, 6, 12, 40])
def test_smallest_paired_p_is_that_of_overwhelming_differences(n, alternative):
    """Of values far above 0 that differ: no other values can give less."""
    values = 1 + np.arange(n) * 1e-6
    found = stats.paired_test(values, alternative=alternative)
    assert stats.smallest_paired_p(n, alternative) == pytest.approx(found)
    assert stats.smallest_paired_p(40) == 2e-4 > stats.smallest_sign_flip_p(40)


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


def test_the_span_of_a_rank_leaves_out_a_fortieth_at_either_end():
    """Of 27 resamples one, .037, puts the second first: more than a fortieth."""
    found = stats.rank_stability([[-2.0, 0.0], [6.0, 0.0], [6.0, 0.0]])
    assert found.low.tolist() == [1, 1]
    assert found.high.tolist() == [2, 2]


def test_friedmans_p_is_small_where_all_images_agree():
    rng = np.random.default_rng(3)
    agreed = rng.normal(size=(30, 3)) * 0.01 + [3.0, 2.0, 1.0]
    found = stats.critical_difference(agreed)
    assert found.mean_ranks.tolist() == [1, 2, 3]
    assert found.p < 1e-6
    # q .05 of three is 2.343: 2.343 sqrt(12 / 180) = .605, less than a rank
    assert found.difference == pytest.approx(2.343 * math.sqrt(12 / 180), abs=1e-3)
    assert found.groups == ()
    chance = [
        stats.critical_difference(rng.normal(size=(12, 3))).p for _ in range(200)
    ]
    assert np.mean(np.array(chance) <= 0.05) <= 0.05 + 3 * math.sqrt(0.0475 / 200)
    first = np.array([9.0, 0.0, 0.0])
    near = stats.critical_difference(rng.normal(size=(30, 3)) + first)
    assert near.groups in (((1, 2),), ((2, 1),))


def test_ranks_are_doubles_whatever_they_are_of():
    """So that sums over a map are exact: a float32 holds whole numbers to 2^24 alone."""
    values = np.random.default_rng(0).permutation(90_000).astype(np.float32)
    values[:2] = values[2]
    found = stats.ranks(values.reshape(300, 300))
    assert found.dtype == np.float64
    assert found.sum() == 90_000 * 90_001 / 2
    tied = found.ravel()[:3]
    assert (tied == tied[0]).all()
    rows = stats.ranks(np.array([[3.0, 1.0, 1.0], [0.0, 2.0, 1.0]]), axis=1)
    assert rows.tolist() == [[3, 1.5, 1.5], [1, 3, 2]]
