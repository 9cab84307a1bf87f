"""Complexity: over how much of the image a map is spread. The model is not asked.

None of these says that a map is right: a single wrong pixel is as simple as can be.
They say what a map asks of its reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.metrics.perturbation import map_of
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    Explanation,
    Model,
    NotApplicable,
    Score,
    View,
)


def shares_of(view: View, explanation: Explanation) -> Array:
    """Each pixel's share (n,) of the map's absolute sum; raises `NotApplicable` for a
    map of zeros.
    """
    size = np.abs(map_of(view, explanation)).ravel()
    if size.max() == 0:
        raise NotApplicable(code="map-zero")
    size = size / size.max()  # so that no sum leaves the range of floats
    shares: Array = size / size.sum()
    return shares


@metrics.register("sparseness")
@dataclass(frozen=True)
class Sparseness:
    """Sparseness (Chalasani et al., ICML 2020, section 2): the Gini index of the
    absolute values.

    ``G = 1 - 2 sum_k v_(k) / ||v||_1 (d - k + 1/2) / d``, ``v_(1) <= ... <= v_(d)`` the
    absolute values sorted (Hurley and Rickard 2009): 0 where all are equal, ``1 - 1 /
    d`` where one has everything. It depends neither on the map's scale nor on where its
    values lie. Known failure: a map may be sparse and wrong; a smooth one, enlarged
    from a coarse grid, never is.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Sparseness"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    cost: ClassVar[str] = "no passes"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The index; raises `NotApplicable` for a map of zeros."""
        ordered = np.sort(shares_of(view, explanation))
        count = len(ordered)
        weights = (count - np.arange(1, count + 1) + 0.5) / count
        return Score(float(np.clip(1 - 2 * (ordered @ weights), 0, 1)))


@metrics.register("entropy")
@dataclass(frozen=True)
class Entropy:
    """Complexity (Bhatt, Weller & Moura, IJCAI 2020, definition 3): the entropy of the
    shares of the absolute values.

    ``- sum_i p_i ln p_i`` with ``p_i = |v_i| / sum_j |v_j|``, in nats: 0 where one
    pixel has everything, ``ln(h w)`` where all have the same. Of two maps as good as
    each other the simpler one is to be preferred; nothing more. Depends on the frame's
    size. Quantus takes signed shares, whose logarithm is not a number where a value is
    negative.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Entropy"
    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, np.inf)
    cost: ClassVar[str] = "no passes"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The entropy; raises `NotApplicable` for a map of zeros."""
        return Score(entropy(shares_of(view, explanation)))


def entropy(shares: Array) -> float:
    """``- sum p ln p`` of shares (n,) that sum to 1; ``0 ln 0`` is 0."""
    some = shares[shares > 0]
    return max(0.0, float(-(some @ np.log(some))))


@metrics.register("effective-pixels")
@dataclass(frozen=True)
class EffectivePixels:
    """The effective number of pixels: how many pixels of equal value would be as spread
    as this map (Hill 1973, equation 1).

    ``N_a = (sum_i p_i^a)^(1 / (1 - a))`` with ``p_i = |v_i| / sum_j |v_j|``: for
    ``order`` 2 the inverse of the sum of squares, for 1 the exponential of the entropy,
    for 0 the number of pixels above ``least`` of the largest (Nguyen & Martinez 2020
    count features by such a cut). From 1 to h w. Known failure: as of entropy; it
    counts pixels, not things.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Effective pixels"
    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (1.0, np.inf)
    cost: ClassVar[str] = "no passes"
    order: float = option(
        2.0,
        help="0 counts pixels, 1 is the exponential of the entropy, more weighs large values more",
        least=0,
    )
    least: float = option(
        0.00001,
        help="with order=0, the share of the largest value above which a pixel counts",
        least=0,
        below=1,
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The number; raises `NotApplicable` for a map of zeros."""
        shares = shares_of(view, explanation)
        number = self._number(shares)
        return Score(max(1.0, number), facts={"share": number / len(shares)})

    def _number(self, shares: Array) -> float:
        if self.order == 0:
            return float(np.count_nonzero(shares > self.least * shares.max()))
        if self.order == 1:
            return float(np.exp(entropy(shares)))
        return float(
            np.sum((shares / shares.max()) ** self.order) ** (1 / (1 - self.order))
            * self._scale(shares)
        )

    def _scale(self, shares: Array) -> float:
        # the largest share is taken out before the power and put back after it, so that
        # large orders do not underflow
        return float(shares.max() ** (self.order / (1 - self.order)))
