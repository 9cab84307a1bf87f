"""A closer look at a mark and a class: how much of it is enough, do maps show it, and which
images have it already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from consilience import api, images, progress, registry, stats
from consilience.diagnosis.shortcuts import in_full_passes, painted_ahead
from consilience.marks.painting import ELSEWHERE, Mark, Painted
from consilience.targets.classes import class_target
from consilience.types import Array, ConsilienceError, Model, NotApplicable, View

CENTRE = "centre"

# ---- how much of it


def doses_of(
    model: Model, views: Sequence[View], mark: Mark, index: int, seed: int
) -> pd.DataFrame:
    """A row a dose: ``option`` and ``value``; ``shift`` of the class against the plain
    images with a 95 % interval (``low``, ``high``); ``excess`` against the mark's first
    control of the same dose, with its own; ``became``, the share of images that became
    the class.
    """
    pixels = torch.cat([view.pixels for view in views])
    asked = [
        (name, value, replace(mark, **{name: value}))  # type: ignore[type-var]
        for name, values in mark.doses.items()
        for value in values
    ]

    def variants() -> Iterator[Tensor]:
        yield pixels
        for painted in painted_ahead([one for *_, one in asked], pixels, seed):
            yield painted.marked
            yield next(iter(painted.controls.values()))

    with progress.task("doses", (1 + 2 * len(asked)) * len(pixels)) as running:
        said = torch.cat(list(in_full_passes(model, variants(), running.advance)))
    plain, *others = said.numpy().reshape(1 + 2 * len(asked), len(pixels), -1)
    rows = []
    for (name, value, _), marked, held in zip(
        asked, others[::2], others[1::2], strict=True
    ):
        shift = stats.mean_interval(_of(marked, index) - _of(plain, index))
        excess = stats.mean_interval(_of(marked, index) - _of(held, index))
        became = (marked.argmax(1) == index) & (plain.argmax(1) != index)
        rows.append(
            {
                "option": name,
                "value": str(value),
                "shift": shift.mean,
                "shift_low": shift.low,
                "shift_high": shift.high,
                "excess": excess.mean,
                "low": excess.low,
                "high": excess.high,
                "became": float(became.mean()),
            }
        )
    return pd.DataFrame(rows)


def _of(scores: Array, index: int) -> Array:
    column: Array = scores[:, index].astype(np.float64)
    return column


# ---- what maps say of it


def maps_on_mark(
    model: Model,
    views: Sequence[View],
    mark: Mark,
    index: int,
    by: Sequence[str],
    seed: int,
) -> pd.DataFrame:
    """A row a method: the share of its positive map of the class that lies on the mark
    (``mass``), of a blob in the centre (``centre``), of the same method where the
    mark's pixels are scattered (``control``), the mark's own ``area``; the ``excess``
    of ``mass`` over the larger of the two with a 95 % interval, and how many images
    have a map.
    """
    target = class_target(model, index)
    pixels = torch.cat([view.pixels for view in views])
    painted = mark.paint(pixels, seed)
    control = next(iter(painted.controls.values()))
    rows = []
    with progress.task("maps of the mark", len(by) * len(views)) as running:
        for spec in by:
            explainer = api.resolve_explainer(model, spec)
            asked = api.read_as_explained(target, explainer)
            found = []
            for place, view in enumerate(views):
                shown = [
                    _mass(
                        model, explainer, view, one[place : place + 1], asked, painted
                    )
                    for one in (painted.marked, control)
                ]
                centre = _mass(
                    model,
                    registry.explainers.build(CENTRE),
                    view,
                    painted.marked[place : place + 1],
                    asked,
                    painted,
                )
                found.append((*shown, centre))
                running.advance()
            rows.append({"method": spec, **_mass_row(np.array(found), painted)})
    return pd.DataFrame(rows)


def _mass(
    model: Model,
    explainer: Any,
    view: View,
    pixels: Any,
    target: Any,
    painted: Painted,
) -> float:
    """The share of a positive map on the mark, NaN for a map without a positive value."""
    try:
        heat = explainer.explain(model, replace(view, pixels=pixels), target)
    except NotApplicable:
        return math.nan
    values = heat.values.detach().float().cpu()
    if tuple(values.shape) != painted.where.shape:
        values = images.enlarge(values, painted.where.shape)
    positive = values.clamp(min=0).numpy().astype(np.float64)
    whole = float(positive.sum())
    return float((positive * painted.where).sum()) / whole if whole > 0 else math.nan


def _mass_row(found: Array, painted: Painted) -> dict[str, float]:
    known = found[np.isfinite(found).all(1)]
    area = float(painted.where.mean())
    if not len(known):
        names = ("mass", "control", "centre", "excess", "low", "high")
        return {**dict.fromkeys(names, math.nan), "area": area, "images": 0}
    means = known.mean(0)
    rival = 1 if means[1] >= means[2] else 2
    excess = stats.mean_interval(known[:, 0] - known[:, rival])
    return {
        "mass": float(means[0]),
        "control": float(means[1]),
        "centre": float(means[2]),
        "excess": excess.mean,
        "low": excess.low,
        "high": excess.high,
        "area": area,
        "images": len(known),
    }


# ---- which images have it already

SCALES = (0.7, 1.0, 1.4)
LIKENESS = 0.75
"""Images below this correlation with the mark are not said to carry it."""


def carriers_of(
    views: Iterator[tuple[str, View]], mark: Mark, most: int = 8
) -> pd.DataFrame:
    """Images in which something looks like the mark, by template: the largest
    normalised cross-correlation over places and scales, ``likeness``, and the same of
    the mark's scattered pixels, ``control``.

    An image ``carries`` it where the likeness is at least .75 and above every control's.
    Rows are sorted, at most ``most``. An empty table for a mark without a shape of its
    own (it covers the frame).
    """
    rows, patterns = [], None
    for name, view in views:
        if patterns is None:
            patterns = _templates(mark, view)
            if patterns is None:
                return pd.DataFrame()
        luma = _luma(view.pixels)
        likeness, control = (
            max(_correlation(luma, template) for template in group)
            for group in patterns
        )
        carries = likeness >= LIKENESS and likeness > control
        rows.append((name, likeness, control, carries))
    table = pd.DataFrame(rows, columns=["image", "likeness", "control", "carries"])
    return table.sort_values("likeness", ascending=False, kind="stable").head(most)


def _templates(mark: Mark, view: View) -> tuple[list[Array], list[Array]] | None:
    """The mark on grey at several scales, cut to its own box, and its first control's."""
    shape = view.pixels.shape
    grey = torch.full((1, *shape[1:]), 0.5)
    painted = mark.paint(grey, 0)
    if ELSEWHERE not in painted.controls:
        return None
    rows, columns = (np.flatnonzero(painted.where.any(axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    found: tuple[list[Array], list[Array]] = ([], [])
    first = next(iter(painted.controls.values()))
    for group, made in zip(found, (painted.marked, first), strict=True):
        patch = _luma(made)[box]
        for scale in SCALES:
            size = tuple(max(6, round(side * scale)) for side in patch.shape)
            if all(
                side < whole for side, whole in zip(size, shape[-2:], strict=True)
            ):
                group.append(_resized(patch, (size[0], size[1])))
    return found if found[0] else None


def _resized(patch: Array, size: tuple[int, int]) -> Array:
    made = images.resize(patch[:, :, None].astype(np.float32), size)
    return made[:, :, 0].astype(np.float64)


def _luma(pixels: Any) -> Array:
    """Brightness (h, w) without its slow changes: what a template is compared by."""
    array = pixels[0].detach().cpu().double().numpy()
    weights = np.array([0.299, 0.587, 0.114]) if len(array) == 3 else None
    grey = array.mean(0) if weights is None else np.tensordot(weights, array, 1)
    return np.asarray(grey - gaussian_filter(grey, 8.0))


def _correlation(luma: Array, template: Array) -> float:
    """The largest normalised cross-correlation of a template over places."""
    from skimage.feature import match_template

    if template.std() < 1e-9:
        raise ConsilienceError("a mark of one brightness has no template")
    return float(match_template(luma, template).max())
