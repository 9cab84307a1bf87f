"""Intervals, paired tests and multiple comparison: the few that tables here need.

The unit is always a picture (or a run), never a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from consilience.types import Array, ConsilienceError

SMALL = 20
LARGE = 5000
RESAMPLES = 9999
TOLERANCE = 1e-10
Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval, how many values it stands on, and how the bounds were made."""

    mean: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95


def mean_interval(values: Sequence[float] | Array, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent values (n,) with its confidence interval.

    Student's t below 20 values, where BCa covers too little; the bias-corrected and accelerated bootstrap (Efron 1987) with
    9,999 seeded resamples from 20; Student's t again above 5,000, where both agree and the bootstrap only costs. One value
    has no interval (NaN bounds); equal values have one of no width. Both are said in ``method``. NaN is refused: what is
    left out is for the caller to say.
    """
    _check_level(level)
    x = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(x).all():
        raise ConsilienceError(f"mean_interval: {np.count_nonzero(~np.isfinite(x))} of {x.size} values are not finite")
    if x.size < 2:
        mean, method = (float(x[0]), "one value: no interval") if x.size else (math.nan, "no values")
        return Interval(mean, math.nan, math.nan, x.size, method, level)
    if (x == x[0]).all():
        return Interval(float(x[0]), float(x[0]), float(x[0]), x.size, "no variance: all values are equal", level)
    return _bca(x, level, seed) if SMALL <= x.size <= LARGE else _student(x, level)


def _student(x: Array, level: float) -> Interval:
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half, x.size, "Student's t", level)


def _bca(x: Array, level: float, seed: int) -> Interval:
    # a batch bounds the memory of the resamples to 8 MB; where the bootstrap degenerates it gives NaN
    found = stats.bootstrap(
        (x,),
        np.mean,
        vectorized=True,
        axis=-1,
        confidence_level=level,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // x.size),
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    if not math.isfinite(found.low + found.high):
        return _student(x, level)
    return Interval(float(x.mean()), float(found.low), float(found.high), x.size, "BCa bootstrap", level)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Share of successes with its score interval (Wilson 1927), for outcomes that are 0 or 1."""
    _check_level(level)
    if not 0 <= successes <= n:
        raise ConsilienceError(f"wilson: successes must be from 0 to n; got {successes} of {n}")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, "no values", level)
    z = float(stats.norm.ppf((1 + level) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # at 0 and n of n the formula's own bound is 0 and 1; rounding must not pass them
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n, "Wilson", level)


def sign_flip_test(
    differences: Sequence[float] | Array, seed: int = 0, draws: int = 9999, alternative: Alternative = "two-sided"
) -> float:
    """p of paired differences (n,) under the null that each is as likely with the other sign (Fisher 1935).

    The statistic is the mean. Up to 15 differences all 2^n flips are counted, above that ``draws`` seeded ones and the
    identity, so p is never 0.
    """
    x = np.asarray(differences, dtype=np.float64).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise ConsilienceError(f"sign_flip_test: needs finite differences; got {x.size} with {int(np.isnan(x).sum())} NaN")
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


def share_as_extreme(null: Array, observed: float, alternative: Alternative = "greater", scale: float = 1.0) -> float:
    """Share of a null distribution that is at least as extreme as ``observed``; equal up to rounding counts as equal.

    ``null`` must contain the identity, so that the share is a valid p (Phipson & Smyth 2010).
    """
    slack = TOLERANCE * scale
    if alternative == "two-sided":
        return float(np.mean(np.abs(null) >= abs(observed) - slack))
    if alternative == "less":
        return float(np.mean(null <= observed + slack))
    return float(np.mean(null >= observed - slack))


def holm(p_values: Sequence[float] | Array) -> Array:
    """p values adjusted for the family-wise error (Holm 1979), in the order given. NaN is not tested: it stays, uncounted.

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
        raise ConsilienceError(f"a confidence level lies between 0 and 1; got {level:g}")
