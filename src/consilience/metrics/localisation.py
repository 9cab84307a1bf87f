"""Localisation: does the map lie on the object? Against boxes or masks of the explained
class.

A map that finds the object need not be faithful: a model may look elsewhere, and then
the honest map does too. Every score keeps in ``facts`` how much of the frame the object
covers (``object``), which is what a map without knowledge would score in most of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import ndimage

from consilience import stats
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    Box,
    Explanation,
    Model,
    NotApplicable,
    Score,
    View,
)

TruthSource = Literal["auto", "boxes", "masks"]
Part = Literal["positive", "absolute", "signed"]
ANYWHERE = np.ones((3, 3), dtype=bool)
"""Pixels touch at corners too."""

# ---- where the object is


@dataclass(frozen=True, eq=False)
class TruthPlace:
    """Where the explained class is: ``on`` (h, w) bool and ``boxes`` in the model's
    frame, ``by`` masks or boxes.
    """

    on: Array
    boxes: tuple[Box, ...]
    by: str

    @property
    def facts(self) -> dict[str, Any]:
        """What every score of the place keeps."""
        return {"truth": self.by, "object": float(self.on.mean())}


def place_of(explanation: Explanation, truth: TruthSource = "auto") -> TruthPlace:
    """The object of the explained class in the model's frame: its mask where the image
    has one, else all of its boxes.

    A mask is named by the class's number or its name; a box without a class is of the
    image's label. A pixel is in a box where its centre is. Raises `NotApplicable` where
    there is no object of that class, or the view does not show it.
    """
    masks, boxes = class_masks(explanation), boxes_of(explanation)
    if truth == "masks" or (truth == "auto" and masks):
        return _by_masks(explanation, masks)
    if not boxes:
        raise _nothing(explanation, truth)
    moved = [explanation.geometry.to_input(box) for box in boxes]
    seen = tuple(box for box in moved if box.x1 > box.x0 and box.y1 > box.y0)
    on = in_boxes(seen, explanation.values.shape)
    return TruthPlace(_seen(on, explanation), seen, "boxes")


def _by_masks(explanation: Explanation, masks: Sequence[Array]) -> TruthPlace:
    if not masks:
        raise _nothing(explanation, "masks")
    on = np.logical_or.reduce(
        [explanation.geometry.to_input(mask.astype(bool)) for mask in masks]
    )
    return TruthPlace(_seen(on, explanation), _round(on), "masks")


def class_masks(explanation: Explanation) -> list[Array]:
    """Masks (H, W) of the explained class, by its number or its name, in the image's
    frame.
    """
    known, target = explanation.sample.masks, explanation.target
    names = (
        (str(target.index), target.name)
        if target.index is not None
        else (target.name,)
    )
    return [known[name] for name in dict.fromkeys(names) if name in known]


def boxes_of(explanation: Explanation) -> list[Box]:
    """Boxes of the explained class in pixels of the image; one without a class is of
    the image's label.
    """
    wanted, label = explanation.target.index, explanation.sample.label
    if wanted is None:
        return []
    return [
        box
        for box in explanation.sample.boxes
        if (label if box.index is None else box.index) == wanted
    ]


def in_boxes(boxes: Sequence[Box], shape: tuple[int, ...]) -> Array:
    """Pixels (h, w) bool whose centre lies in a box."""
    on: Array = np.zeros(shape, dtype=bool)
    y, x = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    for box in boxes:
        on |= np.outer((y >= box.y0) & (y < box.y1), (x >= box.x0) & (x < box.x1))
    return on


def _seen(on: Array, explanation: Explanation) -> Array:
    if on.any():
        return on
    what = f"{explanation.target.index} {explanation.target.name}"
    raise NotApplicable(
        code="object-not-shown", image=explanation.sample.name, marked=what
    )


def _round(on: Array) -> tuple[Box, ...]:
    """Boxes round the connected parts of a mask."""
    return tuple(
        _box(found) for found in ndimage.find_objects(ndimage.label(on, ANYWHERE)[0])
    )


def _box(found: tuple[slice, slice]) -> Box:
    down, across = found
    return Box(
        None,
        float(across.start),
        float(down.start),
        float(across.stop),
        float(down.stop),
    )


def _nothing(explanation: Explanation, truth: TruthSource) -> NotApplicable:
    sample, target = explanation.sample, explanation.target
    classes = {
        str(sample.label if box.index is None else box.index) for box in sample.boxes
    }
    return NotApplicable(
        code=f"no-object-{truth}",
        image=sample.name,
        marked=f"{target.index} {target.name}",
        others=sorted(classes),
        masks=len(sample.masks),
    )


# ---- what the metrics share


def part_of(values: Array, part: Part) -> Array:
    """A map (h, w) in float64, signed as it is, its positive part, or its magnitude."""
    wide: Array = values.astype(np.float64)
    if part == "signed":
        return wide
    return np.abs(wide) if part == "absolute" else np.maximum(wide, 0.0)


def lot(explanation: Explanation, seed: int) -> np.random.Generator:
    """Random numbers of an image: the same for every method, other ones for every
    image.
    """
    return np.random.default_rng([seed, int(explanation.sample.digest, 16)])


def ordered(values: Array, rng: np.random.Generator) -> Array:
    """Pixels (h w,) from the largest value to the smallest, equal ones in random order."""
    order: Array = np.lexsort((rng.random(values.size), -values.ravel()))
    return order


def mass_inside(values: Array, on: Array, what: str) -> float:
    """Share of a map's sum that lies on the object; `NotApplicable` where the map sums
    to nothing.
    """
    total = float(values.sum())
    if not total > 0:
        raise NotApplicable(code="no-mass", what=what)
    return float(values[on].sum() / total)


class Located:
    """What all of these have in common: from 0 to 1, higher is better, and no passes."""

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = "no passes"


# ---- pointing


@metrics.register("pointing-game")
@dataclass(frozen=True)
class PointingGame(Located):
    """Pointing game (Zhang et al., IJCV 2018, section 5.1): 1 where the map's maximum
    is on the object, else 0.

    ``hit = 1[min_{q in object} |argmax_p M(p) - q| <= tolerance]``. The paper allows 15
    pixels of the image (``at=image``; its images, VOC and COCO, are about 500 wide);
    ``at=input`` counts pixels of the model's frame, where 15 of 224 are twice as much.
    Signed maps are taken as they are. Of several equal maxima one is drawn, the same
    for all methods that tie alike: a constant map then hits as often as a random point
    (to count any of them as a hit, as Quantus does, would make it perfect). ``facts``
    say how many were ``tied`` and which ``share`` of them would have hit.

    0 or 1, no passes.
    """

    binary: ClassVar[bool] = True
    label: ClassVar[str] = "Pointing game"
    tolerance: float = option(
        15.0, help="distance from the object that still counts, in pixels", least=0
    )
    at: Literal["image", "input"] = option(
        "image", help="whose pixels: the image's own, or the model's frame"
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )
    seed: int = option(0, help="seed of the draw between equal maxima", least=0)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """1 or 0."""
        place = place_of(explanation, self.truth)
        values = explanation.values
        tied = np.argwhere(values == values.max())
        drawn = int(lot(explanation, self.seed).integers(len(tied)))
        hits = self._hits(tied, explanation, place)
        facts = {
            "tied": len(tied),
            "share": float(hits.mean()),
            "point": tied[drawn].tolist(),
        }
        return Score(
            float(hits[drawn]),
            facts={
                **place.facts,
                **facts,
                "tolerance": f"{self.tolerance:g} px of the {self.at}",
            },
        )

    def _hits(
        self, points: Array, explanation: Explanation, place: TruthPlace
    ) -> Array:
        """Which points (n, 2) of the frame are near enough, (n,) bool."""
        boxes, masks = place.boxes, [place.on]
        if self.at == "image":
            points, boxes, masks = (
                on_image(points, explanation),
                tuple(boxes_of(explanation)),
                class_masks(explanation),
            )
        if place.by == "boxes":
            return near_boxes(points, boxes, self.tolerance)
        return near_mask(
            points,
            np.logical_or.reduce([mask.astype(bool) for mask in masks]),
            self.tolerance,
        )


def near_boxes(points: Array, boxes: Sequence[Box], tolerance: float) -> Array:
    """Which pixels (n, 2) row and column are at most ``tolerance`` from a pixel of a
    box; negative ones are outside.
    """
    near: Array = np.zeros(len(points), dtype=bool)
    for box in boxes:
        low, high = (
            np.ceil(np.array(edges) - 0.5)
            for edges in ((box.y0, box.x0), (box.y1, box.x1))
        )
        gaps = np.maximum(np.maximum(low - points, points - (high - 1)), 0.0)
        near |= ((gaps**2).sum(axis=1) <= tolerance**2) & bool((high > low).all())
    return near & (points >= 0).all(axis=1)


def near_mask(points: Array, on: Array, tolerance: float) -> Array:
    """The same for a mask (h, w): by a window round a single point, by the distance
    transform for several.
    """
    if len(points) > 1:
        near = (
            ndimage.distance_transform_edt(~on)[tuple(np.maximum(points, 0).T)]
            <= tolerance
        )
        return np.asarray(near & (points >= 0).all(axis=1))
    y, x = (int(part) for part in points[0])
    reach = int(tolerance)
    top, left = max(y - reach, 0), max(x - reach, 0)
    rows, columns = np.nonzero(
        on[top : max(y, 0) + reach + 1, left : max(x, 0) + reach + 1]
    )
    gaps = (rows + top - y) ** 2 + (columns + left - x) ** 2
    return np.array([y >= 0 and x >= 0 and bool((gaps <= tolerance**2).any())])


def on_image(points: Array, explanation: Explanation) -> Array:
    """Pixels (n, 2) of the image that the frame shows at ``points`` (n, 2), -1 where it
    shows no image.
    """
    height, width = explanation.geometry.image
    rows = explanation.geometry.to_input(np.arange(1, height + 1)[:, None])
    columns = explanation.geometry.to_input(np.arange(1, width + 1)[None, :])
    at = tuple(points.T)
    return np.stack([rows[at], columns[at]], axis=1) - 1


# ---- shares of the map


@metrics.register("energy")
@dataclass(frozen=True)
class Energy(Located):
    """Energy-based pointing game (Wang et al., Score-CAM, CVPR workshop 2020, section
    4.2): ``sum_{object} M / sum M``.

    The paper's maps have no negative values; of a signed map the positive part counts
    (``part=absolute`` takes magnitudes). A constant map scores the object's share of
    the frame. `NotApplicable` for a map without a positive value.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "Energy in object"
    part: Literal["positive", "absolute"] = option(
        "positive", help="of a signed map: its positive part, or its magnitude"
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The share of the map that is on the object."""
        place = place_of(explanation, self.truth)
        values = part_of(explanation.values, self.part)
        return Score(
            mass_inside(values, place.on, explanation.explainer), facts=place.facts
        )


@metrics.register("relevance-mass")
@dataclass(frozen=True)
class RelevanceMass(Energy):
    """Relevance mass accuracy (Arras, Osman & Samek, Information Fusion 2022, equation
    1): ``sum_{object} R / sum R``.

    The paper pools the colours to relevances that are not negative; here the map is one
    channel already, and its magnitude stands for that (``part=positive`` is `energy`).
    Quantus divides signed sums, which leave [0, 1] and can change sign.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "Relevance mass"
    part: Literal["absolute", "positive"] = option(
        "absolute", help="of a signed map: its magnitude, or its positive part"
    )


@metrics.register("relevance-rank")
@dataclass(frozen=True)
class RelevanceRank(Located):
    """Relevance rank accuracy (Arras, Osman & Samek 2022, equation 2): ``|top_K and
    object| / K`` with K the object's pixels.

    Pixels equal at rank K count by the share of them that is on the object, which is
    the mean over all orders of the tied: a constant map scores the object's share of
    the frame. ``part`` says what is ranked; signed values as they are, unless told.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "Relevance rank"
    part: Part = option(
        "signed",
        help="what is ranked: values as they are, their positive part, or their magnitude",
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The share of the K largest that is on the object."""
        place = place_of(explanation, self.truth)
        values, count = part_of(explanation.values, self.part), int(place.on.sum())
        cut = np.partition(values.ravel(), values.size - count)[values.size - count]
        above, tied = values > cut, values == cut
        left = count - int(above.sum())
        hits = int((above & place.on).sum()) + left * float(place.on[tied].mean())
        return Score(
            hits / count,
            facts={
                **place.facts,
                "tied": int(tied.sum()) if left < tied.sum() else 0,
            },
        )


# ---- overlap of a mask


@metrics.register("iou")
@dataclass(frozen=True)
class Iou(Located):
    """IoU of the object and of what a fixed cut leaves of the map: ``|S and object| /
    |S or object|``.

    ``by=area`` takes the largest ``at`` of the frame, equal pixels at the cut drawn at
    random, the same for all methods (``facts.tied`` says how many); ``by=maximum``
    takes what reaches ``at`` times the map's largest value, as CAM papers do (Zhou et
    al. 2016: .2), and is `NotApplicable` to a map without a positive value.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "IoU with object"
    at: float = option(
        0.2, help="part of the frame, or of the largest value", above=0, most=1
    )
    by: Literal["area", "maximum"] = option(
        "area", help="what is cut at: an area, or a share of the largest value"
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )
    seed: int = option(0, help="seed of the order of equal pixels", least=0)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The overlap."""
        place = place_of(explanation, self.truth)
        on, tied = self._cut(explanation)
        shared, either = int((on & place.on).sum()), int((on | place.on).sum())
        return Score(
            shared / either,
            facts={**place.facts, "area": float(on.mean()), "tied": tied},
        )

    def _cut(self, explanation: Explanation) -> tuple[Array, int]:
        values = explanation.values
        if self.by == "maximum":
            if not values.max() > 0:
                raise NotApplicable(
                    code="no-positive-cut", explainer=explanation.explainer
                )
            return values >= self.at * values.max(), 0
        return top_area(explanation, self.at, self.seed)


def top_area(explanation: Explanation, share: float, seed: int) -> tuple[Array, int]:
    """The largest ``share`` of the pixels as (h, w) bool, equal ones drawn, and how
    many were equal at the cut.
    """
    from consilience.agreement.masks import pixels_of, tied_at_cut

    values = explanation.values
    on: Array = np.zeros(values.size, dtype=bool)
    on[ordered(values, lot(explanation, seed))[: pixels_of(share, values.size)]] = (
        True
    )
    on = on.reshape(values.shape)
    return on, tied_at_cut(values, on)


@metrics.register("best-iou")
@dataclass(frozen=True)
class BestIou(Located):
    """The largest IoU that any threshold gives: ``max_t |{M >= t} and object| / |{M >=
    t} or object|``.

    An oracle bound: the threshold is chosen with the truth in hand, image by image, so
    no method reaches it in use. It says what the best cut could do; ``facts`` keep that
    ``threshold`` and its ``area``. A constant map has one cut, the whole frame.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "Best IoU (oracle bound)"
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The overlap at the best threshold."""
        place = place_of(explanation, self.truth)
        flat = explanation.values.ravel()
        order = np.argsort(-flat, kind="stable")
        sorted_values, hits = flat[order], np.cumsum(place.on.ravel()[order])
        ends = np.flatnonzero(
            np.append(sorted_values[1:] != sorted_values[:-1], True)
        )  # a cut never parts equal values
        overlap = hits[ends] / (ends + 1 + int(place.on.sum()) - hits[ends])
        best = int(overlap.argmax())
        facts = {
            "threshold": float(sorted_values[ends[best]]),
            "area": float((ends[best] + 1) / flat.size),
            "oracle": True,
        }
        return Score(float(overlap[best]), facts={**place.facts, **facts})


@metrics.register("auc")
@dataclass(frozen=True)
class Auc(Located):
    """Area under the pixels' ROC curve: how likely a pixel on the object has a larger
    value than one beside it.

    ``P(M_p > M_q) + P(M_p = M_q) / 2`` for p on and q off the object (Mann & Whitney
    1947), signed values as they are. A map without knowledge has .5, a constant one
    exactly. `NotApplicable` where the object fills the frame.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "Pixel AUC"
    part: Part = option(
        "signed",
        help="what is ranked: values as they are, their positive part, or their magnitude",
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The area."""
        place = place_of(explanation, self.truth)
        inside, outside = int(place.on.sum()), int((~place.on).sum())
        if not outside:
            raise NotApplicable(
                code="object-fills-frame", image=explanation.sample.name
            )
        ranks = stats.ranks(part_of(explanation.values, self.part))
        ranks = ranks.reshape(place.on.shape)
        wins = float(ranks[place.on].sum()) - inside * (inside + 1) / 2
        return Score(wins / (inside * outside), facts=place.facts)


# ---- boxes from maps


@metrics.register("max-box-acc")
@dataclass(frozen=True)
class MaxBoxAcc(Located):
    """MaxBoxAccV2 (Choe et al., CVPR 2020 and TPAMI 2022): how often a box cut from the
    map fits one of the object's boxes.

    The map is stretched to [0, 1]; at each threshold the connected parts (corners
    touch) of ``{M >= t}`` get tight boxes, and the best IoU of any of them with any
    true box is kept: ``Score.curve`` (T,), from which ``BoxAcc(t, d) = mean 1[IoU >=
    d]``. The data set's number is `gather`: ``mean_d max_t BoxAcc(t, d)``, one
    threshold for all. ``boxes=largest,delta=0.5`` is the first MaxBoxAcc, with the box
    of the largest part alone. ``Score.value`` of a single image lets it choose its own
    threshold, an oracle bound: the mean of the values is at least the data set's
    number. A flat map has one box, the frame. The authors' code first rounds maps to
    256 levels and compares ``>``; here the paper's ``>=`` on the values themselves.

    0 to 1, no passes.
    """

    label: ClassVar[str] = "MaxBoxAcc"
    thresholds: int = option(
        100, help="thresholds, evenly spaced from 0; the paper takes 1,000", least=1
    )
    delta: tuple[float, ...] = option(
        (0.3, 0.5, 0.7),
        help="IoU at which a box fits, joined by +; averaged over",
        above=0,
        most=1,
    )
    boxes: Literal["all", "largest"] = option(
        "all", help="boxes of every connected part, or of the largest alone"
    )
    truth: TruthSource = option(
        "auto", help="what marks the object: masks where there are, else boxes"
    )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The image's own bound, and the best IoU by threshold as its curve."""
        place = place_of(explanation, self.truth)
        curve = np.array(
            [
                best_fit(on_boxes, place.boxes)
                for on_boxes in self._boxes(explanation.values)
            ]
        )
        fits = curve.max() >= np.asarray(self.delta)
        return Score(
            float(fits.mean()),
            curve,
            {**place.facts, "oracle": True, "best": float(curve.max())},
        )

    def levels(self) -> Array:
        """The thresholds (T,), from 0 to below 1."""
        return np.arange(self.thresholds) / self.thresholds

    def _boxes(self, values: Array) -> Iterator[Array]:
        """At each threshold the boxes (n, 4) of what reaches it."""
        wide = values.astype(np.float64) - float(values.min())
        top = wide.max()
        scaled = wide / top if top > 0 else np.ones_like(wide)
        for level in self.levels():
            yield part_boxes(scaled >= level, self.boxes == "largest")

    def gather(self, scores: Sequence[Score]) -> Score:
        """The data set's number from its images' scores: the mean over delta of the
        best threshold's accuracy.

        ``curve`` (T,) is the accuracy by threshold, averaged over delta; ``facts`` the
        best threshold and accuracy by delta.
        """
        if not scores:
            raise NotApplicable(code="no-image-has-score")
        fits = np.stack([np.asarray(score.curve) for score in scores])
        by_delta = np.stack([(fits >= delta).mean(axis=0) for delta in self.delta])
        best = by_delta.argmax(axis=1)
        facts = {
            "n": len(scores),
            "threshold": {
                f"{delta:g}": float(self.levels()[at])
                for delta, at in zip(self.delta, best, strict=True)
            },
            "accuracy": {
                f"{delta:g}": float(row.max())
                for delta, row in zip(self.delta, by_delta, strict=True)
            },
        }
        return Score(float(by_delta.max(axis=1).mean()), by_delta.mean(axis=0), facts)


def part_boxes(on: Array, largest_only: bool) -> Array:
    """Tight boxes (n, 4) x0, y0, x1, y1 of the connected parts of a mask; of equally
    large ones the first.
    """
    labels, count = ndimage.label(on, ANYWHERE)
    found = ndimage.find_objects(labels)
    if largest_only and count > 1:
        found = [found[int(np.bincount(labels.ravel())[1:].argmax())]]
    return np.array(
        [
            [across.start, down.start, across.stop, down.stop]
            for down, across in found
        ],
        dtype=np.float64,
    )


def best_fit(boxes: Array, truth: Sequence[Box]) -> float:
    """The largest IoU of any of ``boxes`` (n, 4) with any true box."""
    best = 0.0
    for box in truth:
        low, high = (
            np.maximum(boxes[:, :2], [box.x0, box.y0]),
            np.minimum(boxes[:, 2:], [box.x1, box.y1]),
        )
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + (box.x1 - box.x0) * (
            box.y1 - box.y0
        )
        best = max(best, float((shared / (areas - shared)).max(initial=0.0)))
    return best
