"""Explaining again: the map that the same method gives of another image, another class
or another network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from consilience import images, progress, registry
from consilience.metrics.similarity import MapSimilarity, alike
from consilience.types import (
    Array,
    ConsilienceError,
    Explainer,
    Explanation,
    Heat,
    Model,
    NotApplicable,
    Target,
    View,
)

Case = tuple[View, Target]
NOISE = range(1000, 1010)
"""Seeds of the random maps that draw the line of chance: far from those that people
take, as no map is random to itself.
"""


def explainer_of(explanation: Explanation) -> Explainer:
    """The explainer that made it, with what ``auto`` became; `NotApplicable` where it
    is not registered here.

    A control that shows the map of another class is not a method of its own, and is not
    made again.
    """
    if "another" in explanation.provenance:
        raise NotApplicable(code="another-class-map")
    spelled = str(explanation.provenance.get("resolved") or explanation.explainer)
    try:
        explainer: Explainer = registry.explainers.build(spelled)
    except ConsilienceError as error:
        raise NotApplicable(
            code="cannot-run-again", explainer=explanation.explainer, error=str(error)
        ) from None
    return explainer


def explained_maps(
    explainer: Explainer, model: Model, cases: Iterable[Case], total: int, label: str
) -> Iterator[Array]:
    """Maps (h, w) float32 of images and targets, in the model's frame, one after the
    other.

    ``model.batch`` images are explained at a time where the explainer takes several,
    else one: no more are alive. ``total`` is how many there are, for whoever listens to
    `progress` under ``label``. A map that is not finite is `NotApplicable`.
    """
    many = getattr(explainer, "explain_batch", None)
    waiting = iter(cases)
    with progress.task(label, total) as running:
        while part := list(
            islice(waiting, max(1, model.batch) if many is not None else 1)
        ):
            views, targets = zip(*part, strict=True)
            heats = (
                many(model, views, targets)
                if many is not None
                else [explainer.explain(model, *part[0])]
            )
            for heat, view in zip(heats, views, strict=True):
                yield in_frame(heat, view, explainer)
            running.advance(len(part))


def in_frame(heat: Heat, view: View, explainer: Explainer) -> Array:
    """A heat's values (h, w) float32 in the frame of the image, enlarged as every
    explanation is.
    """
    values = heat.values.detach().float().cpu()
    frame = (view.pixels.shape[-2], view.pixels.shape[-1])
    if not bool(values.isfinite().all()):
        raise NotApplicable(
            code="again-not-finite", explainer=registry.spell(explainer)
        )
    if tuple(values.shape) != frame:
        values = images.enlarge(values, frame)
    array: Array = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    return array


def chance_similarity(
    explanation: Explanation, view: View, by: MapSimilarity, magnitude: bool = False
) -> dict[str, float]:
    """The line that a random map would give: similarity of the map and of ten
    ``random`` controls, mean and spread.
    """
    controls = [registry.explainers.build(f"random:seed={seed}") for seed in NOISE]
    noise = [
        in_frame(one.explain(None, view, explanation.target), view, one)
        for one in controls
    ]
    found = [alike(explanation.values, values, by, magnitude) for values in noise]
    return {
        "random": float(np.mean(found)),
        "random_sd": float(np.std(found, ddof=1)),
    }


def needs_module(model: Model, name: str) -> Any:
    """The model as an opened network, or `NotApplicable` for one that only scores."""
    if "module" not in model.can:
        raise NotApplicable(code="needs-module", name=name, model=model.id)
    return model
