"""Faithfulness by one masked image: what the score loses or gains where only what the
map shows is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from consilience.metrics.explained_again import explainer_of, in_frame
from consilience.metrics.perturbation import EditPlan, Probing, map_of, read_as
from consilience.perturb.fills import Black, Fill
from consilience.perturb.probe import Grids
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    ClassTarget,
    Explanation,
    Model,
    NotApplicable,
    Score,
    Target,
    View,
)


def mask_of(values: Array) -> Array:
    """The map as a soft mask in [0, 1]: its positive part, scaled from least to
    largest; a flat positive map hides nothing.

    Raises `NotApplicable` where no value is positive.
    """
    positive = np.maximum(values, 0)
    low, high = positive.min(), positive.max()
    if high <= 0:
        raise NotApplicable(code="no-positive-value")
    scaled: Array = (
        (positive - low) / (high - low) if high > low else np.ones_like(positive)
    )
    return scaled


@dataclass(frozen=True)
class _Masked(Probing):
    """What the metrics of one masked image share: the scores of the masked image and of
    the image itself.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    cost: ClassVar[str] = "2 passes"
    fill: Fill = option(Black(), kind="fill", help="what stands where the mask is 0")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Two edits, of which the second is the image; raises `NotApplicable` where
        there is no probability or mask.
        """
        mask = mask_of(map_of(view, explanation))
        target = _probability(explanation.target)

        def finish(scores: Array) -> Score:
            whole = float(scores[1])
            masked = (
                whole if mask.min() == 1 else float(scores[0])
            )  # the same image: rounding is no change
            value, facts = self._valued(masked, whole, mask, model, view, explanation)
            return Score(
                value, facts={"masked": masked, "whole": whole, "passes": 2, **facts}
            )

        keep = torch.from_numpy(np.stack([mask, np.ones_like(mask)])).float()
        return EditPlan(Grids(keep), self.fill.image(view, None), target, finish)

    def _valued(
        self,
        masked: float,
        whole: float,
        mask: Array,
        model: Model,
        view: View,
        explanation: Explanation,
    ) -> tuple[float, dict[str, Any]]:
        return self.of(masked, whole), {}

    def of(self, masked: float, whole: float) -> float:
        """The number of two probabilities."""
        raise NotImplementedError


def _probability(target: Target) -> Target:
    found = read_as(target, "probability")
    if isinstance(found, ClassTarget) and found.score != "probability":
        raise NotApplicable(code="no-probability", target=target.name)
    return found


@metrics.register("average-drop")
@dataclass(frozen=True)
class AverageDrop(_Masked):
    """Average drop (Chattopadhay et al., WACV 2018, section 4.1): the share of the
    probability that is lost under the mask.

    ``max(0, Y - O) / Y``, Y the probability of the class for the image, O for the image
    times the map; averaged over images it is the paper's number (there in per cent).
    The mask is the map's positive part scaled to [0, 1].

    Known failure: it can be gamed. A map that is the same everywhere hides nothing and
    has the best value there is (Poppi et al. 2021); read it with average gain and
    beside the constant control.
    """

    label: ClassVar[str] = "Average drop"
    higher_is_better: ClassVar[bool] = False

    def of(self, masked: float, whole: float) -> float:
        """``max(0, Y - O) / Y``; raises `NotApplicable` where Y is 0."""
        if whole <= 0:
            raise NotApplicable(code="probability-zero")
        return max(0.0, whole - masked) / whole


@metrics.register("increase")
@dataclass(frozen=True)
class Increase(_Masked):
    """Increase in confidence (Chattopadhay et al., WACV 2018, section 4.1): 1 where the
    probability rises under the mask.

    ``1[Y < O]``, Y the probability of the class for the image, O for the image times
    the map; its mean over images is the paper's share. The mask is the map's positive
    part scaled to [0, 1].

    Known failure: a rise by a hair counts as one by half, and where the model is sure
    of the image there is none to be had.
    """

    label: ClassVar[str] = "Increase in confidence"
    higher_is_better: ClassVar[bool] = True
    binary: ClassVar[bool] = True

    def of(self, masked: float, whole: float) -> float:
        """``1[Y < O]``."""
        return float(whole < masked)


@metrics.register("average-gain")
@dataclass(frozen=True)
class AverageGain(_Masked):
    """Average gain (Zhang et al., Opti-CAM, CVIU 2024, section 4): the share of the
    missing probability won under the mask.

    ``max(0, O - Y) / (1 - Y)``, Y the probability of the class for the image, O for the
    image times the map. It is the counterpart of average drop, in place of a count of
    rises. Not applicable where Y is 1. A map that is the same everywhere gains nothing.
    Known failure: a masked image that the model was never shown may score high for no
    good reason.
    """

    label: ClassVar[str] = "Average gain"
    higher_is_better: ClassVar[bool] = True

    def of(self, masked: float, whole: float) -> float:
        """``max(0, O - Y) / (1 - Y)``; raises `NotApplicable` where Y is 1."""
        if whole >= 1:
            raise NotApplicable(code="probability-one")
        return max(0.0, masked - whole) / (1 - whole)


@metrics.register("adcc")
@dataclass(frozen=True)
class Adcc(_Masked):
    """ADCC (Poppi et al., CVPRW 2021, equation 6): the harmonic mean of coherency, 1 -
    complexity and 1 - average drop.

    ``3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))``. Coherency is
    Pearson's correlation of the map with the map of the masked image, made by the same
    explainer with the same options and shifted to [0, 1]; complexity the mean of the
    map scaled to [0, 1]; drop that of average drop. 0 where one of the three is. Not
    applicable to a map that is the same everywhere, which correlates with nothing.
    Costs another explanation.

    Known failure: three numbers of different kinds in one hide which of them moved
    (they are in the facts), and a map that does not look at the image, as a centred
    blob, is perfectly coherent.
    """

    label: ClassVar[str] = "ADCC"
    higher_is_better: ClassVar[bool] = True
    cost: ClassVar[str] = "2 passes and 1 explanation"

    def _valued(
        self,
        masked: float,
        whole: float,
        mask: Array,
        model: Model,
        view: View,
        explanation: Explanation,
    ) -> tuple[float, dict[str, Any]]:
        keep = torch.from_numpy(mask).to(view.pixels)
        shown = replace(
            view, pixels=torch.lerp(self.fill.image(view, None), view.pixels, keep)
        )
        explainer = explainer_of(explanation)
        again = in_frame(
            explainer.explain(model, shown, explanation.target), shown, explainer
        )
        parts = {
            "coherency": _coherency(mask, np.maximum(again, 0)),
            "complexity": float(mask.mean()),
            "drop": AverageDrop(self.fill).of(masked, whole),
        }
        good = [parts["coherency"], 1 - parts["complexity"], 1 - parts["drop"]]
        value = 0.0 if min(good) <= 0 else 3 / sum(1 / part for part in good)
        return value, parts


def _coherency(mask: Array, again: Array) -> float:
    if np.ptp(mask) == 0 or np.ptp(again) == 0:
        raise NotApplicable(code="map-constant")
    return float(
        np.clip((1 + np.corrcoef(mask.ravel(), again.ravel())[0, 1]) / 2, 0, 1)
    )
