"""Faithfulness by a curve: what becomes of the score while the image is removed, or
brought back, pixel after pixel.

Insertion, deletion, pixel flipping, region perturbation and IROF differ in what is
edited at a time, in what stands in its place, and in what is made of the curve. ROAD,
which fills in what the surroundings suggest, has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from consilience.metrics.perturbation import (
    POINTS_FIDELITY,
    EditPlan,
    Probing,
    ScoreKind,
    area,
    check_gap,
    first,
    map_of,
    open_ended,
    options_turn,
    ranks,
    read_as,
    removal_stops,
)
from consilience.perturb.fills import BlurFill, Fill, Inverted, NeutralFill, NoiseFill
from consilience.perturb.superpixels import Segmenter, Slic, segment
from consilience.registry import metrics, option
from consilience.types import Array, Explanation, Fidelity, Model, Score, View

RISE = ("insertion:step=224,fill=rise-blur", "deletion:step=224,fill=neutral")
"""Insertion and deletion as RISE's code has them for a frame of 224 pixels: as many
pixels at a time as a row has.
"""
RemovalOrder = Literal["morf", "lerf"]

# ---- insertion and deletion


@dataclass(frozen=True)
class _Curve(Probing):
    """What insertion and deletion share."""

    needs: ClassVar[frozenset[str]] = frozenset()
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    cost: ClassVar[str] = "steps + 1 passes"
    reveal: ClassVar[bool] = False
    steps: int = option(100, help="steps of equal size over the whole image", least=1)
    step: int = option(0, help="pixels a step instead; 0 for equal steps", least=0)
    fill: Fill = option(
        NeutralFill(), kind="fill", help="what stands where the image is not shown"
    )
    normalised: bool = option(
        False, help="scale by what the image and its fill score"
    )
    gap: float = option(
        0.05,
        help="least difference of the two at which that is done, in units of the score",
        least=0,
    )
    reads: ScoreKind = option(
        "probability",
        help="which number of the class is followed: probability or logit",
    )
    seed: int = option(
        0, help="seed of the order among pixels of equal value", least=0
    )
    fidelity: Fidelity = option("exact", help=POINTS_FIDELITY)

    def __post_init__(self) -> None:
        open_ended(self, self.normalised or self.reads == "logit")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them; raises `NotApplicable` where there is no gap
        to normalise by.
        """
        values = map_of(view, explanation)
        stop = removal_stops(values.size, self.steps, self.step)
        keeps = first(ranks(values, self.seed), stop, self.reveal)
        shares = stop / values.size
        target = read_as(explanation.target, self.reads)
        return EditPlan(
            keeps,
            self.fill.image(view, None),
            target,
            lambda scores: self._finish(np.stack([shares, scores])),
            affine=True,
        )

    def _finish(self, curve: Array) -> Score:
        value = auc = area(curve)
        ends = [float(curve[1, 0]), float(curve[1, -1])]
        empty, full = ends if self.reveal else reversed(ends)
        if self.normalised:
            check_gap(
                full - empty, self.gap, "the score of the image less that of the fill"
            )
            value = (auc - empty) / (full - empty)
        return Score(
            value,
            curve,
            {"auc": auc, "full": full, "empty": empty, "passes": curve.shape[1]},
        )


@metrics.register("insertion")
@dataclass(frozen=True)
class Insertion(_Curve):
    """Insertion (Petsiuk, Das & Saenko, BMVC 2018, section 4): the mean score while the
    image is brought back.

    ``AUC = int_0^1 f(x_s) ds`` by trapezoids, x_s the fill with the share s of the
    pixels shown, those that the map ranks first. A good map brings the score up early.
    Pixels of equal value come in a random order, the same for all methods.
    ``normalised=true`` gives ``(AUC - f(fill)) / (f(x) - f(fill))``, 0 for a score that
    stays down to the last step and 1 for one that is up at the first; it may leave [0,
    1], and is not applicable where ``f(x) - f(fill)`` is below ``gap``.

    RISE's own numbers need its blur and its step:
    ``insertion:step=224,fill=rise-blur``. The curve is (2, n): the share shown, the
    score. Known failures: an edited image is none that the model was trained on (Hooker
    et al. 2019), and the fill can turn the order of methods (Tomsett et al. 2020); hold
    several fills against each other.
    """

    label: ClassVar[str] = "Insertion"
    higher_is_better: ClassVar[bool] = True
    reveal: ClassVar[bool] = True
    fill: Fill = option(
        BlurFill(), kind="fill", help="what the image is brought back on"
    )


@metrics.register("deletion")
@dataclass(frozen=True)
class Deletion(_Curve):
    """Deletion (Petsiuk, Das & Saenko, BMVC 2018, section 4): the mean score while the
    image is removed.

    ``AUC = int_0^1 f(x_s) ds`` by trapezoids, x_s the image with the share s of its
    pixels replaced by the fill, those that the map ranks first. A good map brings the
    score down early. Ties, ``normalised`` and the curve are those of insertion.

    RISE's own numbers: ``deletion:step=224,fill=neutral``, for its zeros come after
    normalisation. Known failures: scattered holes are adversarial, so that a map of
    noise can delete faster than one of the object (Petsiuk et al. 2018; Hooker et al.
    2019), and the fill can turn the order of methods (Tomsett et al. 2020).
    """

    label: ClassVar[str] = "Deletion"
    higher_is_better: ClassVar[bool] = False


# ---- pixel flipping and region perturbation


@metrics.register("pixel-flipping")
@dataclass(frozen=True)
class PixelFlipping(Probing):
    """Pixel flipping (Bach et al., PLoS ONE 2015, section "Pixel-flipping"): the mean
    score while pixels are inverted.

    Pixels are flipped in the order of the map, first those that speak most for the
    class; ``value = int_0^share f(x_s) ds / share`` by trapezoids. The paper flips the
    sign of pixels coded from -1 to 1: ``fill=inverted``. ``order=lerf`` flips those
    that speak least first; then higher is better. The curve is (2, steps + 1): the
    share flipped, the score.

    A pixel is flipped with all its channels. Quantus flips elements of channels, ranked
    by a map that it repeats for each: its numbers are those of whole pixels only where
    its step is a multiple of three and no two pixels tie. Known failures as of
    deletion.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Pixel flipping"
    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    cost: ClassVar[str] = "steps + 1 passes"
    steps: int = option(100, help="steps of equal size", least=1)
    share: float = option(
        1.0,
        help="share of the pixels that is flipped in all, above 0 and up to 1",
        above=0,
        most=1,
    )
    order: RemovalOrder = option(
        "morf", help="most relevant first (morf), or least relevant first (lerf)"
    )
    fill: Fill = option(Inverted(), kind="fill", help="what a pixel becomes")
    reads: ScoreKind = option(
        "probability",
        help="which number of the class is followed: probability or logit",
    )
    seed: int = option(
        0, help="seed of the order among pixels of equal value", least=0
    )
    fidelity: Fidelity = option("exact", help=POINTS_FIDELITY)

    def __post_init__(self) -> None:
        open_ended(self, self.reads == "logit")
        options_turn(self, higher_is_better=self.order == "lerf")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        stop = removal_stops(values.size, self.steps, share=self.share)
        keeps = first(
            ranks(values if self.order == "morf" else -values, self.seed), stop
        )
        shares = stop / values.size
        target = read_as(explanation.target, self.reads)
        return EditPlan(
            keeps,
            self.fill.image(view, None),
            target,
            lambda scores: _mean_height(np.stack([shares, scores])),
            affine=True,
        )


def _mean_height(curve: Array) -> Score:
    return Score(
        area(curve), curve, {"full": float(curve[1, 0]), "passes": curve.shape[1]}
    )


@metrics.register("region-perturbation")
@dataclass(frozen=True)
class RegionPerturbation(Probing):
    """Region perturbation, AOPC (Samek et al., TNNLS 2017, equation 12): the mean loss
    while patches are perturbed.

    ``AOPC = 1 / (L + 1) sum_{k=0}^{L} (f(x_0) - f(x_k))``, x_k the image with its k
    first patches perturbed, in the order of the sum of the map over them. The paper
    perturbs 100 patches of 9 x 9 pixels with uniform noise. Patches lie side by side
    from the top left; those at the borders may be smaller, and where there are fewer
    than ``regions``, all are perturbed. ``order=lerf`` takes the least relevant first;
    then lower is better. The curve is (2, L + 1): patches perturbed, the score.

    Quantus gives the losses from k = 1 on, to be averaged by the user, and cuts its
    patches with the image in the middle of a padded one. Known failures as of deletion;
    and patches cut through what belongs together.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Region perturbation"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    cost: ClassVar[str] = "regions + 1 passes"
    regions: int = option(100, help="how many patches are perturbed", least=1)
    patch: int = option(9, help="side of a patch in pixels", least=1)
    order: RemovalOrder = option(
        "morf", help="most relevant first (morf), or least relevant first (lerf)"
    )
    fill: Fill = option(NoiseFill(), kind="fill", help="what a patch becomes")
    reads: ScoreKind = option(
        "probability",
        help="which number of the class is followed: probability or logit",
    )
    seed: int = option(
        0, help="seed of the order among patches of equal relevance", least=0
    )
    fidelity: Fidelity = option("exact", help=POINTS_FIDELITY)

    def __post_init__(self) -> None:
        open_ended(self, self.reads == "logit")
        options_turn(self, higher_is_better=self.order == "morf")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        patches = patches_of((values.shape[0], values.shape[1]), self.patch)
        sums = np.bincount(patches.ravel(), weights=values.ravel())
        rank = ranks(sums if self.order == "morf" else -sums, self.seed)[patches]
        stop = np.arange(min(self.regions, len(sums)) + 1)
        target = read_as(explanation.target, self.reads)
        return EditPlan(
            first(rank, stop),
            self.fill.image(view, None),
            target,
            lambda scores: _aopc(np.stack([stop, scores])),
            affine=True,
        )


def patches_of(frame: tuple[int, int], side: int) -> Array:
    """Labels (h, w) of patches of ``side`` pixels, row after row from the top left."""
    down, across = (np.arange(length) // side for length in frame)
    labels: Array = down[:, None] * (across[-1] + 1) + across[None, :]
    return labels


def _aopc(curve: Array) -> Score:
    full = float(curve[1, 0])
    return Score(
        full - float(curve[1].mean()), curve, {"full": full, "passes": curve.shape[1]}
    )


# ---- IROF


@metrics.register("irof")
@dataclass(frozen=True)
class Irof(Probing):
    """IROF, iterative removal of features (Rieger & Hansen 2020, section 3): the area
    above the score while superpixels go.

    ``IROF = 1 - int_0^1 f(x_s) / f(x) ds`` by trapezoids, x_s the image with the share
    s of its superpixels replaced, in the order of the map's mean over each. Superpixels
    spare it the adversarial dust of pixels. The paper replaces by the mean colour of
    the data set, here what the network takes as zero. Not applicable where ``f(x)`` is
    below ``gap``. At most 1; below 0 where the score rises on the way. The curve is (2,
    superpixels + 1): the share removed, ``f(x_s) / f(x)``.

    Quantus leaves out the image itself and sums over superpixels instead of taking
    their mean, so that its number grows with how many there are. Known failure: it is
    only as good as the superpixels, and one that holds the whole object gives every map
    the same number.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "IROF"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-np.inf, 1.0)
    cost: ClassVar[str] = "superpixels + 1 passes"
    segments: Segmenter = option(
        Slic(), kind="segmenter", help="how the image is cut into superpixels"
    )
    fill: Fill = option(NeutralFill(), kind="fill", help="what a superpixel becomes")
    gap: float = option(
        0.05, help="least score of the image at which it is divided by", above=0
    )
    reads: ScoreKind = option(
        "probability",
        help="which number of the class is followed: probability or logit",
    )
    seed: int = option(
        0, help="seed of the order among superpixels of equal relevance", least=0
    )
    fidelity: Fidelity = option("exact", help=POINTS_FIDELITY)

    def __post_init__(self) -> None:
        open_ended(self, self.reads == "logit")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them; raises `NotApplicable` where the score is too
        small to divide by.
        """
        values = map_of(view, explanation)
        segments = segment(self.segments, view.rgb)
        means = np.bincount(segments.ravel(), weights=values.ravel()) / np.bincount(
            segments.ravel()
        )
        stop = np.arange(len(means) + 1)
        target = read_as(explanation.target, self.reads)
        keeps = first(ranks(means, self.seed)[segments], stop)
        return EditPlan(
            keeps,
            self.fill.image(view, segments),
            target,
            lambda scores: self._finish(stop / len(means), scores),
            affine=True,
        )

    def _finish(self, shares: Array, scores: Array) -> Score:
        full = float(scores[0])
        check_gap(full, self.gap, "the score of the image")
        curve = np.stack([shares, scores / full])
        return Score(
            1 - area(curve),
            curve,
            {"full": full, "superpixels": len(scores) - 1, "passes": len(scores)},
        )
