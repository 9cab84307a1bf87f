"""Planted marks: the network's own features decide by a mark that was laid over the
image, so that a map of that decision has a right place.

`evaluation.marked` fits the decision and makes the images; ``planted-mark`` is the score
of a map on one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from consilience.metrics.localisation import mass_inside, part_of, place_of
from consilience.registry import marks, metrics, option
from consilience.types import (
    ConsilienceError,
    Explanation,
    Model,
    NotApplicable,
    Score,
    View,
)

DECOY = "decoy"
"""The mask of the mark that does not decide."""


@metrics.register("planted-mark")
@dataclass(frozen=True)
class PlantedMark:
    """Share of the positive map on a planted mark that decides.

    Two marks are laid over an image of one's own at random; the network's last layer
    is fitted, on its frozen features, to tell images with one of them from images
    without it, whatever the other does. That the mark decides is shown by intervention
    on each image. ``sum_mark max(M, 0) / sum max(M, 0)``; a map without knowledge has
    the mark's area, the ``chance`` in ``facts``; ``decoy`` is the share on the other
    mark, which is as easy to see and does not decide (each mark is the decoy of half of
    the images). `NotApplicable` for other images, and for a map without a positive value.

    The options say which images an evaluation makes of those of a run; a score of one
    at hand does not ask them.

    0 to 1, no passes.
    """

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Planted mark"
    cost: ClassVar[str] = "no passes"
    unit: ClassVar[str] = "marked image"
    first: str = option(
        "logo:size=0.25", help="one mark, as `consilience list marks` has them"
    )
    second: str = option("barcode:size=0.3", help="the other mark")
    count: int = option(40, help="at most so many marked images", least=2)

    def __post_init__(self) -> None:
        if marks.build(self.first) == marks.build(self.second):
            raise ConsilienceError(
                f"planted-mark: two different marks are asked for; got {self.first} twice"
            )

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The share on the mark that decides."""
        masks = explanation.sample.masks
        if DECOY not in masks:
            raise NotApplicable(code="no-planted-mark", image=explanation.sample.name)
        on = place_of(explanation, "masks").on
        other = explanation.geometry.to_input(masks[DECOY].astype(bool))
        values = part_of(explanation.values, "positive")
        share = mass_inside(values, on, explanation.explainer)
        return Score(
            share,
            facts={
                "chance": float(on.mean()),
                "decoy": float(values[other].sum() / values.sum()),
            },
        )
