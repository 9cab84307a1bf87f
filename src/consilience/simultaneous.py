"""Many mean differences tested at once: the largest of them decides (max-T).

The unit is an image. All classes of an image are resampled together, so that how they
hang together is part of the null, and nothing is lost to it as by Bonferroni (Westfall
and Young 1993; Romano and Wolf 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from consilience.types import Array, ConsilienceError

DRAWS = 1999
COLUMNS = 2048
"""Columns that are resampled at a time: what is held is ``DRAWS x COLUMNS`` numbers."""


@dataclass(frozen=True, eq=False)
class Simultaneous:
    """Means (T,) of paired differences with bounds that hold for all of them together.

    ``p`` (T,) are adjusted for the whole family, ``error`` (T,) standard errors,
    ``critical`` is how many standard errors the bounds lie off, ``n`` how many images
    there are. A column without variance has no bounds (NaN) and is not tested, but one
    of zeros alone has p 1.
    """

    mean: Array
    error: Array
    low: Array
    high: Array
    p: Array
    critical: float
    n: int
    level: float = 0.95
    method: str = "max-T over sign flips and bootstrap-t"


class Columns(Protocol):
    """Differences (n, k) that may lie on disk: columns are read as ``[:, slice]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Images and columns."""

    def __getitem__(self, part: tuple[slice, slice], /) -> Array:
        """Some columns of all images."""


def simultaneous(
    differences: Columns | Sequence[Columns],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Simultaneous:
    """Simultaneous tests and intervals of differences (n, T), a row an image.

    The null of the largest ``|t|`` is taken from sign flips of centred rows (exact
    where they are symmetric) and from resampled rows (bootstrap-t, which allows for
    skew); the larger quantile and the larger p are used, as in `stats.paired_test`.
    Several tables of the same images are one family, side by side; what may lie on disk
    is read in blocks. Raises `ConsilienceError` for fewer than two images and for
    values that are not finite.
    """
    parts = differences if isinstance(differences, Sequence) else [differences]
    sizes = {part.shape[0] for part in parts}
    if len(sizes) != 1:
        raise ConsilienceError(
            f"simultaneous tests are of the same images; got {sorted(sizes)}"
        )
    n = sizes.pop()
    if n < 2:
        raise ConsilienceError(f"simultaneous tests need two images; got {n}")
    if not 0 < level < 1:
        raise ConsilienceError(f"a level lies between 0 and 1; got {level:g}")
    found = [_means(block) for _, block in _blocks(parts)]
    mean, spread = (np.concatenate(side) for side in zip(*found, strict=True))
    tested = spread > 1e-9 * np.maximum(1e-30, np.abs(mean))
    error = np.where(tested, spread / math.sqrt(n), math.nan)
    largest = _largest(parts, mean, spread, tested, n, seed, draws)
    critical = max(_quantile(one, level) for one in largest)
    t = np.abs(mean) / np.where(tested, error, math.inf)
    p = np.maximum(*[_tail(one, t) for one in largest])
    p = np.where(tested, p, np.where(mean == 0, 1.0, math.nan))
    half = critical * error
    return Simultaneous(mean, error, mean - half, mean + half, p, critical, n, level)


def _blocks(parts: Sequence[Columns]) -> Iterator[tuple[slice, Array]]:
    """Columns in float64, and where they stand among all."""
    start = 0
    for part in parts:
        for first in range(0, part.shape[1], COLUMNS):
            block = np.asarray(part[:, slice(first, first + COLUMNS)], np.float64)
            yield slice(start, start + block.shape[1]), block
            start += block.shape[1]


def _means(block: Array) -> tuple[Array, Array]:
    if not np.isfinite(block).all():
        raise ConsilienceError(
            f"simultaneous: {np.count_nonzero(~np.isfinite(block))} differences are not "
            f"finite"
        )
    return block.mean(0), block.std(0, ddof=1)


def _largest(
    parts: Sequence[Columns],
    mean: Array,
    spread: Array,
    tested: Array,
    n: int,
    seed: int,
    draws: int,
) -> tuple[Array, Array]:
    """The largest ``|t|`` over all columns of each draw, sorted: of sign flips and of
    resamples.
    """
    ways = (_flips(n, seed, draws), _resamples(n, seed, draws))
    most = [np.zeros(draws), np.zeros(draws)]
    for place, block in _blocks(parts):
        on = tested[place]
        if on.any():
            scaled = (block[:, on] - mean[place][on]) / spread[place][on]
            for way, draw in enumerate(ways):
                most[way] = np.maximum(most[way], draw(scaled.astype(np.float32)))
    return np.sort(most[0]), np.sort(most[1])


Draw = Callable[[Array], Array]
"""Standardised columns (n, k) to the largest ``|t|`` of every draw (draws,)."""


def _flips(n: int, seed: int, draws: int) -> Draw:
    signs = np.random.default_rng(seed).integers(0, 2, (draws, n)) * 2 - 1
    weights = signs.astype(np.float32)

    def largest(scaled: Array) -> Array:
        # Signs leave squares as they are, so that the largest mean against the root
        # mean square is the largest t.
        unit = scaled / np.sqrt((scaled**2).mean(0))
        share = np.abs(weights @ unit / n)
        return _as_t(share.max(1).astype(np.float64) ** 2, n)

    return largest


def _resamples(n: int, seed: int, draws: int) -> Draw:
    counts = np.random.default_rng(seed + 1).multinomial(n, np.full(n, 1 / n), draws)
    weights = counts.astype(np.float32)

    def largest(scaled: Array) -> Array:
        means, squares = weights @ scaled / n, weights @ scaled**2 / n
        np.square(means, out=means)
        # A draw of one row over and over has no variance; of rows of 0, no mean either.
        share = np.divide(means, squares, out=means, where=squares > 1e-6)
        return _as_t(share.max(1).astype(np.float64), n)

    return largest


def _as_t(share: Array, n: int) -> Array:
    """``|t|`` of a mean's square as a share of the mean square: infinite where it is
    all of it, for a draw without variance.
    """
    rest = 1 - np.minimum(share, 1)
    flat = rest < 1e-6
    return np.where(
        flat, math.inf, np.sqrt((n - 1) * share / np.where(flat, 1, rest))
    )


def _quantile(largest: Array, level: float) -> float:
    """The smallest value that as few draws as allowed exceed, the data counted among
    them.
    """
    place = math.ceil(level * (len(largest) + 1)) - 1
    return float(largest[place]) if place < len(largest) else math.inf


def _tail(largest: Array, t: Array) -> Array:
    """Share of draws, and the data, that reach each t."""
    reached = len(largest) - np.searchsorted(largest, t * (1 - 1e-6), side="left")
    share: Array = (1 + reached) / (1 + len(largest))
    return share
