"""Holding explanations against each other: overlap of masks, rank correlation, and what
chance alone would give.

Three chances are kept apart. ``expected_iou`` is the mean overlap of two masks of these
areas thrown anywhere, pixel by pixel. ``shift_test`` keeps both shapes and moves one
against the other. The permutation of images keeps what all maps of an
explainer share (smooth, centred) and asks whether agreement depends on the image: the
only one that carries the verdict, and the only one that needs several images. No p is
ever made from the number of pixels.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import fft

from consilience.agreement.masks import Cutter, Mask, build_cutter, frame, matched
from consilience.stats import (
    Interval,
    holm,
    mean_interval,
    ranks,
    share_as_extreme,
    sign_flip_test,
)
from consilience.types import Array, ConsilienceError, Explanation, NotApplicable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.1, 0.2, 0.3)
ALPHA = 0.05
DRAWS = 9999
ALL_PERMUTATIONS = 7
"""Up to so many images (7! = 5,040) every permutation is counted."""
PERMUTATIONS_AT_ONCE = 1000
"""Above so many images they are permuted within random groups of at most so many."""

Cutters = str | Cutter | Mapping[str, str | Cutter] | None

# ---- overlap


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two masks (h, w) bool; NaN where both are empty."""
    _same_frame(a, b)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else math.nan


@lru_cache(maxsize=1 << 16)
def expected_iou(pixels: int, a: int, b: int) -> float:
    """Mean IoU of two masks of ``a`` and ``b`` of ``pixels`` pixels, one of them thrown
    uniformly; NaN where both are empty.

    Exact: E[X / (a + b - X)] with X hypergeometric. The probabilities come from the
    ratios of neighbours, since logarithms of factorials lose five digits here. (Near
    ``ab / (a + b - ab)`` for shares a, b of a large frame.)

    >>> expected_iou(2, 1, 1), round(expected_iou(50176, 10035, 10035), 6)
    (0.5, 0.111113)
    """
    if not (0 <= a <= pixels and 0 <= b <= pixels and pixels > 0):
        raise ConsilienceError(
            f"masks of {a} and {b} pixels do not fit in a frame of {pixels}"
        )
    if a == b == 0:
        return math.nan
    x = np.arange(max(0, a + b - pixels), min(a, b) + 1, dtype=np.float64)
    y = x[:-1]
    steps = np.log((a - y) * (b - y)) - np.log((y + 1) * (pixels - a - b + y + 1))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    weights = np.exp(logs - logs.max())
    return float(weights @ (x / (a + b - x)) / weights.sum())


def iou_max(a: int, b: int) -> float:
    """The largest IoU that masks of ``a`` and ``b`` pixels can have: one inside the
    other.
    """
    return min(a, b) / max(a, b) if max(a, b) else math.nan


def excess(observed: float, expected: float) -> float:
    """How far above chance, as a part of the way to identity: ``(iou - E) / (1 - E)``,
    as kappa does.
    """
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def excess_of_possible(observed: float, expected: float, largest: float) -> float:
    """How far above chance, as a part of what these areas allow: ``(iou - E) / (iou_max
    - E)``; NaN where nothing is open.
    """
    room = largest - expected
    return (observed - expected) / room if room > 1e-12 else math.nan


@dataclass(frozen=True)
class ShiftTest:
    """``p`` of two masks against one another shifted, and in how many ``positions`` that
    are independent of each other so smooth a pair can be laid: p is at least ``1 / (1 +
    positions)``.
    """

    p: float
    positions: float

    @property
    def can_show(self) -> bool:
        """Whether p could have been at most .05."""
        return 1 / (1 + self.positions) <= ALPHA


def shift_test(a: Array, b: Array) -> ShiftTest:
    """Do masks (h, w) bool lie on each other more than when one of them is moved?

    The mask that moves is continued by its mirror images, so that no shape is torn at
    an edge as a cyclic shift tears it, and every shift of the mirrored frame (2h, 2w)
    is counted; overlap is the correlation of the two masks inside the frame, since
    their areas vary with the shift. The share of shifts with at least the observed one
    is taken for either mask, and the larger one kept. Neighbouring shifts of smooth
    masks are one position: with r the correlations over all shifts there are about ``n
    = 1 + 1 / mean(r^2)`` (that of n independent places, as for the correlation of
    autocorrelated series: Clifford, Richardson & Hemon 1989), and ``p = (1 + n share) /
    (1 + n)``, so that the observed position counts.

    Its level is measured (docs/agreement.md). p is NaN where both masks are empty, 1
    where one is empty or full, or no shift changes anything; there positions are NaN.
    """
    _same_frame(a, b)
    if not (a.any() or b.any()):
        return ShiftTest(math.nan, math.nan)
    if any(mask.all() or not mask.any() for mask in (a, b)):
        return ShiftTest(1.0, math.nan)
    share, positions = 0.0, math.inf
    for fixed, moved in ((a, b), (b, a)):
        correlations = shifted_correlations(fixed, moved)
        observed = correlations[0, 0] - TIED_SHIFT
        squared = float(np.mean(correlations**2))
        if (
            squared < TIED_SHIFT**2
        ):  # no shift changes the overlap, as of stripes across
            return ShiftTest(1.0, math.nan)
        share = max(share, float(np.mean(correlations >= observed)))
        positions = min(positions, 1 + 1 / squared)
    return ShiftTest((1 + positions * share) / (1 + positions), positions)


TIED_SHIFT = 1e-9
"""Correlations nearer than this are equal: they come of whole pixels."""


def shifted_correlations(fixed: Array, moved: Array) -> Array:
    """Pearson's correlations (2h, 2w) of mask ``fixed`` (h, w) with ``moved``, mirrored
    into (2h, 2w) and shifted cyclically, inside the frame; no shift first. 0 where the
    window shows nothing, or nothing else.
    """
    height, width = fixed.shape
    mirrored = np.pad(moved, ((0, height), (0, width)), "symmetric")
    tile = np.zeros(mirrored.shape)
    tile[:height, :width] = fixed
    spectrum = np.conj(fft.rfft2(mirrored.astype(np.float64)))
    shared = np.rint(fft.irfft2(fft.rfft2(tile) * spectrum, s=tile.shape))
    tile[:height, :width] = 1
    areas = np.rint(fft.irfft2(fft.rfft2(tile) * spectrum, s=tile.shape))
    pixels, area = fixed.size, int(np.count_nonzero(fixed))
    spread = np.sqrt(area * (pixels - area) * (areas * (pixels - areas)))
    correlations: Array = np.divide(
        shared * pixels - area * areas,
        spread,
        out=np.zeros_like(shared),
        where=spread > 0,
    )
    return correlations


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two raw maps (h, w), average ranks for ties; NaN where one is
    constant.

    It has no p: pixels of a smooth map are not independent observations.
    """
    _same_frame(a, b)
    x, y = (ranks(values) - (values.size + 1) / 2 for values in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan


def _same_frame(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ConsilienceError(
            f"frames of {frame(a)} and {frame(b)} cannot be laid over each other"
        )


# ---- one pair, one image


@dataclass(frozen=True)
class PairAgreement:
    """Two explanations of one image compared.

    Areas are shares of the frame; ``p`` and ``positions`` are of `shift_test`;
    ``iou_at_*`` and
    ``expected_at_*`` are of masks of equal area (10, 20, 30 % of the frame asked for,
    ``area_at_*`` what whole superpixels made of it), NaN where they were not asked for.
    ``mismatch`` says why the two should not be compared; every number of such a pair
    stands under it.
    """

    sample: str
    a: str
    b: str
    rule_a: str
    rule_b: str
    area_a: float
    area_b: float
    iou: float
    expected_iou: float
    excess: float
    excess_of_possible: float
    p: float
    positions: float
    spearman: float
    iou_at_10: float = math.nan
    iou_at_20: float = math.nan
    iou_at_30: float = math.nan
    expected_at_10: float = math.nan
    expected_at_20: float = math.nan
    expected_at_30: float = math.nan
    area_at_10: float = math.nan
    area_at_20: float = math.nan
    area_at_30: float = math.nan
    tied_a: int = 0
    tied_b: int = 0
    mismatch: str = ""
    notes: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """The pair as a row of the table; notes are joined."""
        return {**asdict(self), "notes": "; ".join(self.notes)}


def compare_pair(
    a: Explanation,
    b: Explanation,
    cutter_a: str | Cutter | None = None,
    cutter_b: str | Cutter | None = None,
    fractions: Sequence[float] = FRACTIONS,
    allow_mismatch: bool = False,
) -> PairAgreement:
    """Hold two explanations of one image against each other.

    Masks are cut by ``cutter_a`` and ``cutter_b`` (a spelling or an instance;
    `default_cutter` unless given) and at equal areas for ``fractions``, any of .1, .2,
    .3. Explanations of different images, weights, views or classes raise
    `ConsilienceError` unless ``allow_mismatch``; then the pair says so in ``mismatch``.
    """
    masks = (build_cutter(cutter_a, a).cut(a), build_cutter(cutter_b, b).cut(b))
    return _pair((a, b), masks, (a.explainer, b.explainer), fractions, allow_mismatch)


def mismatches(a: Explanation, b: Explanation) -> tuple[str, ...]:
    """Why two explanations cannot be compared: image, weights, view, class.

    Empty where they can.

    A different score of the same class (logit, probability) is allowed: methods have
    their own by definition.
    """
    same_image = a.sample.digest == b.sample.digest
    same_class = (a.target.index, a.target.name) == (b.target.index, b.target.name)
    if a.target.index is not None and b.target.index is not None:
        same_class = a.target.index == b.target.index
    found = [
        ""
        if same_image
        else f"different images ({a.sample.name} and {b.sample.name})",
        "" if a.model_id == b.model_id else _different_models(a.model_id, b.model_id),
        "" if _same_view(a, b, same_image) else _different_views(a, b),
        ""
        if same_class
        else f"different classes explained ({_target(a)} and {_target(b)})",
    ]
    return tuple(reason for reason in found if reason)


def _different_models(a: str, b: str) -> str:
    names = [re.sub(r"@[^@]*$", "", one) for one in (a, b)]
    what = (
        "different weights of one model"
        if names[0] == names[1]
        else "different models"
    )
    return f"{what} ({a} and {b})"


def _same_view(a: Explanation, b: Explanation, same_image: bool) -> bool:
    """Two images of different size lie differently in the same view; then only the
    frame counts.
    """
    if a.values.shape != b.values.shape:
        return False
    return (
        a.geometry.as_dict() == b.geometry.as_dict()
        if same_image
        else a.geometry.size == b.geometry.size
    )


def _different_views(a: Explanation, b: Explanation) -> str:
    modes = [str(one.provenance.get("view", "")) for one in (a, b)]
    if modes[0] == modes[1] or not all(modes):
        modes = [_placed(one) for one in (a, b)]
    return f"different views of the image ({modes[0]} and {modes[1]})"


def _placed(explanation: Explanation) -> str:
    numbers = ", ".join(
        f"{key} {value}" for key, value in explanation.geometry.as_dict().items()
    )
    return f"{frame(explanation.values)} with {numbers}"


def _target(explanation: Explanation) -> str:
    target = explanation.target
    return target.name if target.index is None else f"{target.index} {target.name}"


def _pair(
    explanations: tuple[Explanation, Explanation],
    masks: tuple[Mask, Mask],
    labels: tuple[str, str],
    fractions: Sequence[float] = FRACTIONS,
    allow_mismatch: bool = False,
    further: str = "",
) -> PairAgreement:
    """The pair from masks that are cut; ``further`` is a mismatch found elsewhere."""
    a, b = explanations
    reasons = (*mismatches(a, b), *((further,) if further else ()))
    if reasons and not allow_mismatch:
        raise ConsilienceError(
            f"{labels[0]} and {labels[1]} of {a.sample.name} cannot be compared: "
            f"{'; '.join(reasons)}"
        )
    on_a, on_b = masks[0].on, masks[1].on
    numbers, shifted = _overlap(on_a, on_b), shift_test(on_a, on_b)
    return PairAgreement(
        sample=a.sample.name,
        a=labels[0],
        b=labels[1],
        rule_a=masks[0].rule,
        rule_b=masks[1].rule,
        area_a=masks[0].share,
        area_b=masks[1].share,
        **numbers,
        excess=excess(numbers["iou"], numbers["expected_iou"]),
        excess_of_possible=excess_of_possible(
            numbers["iou"],
            numbers["expected_iou"],
            iou_max(masks[0].area, masks[1].area),
        ),
        p=shifted.p,
        positions=shifted.positions,
        spearman=spearman(a.values, b.values),
        **_at_equal_areas(a, b, fractions),
        tied_a=masks[0].tied,
        tied_b=masks[1].tied,
        mismatch="; ".join(reasons),
        notes=_notes(explanations, masks, labels),
    )


def _overlap(a: Array, b: Array) -> dict[str, float]:
    areas = (int(np.count_nonzero(a)), int(np.count_nonzero(b)))
    return {"iou": iou(a, b), "expected_iou": expected_iou(a.size, *areas)}


def _at_equal_areas(
    a: Explanation, b: Explanation, fractions: Sequence[float]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for fraction in fractions:
        if fraction not in FRACTIONS:
            raise ConsilienceError(
                f"equal areas are had at {', '.join(map(str, FRACTIONS))}; got {fraction}"
            )
        try:
            masks = matched(a, b, fraction)
        except NotApplicable:  # a tie at this area: no number, rather than a filler's
            continue
        numbers = _overlap(masks[0].on, masks[1].on)
        per_cent = round(100 * fraction)
        found[f"iou_at_{per_cent}"], found[f"expected_at_{per_cent}"] = (
            numbers.values()
        )
        found[f"area_at_{per_cent}"] = masks[0].share
    return found


def _notes(
    explanations: tuple[Explanation, Explanation],
    masks: tuple[Mask, Mask],
    labels: tuple[str, str],
) -> tuple[str, ...]:
    notes = [
        f"{label}: {mask.note}"
        for label, mask in zip(labels, masks, strict=True)
        if mask.note
    ]
    if not any(mask.area for mask in masks):
        notes.append("both masks are empty: their IoU is undefined")
    elif all(mask.area == mask.on.size for mask in masks):
        notes.append("both masks cover the frame: their excess is undefined")
    scores = [one.target.score for one in explanations]
    if scores[0] != scores[1]:
        notes.append(f"scores differ: {scores[0]} and {scores[1]} of the same class")
    return tuple(notes)


# ---- many images


@dataclass(frozen=True, eq=False)
class Packed:
    """A mask in an eighth of its bytes: ``bits`` (ceil(h * w / 8),) uint8."""

    bits: Array
    area: int
    shape: tuple[int, ...]


def pack(on: Array) -> Packed:
    """Pack a mask (h, w) bool."""
    return Packed(np.packbits(on), int(np.count_nonzero(on)), on.shape)


def permutation_p(
    a: Sequence[Packed], b: Sequence[Packed], seed: int = 0, draws: int = DRAWS
) -> float:
    """One-sided p that masks of the same image agree more than masks of different
    images.

    Mask ``a`` of image i is laid over mask ``b`` of image pi(i); the statistic is the
    mean excess, in which an undefined one counts 0. Every permutation is counted up to
    7 images, else ``draws`` seeded ones and the identity. Above 1,000 images
    permutations stay within random groups of at most 1,000, which keeps the test exact
    (they form a group) and memory at 8 MB a table of excesses. All masks are of one
    frame.
    """
    if len({mask.shape for mask in (*a, *b)}) > 1:
        raise ConsilienceError(
            "masks of different frames cannot be exchanged between images"
        )
    rng = np.random.default_rng(seed)
    count = len(a)
    mixed = (
        rng.permutation(count) if count > PERMUTATIONS_AT_ONCE else np.arange(count)
    )
    sums: Any = 0.0
    for group in np.array_split(mixed, math.ceil(count / PERMUTATIONS_AT_ONCE)):
        table = excess_matrix(
            [a[i] for i in group.tolist()], [b[i] for i in group.tolist()]
        )
        sums = sums + _null_sums(table, rng, draws)
    return share_as_extreme(sums, float(sums[0]), "greater", scale=count)


def smallest_p(images: int, draws: int = DRAWS) -> float:
    """The smallest p that `permutation_p` can give for so many images."""
    return (
        1 / math.factorial(images) if images <= ALL_PERMUTATIONS else 1 / (draws + 1)
    )


def _null_sums(table: Array, rng: np.random.Generator, draws: int) -> Array:
    """Sums of ``table`` (n, n) along permutations, the identity first."""
    count = len(table)
    rows = np.arange(count)
    if count <= ALL_PERMUTATIONS:
        every: Array = table[
            rows, np.array(list(itertools.permutations(range(count))))
        ].sum(axis=1)
        return every
    sums = [np.array([table.trace()])]
    chunk = max(1, 1_000_000 // count)
    for start in range(0, draws, chunk):
        drawn = rng.permuted(np.tile(rows, (min(chunk, draws - start), 1)), axis=1)
        sums.append(table[rows, drawn].sum(axis=1))
    return np.concatenate(sums)


def excess_matrix(a: Sequence[Packed], b: Sequence[Packed]) -> Array:
    """Excess (n, m) of every mask of ``a`` over every one of ``b``; 0 where it is
    undefined (both empty, or both full).
    """
    pixels = math.prod(a[0].shape)
    areas = [
        np.array([mask.area for mask in masks], dtype=np.float64) for masks in (a, b)
    ]
    shared = _intersections(
        np.stack([mask.bits for mask in a]),
        np.stack([mask.bits for mask in b]),
        pixels,
    )
    expected = expected_matrix(pixels, *areas)
    with np.errstate(invalid="ignore", divide="ignore"):
        above = (shared / (areas[0][:, None] + areas[1] - shared) - expected) / (
            1 - expected
        )
    return np.where(np.isfinite(above), above, 0.0)


def _intersections(a: Array, b: Array, pixels: int) -> Array:
    """Shared pixels (n, m) of packed masks, as products of blocks of at most 32 MB
    each.
    """
    kind: Any = (
        np.float32 if pixels < 1 << 24 else np.float64
    )  # whole numbers are exact up to there
    block = max(1, 8_000_000 // pixels)
    shared = np.empty((len(a), len(b)))
    for i in range(0, len(a), block):
        left: Array = np.unpackbits(a[i : i + block], axis=1).astype(kind)
        for j in range(0, len(b), block):
            shared[i : i + block, j : j + block] = (
                left @ np.unpackbits(b[j : j + block], axis=1).astype(kind).T
            )
    return shared


EXACT_PAIRS = 256


def expected_matrix(pixels: int, a: Array, b: Array) -> Array:
    """`expected_iou` for all pairs of areas ``a`` (n,) and ``b`` (m,).

    Exact for up to 256 different pairs. Beyond, the first moments of the hypergeometric
    distribution give it with a proven error below 1e-6 (1e-8 for masks of 1 % of 224 x
    224 or more); pairs for which the proof fails are computed exactly.
    """
    (in_a, at_a), (in_b, at_b) = (
        np.unique(areas, return_inverse=True) for areas in (a, b)
    )
    if len(in_a) * len(in_b) <= EXACT_PAIRS:
        unique = np.array(
            [[expected_iou(pixels, int(x), int(y)) for y in in_b] for x in in_a]
        )
    else:
        unique, bound = expected_by_moments(pixels, in_a[:, None], in_b[None, :])
        for i, j in np.argwhere(~(bound < 1e-6)):
            unique[i, j] = expected_iou(pixels, int(in_a[i]), int(in_b[j]))
    return unique[np.ix_(at_a, at_b)]


def expected_by_moments(pixels: int, a: Array, b: Array) -> tuple[Array, Array]:
    """`expected_iou` of arrays of areas by a series round the mean overlap, with a
    bound on its error.

    With s = a + b, c = s - E X and d = X - E X: s / (s - X) = (s / c) (1 + d/c +
    d^2/c^2 + d^3/c^3) + s (d/c)^4 / (s - X). The remainder lies between 0 and s E d^4 /
    (c^4 max(a, b)), and E d^4 is at most that of sampling with replacement (Hoeffding
    1963, theorem 4), v + 3 v^2 with v its variance. A normal's fourth moment stands in
    for the remainder; it lies between the same two.
    """
    both, mean = a + b, a * b / pixels
    c = both - mean
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = mean * (pixels - a) * (pixels - b) / (pixels * (pixels - 1))
        third = (
            variance * (pixels - 2 * a) * (pixels - 2 * b) / (pixels * (pixels - 2))
        )
        series = (
            both / c * (1 + variance / c**2 + third / c**3 + 3 * variance**2 / c**4)
            - 1
        )
        v = mean * (1 - np.maximum(a, b) / pixels)
        bound = both * (v + 3 * v**2) / (c**4 * np.maximum(a, b))
    return series, bound


def compared(
    explanations: Sequence[Explanation],
    masks: Sequence[Mask],
    labels: Sequence[str],
    allow_mismatch: bool = False,
) -> list[PairAgreement]:
    """All pairs of the explanations of one image, in their order."""
    return [
        _pair(
            (explanations[i], explanations[j]),
            (masks[i], masks[j]),
            (labels[i], labels[j]),
            allow_mismatch=allow_mismatch,
        )
        for i, j in itertools.combinations(range(len(labels)), 2)
    ]


class Agreement:
    """Explanations of many images compared, one image at a time.

    Kept are the pairs and one packed mask per explainer and image (6 kB on 224 x 224),
    no maps. ``cutters`` is one cutter for all, or by explainer (its spelling or its
    name); ``seed`` is of the permutations and the bootstrap.
    """

    def __init__(
        self, cutters: Cutters = None, allow_mismatch: bool = False, seed: int = 0
    ) -> None:
        self.cutters, self.allow_mismatch, self.seed = cutters, allow_mismatch, seed
        self._pairs: list[PairAgreement] = []
        self._masks: dict[str, dict[str, Packed]] = {}
        self._models: dict[str, str] = {}

    @property
    def pairs(self) -> tuple[PairAgreement, ...]:
        """All pairs, image by image."""
        return tuple(self._pairs)

    def add(
        self,
        explanations: Sequence[Explanation],
        masks: Sequence[Mask] | None = None,
        labels: Sequence[str] | None = None,
    ) -> tuple[PairAgreement, ...]:
        """Hold all explanations of one image against each other; returns the new pairs.

        ``masks`` are given where they are cut already. ``labels`` name the explanations
        in the tables: their spelling unless given, with the model, mask or class where
        a spelling occurs twice. Nothing is kept of an image that raises
        `ConsilienceError`: mismatches, an image given twice, other weights than in the
        images before.
        """
        if not explanations:
            return ()
        sample = explanations[0].sample.name
        if any(sample in known for known in self._masks.values()):
            raise ConsilienceError(f"{sample}: this image was added before")
        cut = (
            list(masks)
            if masks is not None
            else [self._cutter(one).cut(one) for one in explanations]
        )
        named = list(labels) if labels is not None else _labels(explanations, cut)
        if not len(cut) == len(named) == len(explanations) or len(set(named)) < len(
            named
        ):
            raise ConsilienceError(
                f"{sample}: {len(explanations)} explanations need as many masks and different "
                f"labels"
            )
        pairs = self._compared(explanations, cut, named)
        kept = {
            label: (pack(mask.on), explanation.model_id)
            for label, explanation, mask in zip(named, explanations, cut, strict=True)
        }
        self.take(sample, pairs, kept)
        return tuple(pairs)

    def take(
        self,
        sample: str,
        pairs: Sequence[PairAgreement],
        masks: Mapping[str, tuple[Packed, str]],
    ) -> None:
        """Take in an image that was `compared` elsewhere; ``masks`` are by label packed,
        with the model's id.
        """
        for label, (mask, model) in masks.items():
            self._models.setdefault(label, model)
            self._masks.setdefault(label, {})[sample] = mask
        self._pairs += pairs

    def table(self) -> pd.DataFrame:
        """A row a pair and image; the columns are those of `Pair`."""
        return pd.DataFrame(
            [pair.row() for pair in self._pairs],
            columns=[item.name for item in fields(PairAgreement)],
        )

    def figure(self, pair: tuple[str, str] | None = None) -> Figure:
        """IoU of every image against its chance level, for one pair of explainers (the
        first unless given).
        """
        from consilience.show.figures import agreement_figure

        return agreement_figure(self.table(), self.summary(), pair)

    def _repr_html_(self) -> str:
        from consilience.show.figures import agreement_html

        return agreement_html(self)

    def summary(self) -> pd.DataFrame:
        """A row a pair of explainers over all images.

        ``images`` and, of them, the ``n`` with a defined IoU; means of IoU and excess
        with 95 % intervals and their method; ``share_p05``: of the images whose shift p
        could be at most .05, those where it is (NaN where there are none);
        ``p_images`` of `permutation_p` and ``p_holm``, adjusted for the
        number of pairs in this table. ``verdict`` is one of

        - ``shown``: better than chance, ``p_holm`` at most .05 and the mean excess
          above 0;
        - ``below``: worse than chance, the interval of the mean excess lies below 0
          (of equal values: flipping their signs has p at most .025);
        - ``untestable``: it could not have been shown, ``why`` is ``no-image``,
          ``one-image``, ``frames`` (of different size) or ``too-few``: then
          ``images_needed`` is how many could show it;
        - ``not-shown``: all others.

        ``tests`` is the size of the family, ``smallest_p`` the smallest p that these
        images could have, after Holm.
        """
        grouped = self._by_explainers()
        tests = [
            _Test.of(*self._exchangeable(pairs), self.seed)
            for pairs in grouped.values()
        ]
        adjusted = holm([test.p for test in tests])
        family = sum(not math.isnan(test.p) for test in tests)
        rows = [
            self._summary_row(pairs, test, float(p), family)
            for pairs, test, p in zip(grouped.values(), tests, adjusted, strict=True)
        ]
        return pd.DataFrame(rows, columns=SUMMARY)

    def _cutter(self, explanation: Explanation) -> Cutter:
        chosen = self.cutters
        if isinstance(chosen, Mapping):
            chosen = chosen.get(explanation.explainer, chosen.get(explanation.name))
        return build_cutter(chosen, explanation)

    def _compared(
        self,
        explanations: Sequence[Explanation],
        masks: Sequence[Mask],
        labels: Sequence[str],
    ) -> list[PairAgreement]:
        """All pairs, each in the order in which its explainers were first met."""
        known = list(self._masks)
        order = sorted(
            range(len(labels)),
            key=lambda i: (
                known.index(labels[i]) if labels[i] in known else len(known) + i
            ),
        )
        return [
            _pair(
                (explanations[i], explanations[j]),
                (masks[i], masks[j]),
                (labels[i], labels[j]),
                allow_mismatch=self.allow_mismatch,
                further="; ".join(
                    filter(
                        None,
                        (
                            self._other_weights(labels[k], explanations[k])
                            for k in (i, j)
                        ),
                    )
                ),
            )
            for i, j in itertools.combinations(order, 2)
        ]

    def _other_weights(self, label: str, explanation: Explanation) -> str:
        before = self._models.get(label, explanation.model_id)
        return (
            ""
            if before == explanation.model_id
            else f"{label} is of {before} in images before, here {explanation.model_id}"
        )

    def _by_explainers(self) -> dict[tuple[str, str], list[PairAgreement]]:
        grouped: dict[tuple[str, str], list[PairAgreement]] = {}
        for pair in self._pairs:
            grouped.setdefault((pair.a, pair.b), []).append(pair)
        return grouped

    def _exchangeable(
        self, pairs: Sequence[PairAgreement]
    ) -> tuple[list[Packed], list[Packed]]:
        """Masks of the images that have a defined excess, of pairs of the same two
        explainers.
        """
        kept = [pair for pair in pairs if not math.isnan(pair.excess)]
        return [self._masks[pair.a][pair.sample] for pair in kept], [
            self._masks[pair.b][pair.sample] for pair in kept
        ]

    def _summary_row(
        self, pairs: Sequence[PairAgreement], test: _Test, p_holm: float, family: int
    ) -> dict[str, Any]:
        columns = {
            key: _defined(pairs, key)
            for key in ("iou", "expected_iou", "excess", "spearman")
        }
        overlap, above = (
            mean_interval(columns[key], seed=self.seed) for key in ("iou", "excess")
        )
        expected = _mean(columns["expected_iou"])
        worse = _below_chance(columns["excess"], above)
        verdict, why = _verdict(test, p_holm, family, above.mean, worse)
        needed = images_needed(family) if why == "too-few" else 0
        return {
            "a": pairs[0].a,
            "b": pairs[0].b,
            "images": len(pairs),
            "n": overlap.n,
            **{f"iou_{key}": getattr(overlap, key) for key in INTERVAL},
            "expected_mean": expected,
            **{f"excess_{key}": getattr(above, key) for key in INTERVAL},
            "share_p05": _share_shown(pairs),
            "spearman_mean": _mean(columns["spearman"]),
            "p_images": test.p,
            "p_holm": p_holm,
            "tests": family,
            "smallest_p": min(test.smallest * family, 1.0),
            "verdict": verdict,
            "why": why,
            "images_needed": needed,
            "mismatch": "; ".join(
                dict.fromkeys(pair.mismatch for pair in pairs if pair.mismatch)
            ),
        }


INTERVAL = ("mean", "low", "high", "method")
SUMMARY = [
    *("a", "b", "images", "n"),
    *(f"iou_{key}" for key in INTERVAL),
    "expected_mean",
    *(f"excess_{key}" for key in INTERVAL),
    *("share_p05", "spearman_mean", "p_images", "p_holm", "tests", "smallest_p"),
    *("verdict", "why", "images_needed", "mismatch"),
]


def agree(
    explanations: Iterable[Explanation],
    cutters: Cutters = None,
    allow_mismatch: bool = False,
    seed: int = 0,
) -> Agreement:
    """Hold explanations against each other: all pairs of every image.

    Images are told apart by their sample's name.

    >>> agree([]).table().empty
    True
    """
    by_sample: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        by_sample.setdefault(explanation.sample.name, []).append(explanation)
    if by_sample and all(len(group) < 2 for group in by_sample.values()):
        raise ConsilienceError(
            f"nothing to compare: one explanation each of {', '.join(by_sample)}"
        )
    found = Agreement(cutters, allow_mismatch, seed)
    for group in by_sample.values():
        found.add(group)
    return found


def _labels(explanations: Sequence[Explanation], masks: Sequence[Mask]) -> list[str]:
    """Spellings; those that occur twice with what tells them apart: the model, else the
    mask, else the class, else a number.
    """
    spelled = [one.explainer for one in explanations]
    labels = list(spelled)
    for name in dict.fromkeys(spelled):
        same = [i for i, other in enumerate(spelled) if other == name]
        telling: list[list[str]] = [
            [f" @ {explanations[i].model_id}" for i in same],
            [f" cut by {masks[i].rule}" for i in same],
            [f" for {_target(explanations[i])}" for i in same],
            [f" ({place + 1})" for place in range(len(same))],
        ]
        if len(same) > 1:
            ends = next(ends for ends in telling if len(set(ends)) == len(ends))
            for i, end in zip(same, ends, strict=True):
                labels[i] = name + end
    return labels


# ---- the verdict


@dataclass(frozen=True)
class _Test:
    """The permutation of images for one pair of explainers, or why there is none."""

    p: float
    smallest: float
    why: str = ""

    @staticmethod
    def of(a: list[Packed], b: list[Packed], seed: int) -> _Test:
        if len(a) < 2:
            return _Test(math.nan, math.nan, "one-image" if a else "no-image")
        if len({mask.shape for mask in a}) > 1:
            return _Test(math.nan, math.nan, "frames")
        return _Test(permutation_p(a, b, seed), smallest_p(len(a)))


def _verdict(
    test: _Test, p_holm: float, family: int, mean: float, worse: bool
) -> tuple[str, str]:
    if math.isnan(test.p):
        return ("below" if worse else "untestable"), test.why
    if p_holm <= ALPHA and mean > 0:
        return "shown", ""
    if worse:
        return "below", ""
    if test.smallest * family > ALPHA:
        return "untestable", "too-few"
    return "not-shown", ""


def _below_chance(excesses: Array, interval: Interval) -> bool:
    """Whether the mean excess is below 0: its interval is; of equal values, which have
    none, signs are flipped at the same level.
    """
    if excesses.size > 1 and (excesses == excesses[0]).all():
        return sign_flip_test(excesses, alternative="less") <= ALPHA / 2
    return interval.high < 0


def images_needed(tests: int) -> int:
    """How many images it takes until ``tests`` permutation tests, corrected by Holm,
    could show anything.
    """
    return next(n for n in range(2, 100) if smallest_p(n) * tests <= ALPHA)


def _defined(pairs: Sequence[PairAgreement], key: str) -> Array:
    values = np.array([getattr(pair, key) for pair in pairs], dtype=np.float64)
    return values[np.isfinite(values)]


def _share_shown(pairs: Sequence[PairAgreement]) -> float:
    """Of the images in which shifting could show an overlap, those in which it does."""
    tests = [ShiftTest(pair.p, pair.positions) for pair in pairs]
    able = [test.p <= ALPHA for test in tests if test.can_show]
    return _mean(np.array(able, dtype=np.float64))


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else math.nan
