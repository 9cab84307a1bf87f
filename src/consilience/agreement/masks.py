"""Cutting binary masks from raw maps and from superpixels, never from an image of a
map.

A cutter is a registered frozen dataclass with ``cut(explanation) -> Mask``. Values are
used as they are: no scaling, no absolute value. A cut inside a tie would fill both
masks of a pair with the same pixels in the same order, which looks like agreement: what
is tied is left out, the mask holds the evidence alone, and says how many were tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Protocol

import numpy as np

from consilience.registry import cutters, option, spell
from consilience.types import Array, ConsilienceError, Explanation, NotApplicable

FLAT_MAP = "flat map: it ranks no pixel, so the mask is empty"
NONE_POSITIVE = "no superpixel has a positive weight: the mask is empty"


@dataclass(frozen=True, eq=False)
class Mask:
    """A binary mask in the model's frame.

    ``on`` is (h, w) bool, ``rule`` the cutter as spelled, ``tied`` how many pixels share
    the value at the cut and are left out (superpixels for ``superpixels``, which takes
    them as LIME does), 0 where the cut lies between values, ``note`` what else a reader
    must know.
    """

    on: Array
    rule: str
    tied: int = 0
    note: str = ""

    @property
    def area(self) -> int:
        """Pixels that are on."""
        return int(np.count_nonzero(self.on))

    @property
    def share(self) -> float:
        """The part of the frame that is on, from 0 to 1."""
        return self.area / self.on.size


class Cutter(Protocol):
    """A frozen dataclass that cuts a mask from an explanation, or raises
    `NotApplicable` with the reason.
    """

    def cut(self, explanation: Explanation) -> Mask:
        """The mask, in the frame of the explanation's values."""


@cutters.register("top")
@dataclass(frozen=True)
class Top:
    """The pixels with the largest raw values: ``fraction`` of the frame, rounded half
    up to whole pixels.

    Pixels equal at the cut are all left out: the mask is then smaller, and empty where
    the map is flat.
    """

    fraction: float = option(
        0.2,
        help="part of the frame that is on, above 0 and at most 1",
        above=0,
        most=1,
    )

    def cut(self, explanation: Explanation) -> Mask:
        """The mask; `NotApplicable` where a value is NaN or infinite."""
        values = _finite(explanation)
        on, tied = above_cut(values, pixels_of(self.fraction, values.size))
        return Mask(on, spell(self), tied, _flat_note(values))


@cutters.register("superpixels")
@dataclass(frozen=True)
class Superpixels:
    """The ``k`` first superpixels with a positive weight, as LIME's
    ``get_image_and_mask(positive_only=True)`` takes them.

    The selected superpixels are ordered by the size of their refitted weight, equal
    ones as they were selected; negative ones are then left out. Without a refit all
    superpixels are ordered by the size of their weight.
    """

    k: int = option(10, help="superpixels at most", least=1)

    def cut(self, explanation: Explanation) -> Mask:
        """The mask; `NotApplicable` where the explanation has no superpixels."""
        segments = _segments(explanation)
        weights, candidates = _in_order_of_lime(explanation)
        positive = candidates[weights[candidates] > 0]
        on = np.isin(segments, positive[: self.k])
        tied = max(
            _tied_at_place(weights[positive], self.k),
            _tied_in_selection(explanation, candidates),
        )
        return Mask(on, spell(self), tied, "" if len(positive) else NONE_POSITIVE)


def default_cutter(explanation: Explanation) -> Cutter:
    """``superpixels`` where the explanation has them, else ``top`` (a fifth of the
    frame).
    """
    return Superpixels() if has_superpixels(explanation) else Top()


def build_cutter(cutter: str | Cutter | None, explanation: Explanation) -> Cutter:
    """A cutter from its spelling, the instance itself, or the default for this
    explanation.
    """
    if cutter is None:
        return default_cutter(explanation)
    built: Cutter = cutters.build(cutter)
    return built


def has_superpixels(explanation: Explanation) -> bool:
    """Whether the explanation weighs superpixels: extras ``segments`` and ``weights``."""
    return "segments" in explanation.extras and "weights" in explanation.extras


def matched(a: Explanation, b: Explanation, fraction: float) -> tuple[Mask, Mask]:
    """Masks of exactly equal area, so that their overlap speaks of place alone.

    Two raw maps are cut at ``fraction`` of the frame. Where ``a`` has superpixels (else
    ``b``), they are taken whole, largest signed weight first, equal ones in order of
    label, until at least ``fraction`` is covered; that area then holds for the other
    map. Two partitions have no common areas: where both have superpixels, those of
    ``a`` set the area, and the last superpixel of ``b`` is filled in row-major order up
    to it (its pixels are then counted as tied).

    Raises `ConsilienceError` for frames of different shape, `NotApplicable` for values
    that are not finite, and where a map cannot be cut at that area since equal values
    lie at the cut.
    """
    _check_fraction("matched", fraction)
    if a.values.shape != b.values.shape:
        raise ConsilienceError(
            f"maps of {frame(a.values)} and {frame(b.values)} cannot be laid over each other"
        )
    area = pixels_of(fraction, a.values.size)
    leader = next((one for one in (a, b) if has_superpixels(one)), None)
    if leader is not None:
        area = _whole_area(leader, area)
    rule = f"matched:fraction={fraction:g}"
    return _cut_area(a, area, rule), _cut_area(b, area, rule)


# ---- counting pixels


def pixels_of(fraction: float, pixels: int) -> int:
    """``fraction`` of ``pixels``, rounded half up as the decimal number reads (.145 of
    100 is 15).

    >>> pixels_of(0.2, 224 * 224), pixels_of(0.145, 100)
    (10035, 15)
    """
    return int(
        (Decimal(repr(float(fraction))) * pixels).to_integral_value(ROUND_HALF_UP)
    )


def largest(values: Array, area: int) -> Array:
    """The ``area`` pixels with the largest values as (h, w) bool; equal ones are taken
    first in row-major order.
    """
    flat = values.ravel()
    if area <= 0:
        return np.zeros(values.shape, dtype=bool)
    cut = np.partition(flat, flat.size - area)[flat.size - area]
    on: Array = flat > cut
    on[np.flatnonzero(flat == cut)[: area - np.count_nonzero(on)]] = True
    return on.reshape(values.shape)


def above_cut(values: Array, area: int) -> tuple[Array, int]:
    """The ``area`` pixels with the largest values as (h, w) bool, or those above the
    cut where equal values lie on both sides of it; and how many are equal there.
    """
    on = largest(values, area)
    tied = tied_at_cut(values, on)
    if tied:
        on = values > values[on].min()
    return on, tied


def tied_at_cut(values: Array, on: Array) -> int:
    """Pixels that share the smallest value taken, where some of them were taken and
    some were not; else 0.
    """
    if not on.any():
        return 0
    equal = values == values[on].min()
    return int(np.count_nonzero(equal)) if (equal & ~on).any() else 0


def frame(values: Array) -> str:
    """Height x width, for messages."""
    return " x ".join(map(str, values.shape))


def _check_fraction(who: str, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ConsilienceError(
            f"{who}: fraction must be above 0 and at most 1; got {fraction:g}"
        )


def _finite(explanation: Explanation) -> Array:
    values = explanation.values
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise NotApplicable(
            code="values-not-finite",
            explainer=explanation.explainer,
            bad=bad,
            size=values.size,
        )
    return values


def _flat_note(values: Array) -> str:
    return FLAT_MAP if values.min() == values.max() else ""


# ---- superpixels


def _segments(explanation: Explanation) -> Array:
    if not has_superpixels(explanation):
        raise NotApplicable(code="no-superpixels", explainer=explanation.explainer)
    segments: Array = explanation.extras["segments"]
    if segments.shape != explanation.values.shape:
        shapes = f"{frame(segments)} for a map of {frame(explanation.values)}"
        raise ConsilienceError(f"{explanation.explainer}: segments of {shapes}")
    return segments


def _in_order_of_lime(explanation: Explanation) -> tuple[Array, Array]:
    """Weights (S,) and the superpixels in the order of lime's ``local_exp``: by size of
    weight, stable.
    """
    extras = explanation.extras
    weights = _finite_weights(
        explanation, "refit" if "refit" in extras else "weights"
    )
    if "refit" not in extras:
        selected = np.arange(len(weights))
    elif "selected" in extras:
        selected = np.asarray(extras["selected"], dtype=np.int64)
    else:
        selected = np.flatnonzero(weights)
    return weights, selected[np.argsort(-np.abs(weights[selected]), kind="stable")]


def _finite_weights(explanation: Explanation, key: str) -> Array:
    weights: Array = np.asarray(explanation.extras[key])
    if not np.isfinite(weights).all():
        raise NotApplicable(
            code="weights-not-finite", explainer=explanation.explainer, key=key
        )
    return weights


def _tied_at_place(ordered: Array, k: int) -> int:
    """How many share the weight at place ``k``, where it goes on after it."""
    if len(ordered) <= k or ordered[k - 1] != ordered[k]:
        return 0
    return int(np.count_nonzero(ordered == ordered[k]))


def _tied_in_selection(explanation: Explanation, selected: Array) -> int:
    """How many share the size of weight at which LIME chose what to refit, where it
    left some of them out.
    """
    sizes = np.abs(np.asarray(explanation.extras["weights"]))
    if len(selected) == 0:
        return 0
    equal = sizes == sizes[selected].min()
    return (
        int(np.count_nonzero(equal))
        if np.count_nonzero(equal) > np.count_nonzero(equal[selected])
        else 0
    )


def _places(explanation: Explanation) -> tuple[Array, Array]:
    """Superpixels by descending signed weight, and their areas in that order."""
    segments, weights = (
        _segments(explanation),
        _finite_weights(explanation, "weights"),
    )
    order = np.argsort(-weights, kind="stable")
    return order, np.bincount(segments.ravel(), minlength=len(weights))[order]


def _whole_area(explanation: Explanation, area: int) -> int:
    """The smallest area of whole superpixels, taken in order, that is at least
    ``area``; `NotApplicable` where the last one weighs as much as the next.
    """
    order, areas = _places(explanation)
    last = int(np.searchsorted(np.cumsum(areas), area))
    weights = np.asarray(explanation.extras["weights"])[order]
    if last + 1 < len(weights) and weights[last] == weights[last + 1]:
        tied = int(areas[weights == weights[last]].sum())
        raise NotApplicable(
            code="tie-at-cut", explainer=explanation.explainer, tied=tied, area=area
        )
    return int(np.cumsum(areas)[last])


def _cut_area(explanation: Explanation, area: int, rule: str) -> Mask:
    values = _finite(explanation)
    if not has_superpixels(explanation):
        on, tied = above_cut(values, area)
        if tied:
            raise NotApplicable(
                code="tie-at-cut",
                explainer=explanation.explainer,
                tied=tied,
                area=area,
            )
        return Mask(on, rule)
    order, _ = _places(explanation)
    place: Any = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    segments = _segments(explanation)
    on = largest(-place[segments], area)
    painted = np.asarray(explanation.extras["weights"])[segments]
    return Mask(on, rule, tied_at_cut(painted, on), _flat_note(painted))
