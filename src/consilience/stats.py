"""Intervals, paired tests and multiple comparison: the few that tables here need.

The unit is always an image (or a run), never a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy

from consilience.types import Array, ConsilienceError

SMALL = 5
LARGE = 5000
RESAMPLES = 9999
TIE_TOLERANCE = 1e-10
Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval, how many values it stands on,
    and how the bounds were made.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95


def mean_interval(
    values: Sequence[float] | Array, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of independent values (n,) with its confidence interval.

    The smallest interval that holds Student's and the bootstrap-t (Efron 1982, section
    10.10; 9,999 seeded resamples): the first is too short for skewed values, the second
    for heavy tails, and which of them values are cannot be told from a few. Its
    coverage is measured (docs/agreement.md). Student's t alone below 5 values, where
    nothing can be resampled, and above 5,000, where both agree. No bounds (NaN) for one
    value, for equal values, and where most values are equal, so that one resample in
    forty has no variance: how far the rare ones go was not seen. All of it is said in
    ``method``. NaN is refused: what is left out is for the caller to say.
    """
    _check_level(level)
    x = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(x).all():
        raise ConsilienceError(
            f"mean_interval: {np.count_nonzero(~np.isfinite(x))} of {x.size} values are not "
            f"finite"
        )
    if not x.size:
        return _unbounded(x, level, "no values")
    if x.size == 1:
        return _unbounded(x, level, "one value: no interval")
    if (x == x[0]).all():
        return _unbounded(x, level, f"no interval: all {x.size} values are equal")
    student = _student(x, level)
    if not SMALL <= x.size <= LARGE:
        return student
    tails = ((1 - level) / 2, (1 + level) / 2)
    # infinite ends are kept as they are: no interpolation between them and a number
    low, high = np.quantile(resampled_t(x, seed), tails, method="inverted_cdf")
    if not math.isfinite(low) or not math.isfinite(high):
        return _unbounded(x, level, "no interval: most values are equal")
    spread = float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(
        student.mean,
        min(student.low, student.mean - float(high) * spread),
        max(student.high, student.mean - float(low) * spread),
        x.size,
        "Student's t and bootstrap-t",
        level,
    )


def _unbounded(x: Array, level: float, method: str) -> Interval:
    mean = float(x.mean()) if x.size else math.nan
    return Interval(mean, math.nan, math.nan, x.size, method, level)


def _student(x: Array, level: float) -> Interval:
    mean = float(x.mean())
    half = (
        float(scipy.stats.t.ppf((1 + level) / 2, x.size - 1))
        * float(x.std(ddof=1))
        / math.sqrt(x.size)
    )
    return Interval(mean, mean - half, mean + half, x.size, "Student's t", level)


def resampled_t(values: Array, seed: int) -> Array:
    """Student's t (9,999,) of seeded resamples of values (n,) about the values' own
    mean, sorted; infinite where a resample has no variance but another mean, 0 where it
    has the same mean.
    """
    x = values - values.mean()
    scale = float(np.abs(x).max())
    x = x / scale
    parts = []
    for counts in _resample_counts(x.size, seed):
        means = counts @ x / x.size
        squares = counts @ x**2 / x.size - means**2
        spread = np.sqrt(np.maximum(squares, 0) / (x.size - 1))
        flat = squares <= TIE_TOLERANCE
        t = np.divide(means, spread, out=np.zeros_like(means), where=~flat)
        far = flat & (np.abs(means) > TIE_TOLERANCE)
        t[far] = np.copysign(math.inf, means[far])
        parts.append(t)
    return np.sort(np.concatenate(parts))


def _resample_counts(n: int, seed: int) -> Iterable[Array]:
    """How often each of n values is in each of 9,999 resamples: (b, n) float64, at most
    a million numbers at a time; all of them are kept for the next call where they are
    no more than four million.
    """
    if RESAMPLES * n <= 4_000_000:
        return _kept_counts(n, seed)
    return _drawn_counts(n, np.random.default_rng(seed))


@lru_cache(maxsize=4)
def _kept_counts(n: int, seed: int) -> tuple[Array, ...]:
    return tuple(_drawn_counts(n, np.random.default_rng(seed)))


def _drawn_counts(n: int, rng: np.random.Generator) -> Iterator[Array]:
    at_once = max(1, 1_000_000 // n)
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n)
        yield counts.reshape(size, n).astype(np.float64)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Share of successes with its score interval (Wilson 1927), for outcomes that are 0
    or 1.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ConsilienceError(
            f"wilson: successes must be from 0 to n; got {successes} of {n}"
        )
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, "no values", level)
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # at 0 and n of n the formula's own bound is 0 and 1; rounding must not pass them
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n, "Wilson", level)


def sign_flip_test(
    differences: Sequence[float] | Array,
    seed: int = 0,
    draws: int = 9999,
    alternative: Alternative = "two-sided",
) -> float:
    """p of paired differences (n,) under the null that each is as likely with the other
    sign (Fisher 1935).

    The statistic is the mean. Up to 15 differences all 2^n flips are counted, above
    that ``draws`` seeded ones and the identity, so p is never 0.
    """
    x = np.asarray(differences, dtype=np.float64).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise ConsilienceError(
            f"sign_flip_test: needs finite differences; got {x.size} with "
            f"{int(np.isnan(x).sum())} NaN"
        )
    exact = x.size <= 15
    sums = _all_flips(x) if exact else _drawn_flips(x, seed, draws)
    return share_as_extreme(sums, float(x.sum()), alternative, float(np.abs(x).sum()))


def _all_flips(x: Array) -> Array:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=x.size)))
    flips: Array = signs @ x
    return flips


def _drawn_flips(x: Array, seed: int, draws: int) -> Array:
    rng = np.random.default_rng(seed)
    sums = [np.array([x.sum()])]
    for start in range(0, draws, 1000):
        signs = rng.integers(0, 2, (min(1000, draws - start), x.size)) * 2.0 - 1
        sums.append(signs @ x)
    return np.concatenate(sums)


def paired_test(
    differences: Sequence[float] | Array,
    seed: int = 0,
    alternative: Alternative = "two-sided",
) -> float:
    """p of paired differences (n,) under the null that their mean is 0 (or on the other
    side): the larger p of `sign_flip_test` and of the bootstrap-t.

    Flipping signs is exact where differences are as likely with either sign, but takes
    a skewed distribution of mean 0 for evidence (.13 to .20 at .05 for 8 to 12
    differences); the bootstrap-t allows for the skew and is loose where values are few.
    Both must speak. What is left is measured (docs/evaluation.md); no test holds for
    every distribution with a mean (Bahadur & Savage 1956), and none sees a loss that is
    rare and large before it happens. Differences that are all equal have no variance to
    studentise with: signs alone are flipped.
    """
    x = np.asarray(differences, dtype=np.float64).ravel()
    flipped = sign_flip_test(x, seed, alternative=alternative)
    if x.size < 2 or (x == x[0]).all():
        return flipped
    observed = float(x.mean() / x.std(ddof=1) * math.sqrt(x.size))
    t, slack = resampled_t(x, seed), TIE_TOLERANCE * max(1.0, abs(observed))
    above = (1 + np.count_nonzero(t >= observed - slack)) / (1 + t.size)
    below = (1 + np.count_nonzero(t <= observed + slack)) / (1 + t.size)
    tails = {
        "greater": above,
        "less": below,
        "two-sided": min(1.0, 2 * min(above, below)),
    }
    return max(flipped, float(tails[alternative]))


def share_as_extreme(
    null: Array,
    observed: float,
    alternative: Alternative = "greater",
    scale: float = 1.0,
) -> float:
    """Share of a null distribution that is at least as extreme as ``observed``; equal
    up to rounding counts as equal.

    ``null`` must contain the identity, so that the share is a valid p (Phipson & Smyth
    2010).
    """
    slack = TIE_TOLERANCE * scale
    if alternative == "two-sided":
        return float(np.mean(np.abs(null) >= abs(observed) - slack))
    if alternative == "less":
        return float(np.mean(null <= observed + slack))
    return float(np.mean(null >= observed - slack))


def holm(p_values: Sequence[float] | Array) -> Array:
    """p values adjusted for the family-wise error (Holm 1979), in the order given.

    NaN is not tested: it stays, uncounted.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    stepped = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConsilienceError(
            f"a confidence level lies between 0 and 1; got {level:g}"
        )


# ---- paired differences


def effect_size(differences: Sequence[float] | Array) -> float:
    """Cohen's d_z of paired differences (n,): their mean over their standard deviation
    (Cohen 1988, section 2.3.5).

    The standard deviation has n - 1 below it. About .2 is small, .5 medium, .8 large.
    NaN for fewer than two; differences that are all equal have 0 where they are 0, else
    an infinite one of their sign.

    >>> effect_size([1.0, 2.0, 3.0])
    2.0
    """
    x = np.asarray(differences, dtype=np.float64).ravel()
    if not np.isfinite(x).all():
        raise ConsilienceError(
            f"effect_size: {np.count_nonzero(~np.isfinite(x))} of {x.size} differences are "
            f"not finite"
        )
    if x.size < 2:
        return math.nan
    if (x == x[0]).all():
        return 0.0 if x[0] == 0 else math.copysign(math.inf, x[0])
    return float(x.mean() / x.std(ddof=1))


def smallest_sign_flip_p(
    n: int, alternative: Alternative = "two-sided", draws: int = 9999
) -> float:
    """The smallest p that `sign_flip_test` can give for n differences: what so few
    images can show at best.
    """
    if n > 15:
        return 1 / (draws + 1)
    return min(1.0, math.ldexp(2.0 if alternative == "two-sided" else 1.0, -n))


def smallest_paired_p(n: int, alternative: Alternative = "two-sided") -> float:
    """The smallest p that `paired_test` can give for n differences: the larger of what
    signs and resamples can.
    """
    sides = 2 if alternative == "two-sided" else 1
    return max(smallest_sign_flip_p(n, alternative), sides / (RESAMPLES + 1))


@dataclass(frozen=True)
class Family:
    """Tests that are adjusted together (Holm), under the ``name`` that says which: raw
    and adjusted p by test.
    """

    name: str
    p: Mapping[str, float]
    adjusted: Mapping[str, float]

    @property
    def size(self) -> int:
        """How many tests were made; NaN is none."""
        return sum(not math.isnan(p) for p in self.p.values())


def holm_family(name: str, p: Mapping[str, float]) -> Family:
    """`holm` over the tests of a family that is named, so that a table can say what its
    p values are adjusted for.
    """
    return Family(
        name, dict(p), dict(zip(p, holm(list(p.values())).tolist(), strict=True))
    )


# ---- orders of methods


@dataclass(frozen=True, eq=False)
class RankStability:
    """How far the order of k methods depends on which images were taken.

    ``mean_rank`` (k,) is the mean over resamples of each method's rank by its mean, 1
    is best; ``low`` and ``high`` (k,) span 95 % of them. ``kept`` (k, k) is the share
    of resamples in which two methods keep the order of their means (a tie counts half),
    NaN on the diagonal and where the two are equal.
    """

    mean_rank: Array
    low: Array
    high: Array
    kept: Array
    n: int
    resamples: int


def rank_stability(
    values: Sequence[Sequence[float]] | Array,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = 2000,
) -> RankStability:
    """Order of k methods under a seeded bootstrap of images; ``values`` (n, k) has a
    row an image, without NaN.
    """
    x = _table("rank_stability", values) * (1 if higher_is_better else -1)
    means = _resampled_means(x, seed, resamples)
    orders = ranks(-means, axis=1)
    low, high = np.quantile(orders, (0.025, 0.975), axis=0)
    return RankStability(
        orders.mean(axis=0),
        low,
        high,
        _kept(means, x.mean(axis=0)),
        len(x),
        resamples,
    )


def _resampled_means(x: Array, seed: int, resamples: int) -> Array:
    """Means (resamples, k); what is drawn is how often each image is taken, at most a
    million counts at a time.
    """
    rng, n = np.random.default_rng(seed), len(x)
    chunk = max(1, 1_000_000 // n)
    parts = []
    for start in range(0, resamples, chunk):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(chunk, resamples - start))
        parts.append(counts @ x / n)
    return np.concatenate(parts)


def _kept(means: Array, whole: Array) -> Array:
    count = len(whole)
    kept = np.full((count, count), math.nan)
    scale = TIE_TOLERANCE * max(1.0, float(np.abs(whole).max()))
    for a, b in itertools.permutations(range(count), 2):
        gap, gaps = whole[a] - whole[b], means[:, a] - means[:, b]
        if abs(gap) > scale:
            tied = np.abs(gaps) <= scale
            kept[a, b] = float(
                np.mean(np.where(tied, 0.5, np.sign(gaps) == np.sign(gap)))
            )
    return kept


@dataclass(frozen=True, eq=False)
class CriticalDifference:
    """Friedman's test with Nemenyi's critical difference (Demsar, JMLR 2006, section
    3.2.2), k methods on n images.

    ``mean_ranks`` (k,), 1 is best, ties share their ranks; ``chi2`` of Friedman,
    corrected for ties, and ``p`` of Iman and Davenport's F; methods whose mean ranks
    differ by less than ``difference`` cannot be told apart at ``alpha``; ``groups`` are
    the largest such sets, as indices from the best on.
    """

    mean_ranks: Array
    chi2: float
    f: float
    p: float
    difference: float
    groups: tuple[tuple[int, ...], ...]
    n: int
    alpha: float


def critical_difference(
    values: Sequence[Sequence[float]] | Array,
    higher_is_better: bool = True,
    alpha: float = 0.05,
) -> CriticalDifference:
    """Mean ranks of k methods over n images and how far apart they must lie: ``q_alpha
    sqrt(k (k + 1) / (6 n))``.

    ``q_alpha`` is the studentised range's quantile over the square root of 2.
    ``values`` (n, k) has a row an image, no NaN.
    """
    x = _table("critical_difference", values)
    n, k = x.shape
    if k < 2:
        raise ConsilienceError(
            f"critical_difference: an order needs two methods; got {k}"
        )
    orders = ranks(-x if higher_is_better else x, axis=1)
    mean_ranks = orders.mean(axis=0)
    difference = float(
        scipy.stats.studentized_range.ppf(1 - alpha, k, np.inf) / math.sqrt(2)
    ) * math.sqrt(k * (k + 1) / (6 * n))
    chi2 = _friedman(orders)
    f = _iman_davenport(chi2, n, k)
    p = float(scipy.stats.f.sf(f, k - 1, (k - 1) * (n - 1))) if n > 1 else math.nan
    return CriticalDifference(
        mean_ranks, chi2, f, p, difference, _groups(mean_ranks, difference), n, alpha
    )


def _friedman(ranks: Array) -> float:
    n, k = ranks.shape
    counts = np.concatenate(
        [np.unique(row, return_counts=True)[1] for row in ranks]
    ).astype(np.float64)
    untied = 1 - float((counts**3 - counts).sum()) / (n * k * (k**2 - 1))
    if untied <= 0:
        return 0.0  # every image ties all methods: nothing speaks against their being equal
    raw = (
        12
        * n
        / (k * (k + 1))
        * (float((ranks.mean(axis=0) ** 2).sum()) - k * (k + 1) ** 2 / 4)
    )
    return float(raw / untied)


def _iman_davenport(chi2: float, n: int, k: int) -> float:
    room = n * (k - 1) - chi2
    return math.inf if room <= TIE_TOLERANCE else (n - 1) * chi2 / room


def _groups(mean_ranks: Array, difference: float) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(mean_ranks, kind="stable")
    found: list[tuple[int, ...]] = []
    for start in range(len(order)):
        near = [
            int(i)
            for i in order[start:]
            if mean_ranks[i] - mean_ranks[order[start]] < difference
        ]
        if len(near) > 1 and not any(set(near) <= set(known) for known in found):
            found.append(tuple(near))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Correlation:
    """Spearman's correlation of two metrics over images: ``mean`` over methods,
    ``within`` (k,) each, NaN where undefined.
    """

    mean: float
    within: Array


def metric_correlation(
    a: Sequence[Sequence[float]] | Array, b: Sequence[Sequence[float]] | Array
) -> Correlation:
    """Whether two metrics agree on which images a method explains well: Spearman over
    images, within each method.

    ``a`` and ``b`` (n, k) hold the metrics' values, a row an image, a column a method,
    turned so that more is better; NaN where one does not apply. Over all images and
    methods at once the methods' means would correlate too, which is another question. A
    method with fewer than three images, or a constant metric, has NaN and is left out
    of the mean.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ConsilienceError(
            f"metric_correlation: needs two tables (n, k) of one shape; got {x.shape} and "
            f"{y.shape}"
        )
    within = np.array([_spearman(*pair) for pair in zip(x.T, y.T, strict=True)])
    known = within[~np.isnan(within)]
    return Correlation(float(known.mean()) if known.size else math.nan, within)


def ranks(values: Array, axis: int | None = None) -> Array:
    """Ranks from 1, average ones for ties, in float64: since scipy 1.18 those of float32
    are float32, in which sums over a map are off from the eighth digit on.
    """
    found: Array = scipy.stats.rankdata(np.asarray(values, np.float64), axis=axis)
    return found


def _spearman(a: Array, b: Array) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    x, y = (ranks(values[both]) - (both.sum() + 1) / 2 for values in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if both.sum() >= 3 and scale else math.nan


def _table(what: str, values: Sequence[Sequence[float]] | Array) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise ConsilienceError(
            f"{what}: needs a table (images, methods) of finite values; got {x.shape}"
        )
    return x
