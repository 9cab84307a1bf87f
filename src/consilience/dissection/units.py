"""From a map to units: which units carry a class activation map, and which concepts
they detect.

Grad-CAM, HiResCAM and their kin are sums over a layer's channels. What a channel adds
to the map inside a mask, before any ReLU, as a share of the whole there, is its share
of the map; the shares are signed and sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from consilience import registry
from consilience.agreement.masks import default_cutter
from consilience.dissection.result import Dissection
from consilience.explainers.cam import LayerMaps
from consilience.images import enlarge
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Network,
    NotApplicable,
    Target,
    View,
)

EXACT = 1e-4
"""How far, as a part of the map's largest value, the sum over channels may lie from the
map.
"""
LEAST_SHARE = 1e-3
"""A sum this small beside its terms is what rounding leaves: shares of it mean nothing.
"""


# ---- what each channel adds


def channel_maps(
    model: Network, view: View, explainer: LayerMaps, target: Target, layer: str
) -> Tensor:
    """What every channel of ``layer`` adds to the map, (C, h, w), before any ReLU;
    their sum is the map.

    Each channel goes through the method alone. Raises `NotApplicable` where the parts
    do not add up to the whole: then the method mixes channels (as principal components
    do).
    """
    trace = model.trace(view.pixels, [layer], target)
    activations, gradients = trace.activations[layer], trace.gradients[layer]
    whole = explainer.map(activations, gradients)[0]
    parts = explainer.map(activations[0][:, None], gradients[0][:, None])
    if _apart(parts.sum(dim=0), whole):
        raise NotApplicable(
            code="no-channel-sum", explainer=registry.spell(explainer)
        )
    return parts


def _apart(sums: Tensor, whole: Tensor) -> bool:
    largest = float(whole.abs().max())
    return float((sums - whole).abs().max()) > EXACT * max(
        largest, torch.finfo(torch.float32).tiny
    )


def cell_weights(mask: Array, grid: tuple[int, int]) -> Tensor:
    """How much each cell of a map on ``grid`` counts inside a mask (h, w) once it is
    enlarged: float64, summing to its pixels.

    The transpose of the enlargement, so that a map's sum over the mask is the weighted
    sum of its cells.
    """
    cells = torch.zeros(grid, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        inside = (
            enlarge(cells, (mask.shape[0], mask.shape[1])) * torch.from_numpy(mask)
        ).sum()
    return torch.autograd.grad(inside, cells)[0]


# ---- shares


@dataclass(frozen=True, eq=False)
class Carried:
    """Which units carry a map. ``shares`` (C,) are signed and sum to 1; ``concepts``
    (C,) are "" where a unit detects none.

    ``cancelled`` is the sum of the shares' magnitudes: 1 where no unit speaks against
    the map, and where it is large the shares are small differences of large parts.
    ``area`` is the share of the frame that the mask keeps.
    """

    layer: str
    explainer: str
    shares: Array
    concepts: tuple[str, ...]
    known: pd.DataFrame
    area: float

    @property
    def cancelled(self) -> float:
        """Sum of the magnitudes of the shares."""
        return float(np.abs(self.shares).sum())

    def table(self) -> pd.DataFrame:
        """A row a unit, the largest magnitude first: ``unit``, ``share``, and what the
        dissection says of it.
        """
        order = np.argsort(-np.abs(self.shares), kind="stable")
        table = pd.DataFrame({"unit": order, "share": self.shares[order]})
        return table.merge(self.known, on="unit", how="left", sort=False)

    def by_concept(self) -> dict[str, float]:
        """Shares summed over the units of each concept, the largest first; "" collects
        the units without one.
        """
        sums: dict[str, float] = {}
        for concept, share in zip(self.concepts, self.shares, strict=True):
            sums[concept] = sums.get(concept, 0.0) + float(share)
        return dict(sorted(sums.items(), key=lambda item: -abs(item[1])))

    def sentence(self) -> str:
        """``68 % of this map: unit 412 wheel (41 %), unit 77 road (27 %)``, then by
        concept: the largest positive shares.
        """
        from consilience.show.words import units_words

        return units_words(self.as_dict())

    def as_dict(self, units: int = 5) -> dict[str, Any]:
        """Plain data of the largest shares, for a run's files."""
        rows = [
            {**row, "concept": self.concepts[row["unit"]]}
            for row in self.table().head(units).to_dict("records")
        ]
        made = {"layer": self.layer, "cancelled": self.cancelled, "area": self.area}
        return {**made, "units": rows, "concepts": self.by_concept()}


def carriers(
    model: Network,
    explanation: Explanation,
    dissection: pd.DataFrame,
    mask: Array | None = None,
) -> Carried:
    """The units that carry an explanation's map inside ``mask`` (h, w) bool; None means
    the mask agreement cuts from it.

    ``dissection`` is a table with ``layer``, ``unit`` and ``concept`` (and what else is
    known of a unit; where it has ``detector``, other units count as without a concept),
    of this model. Raises `NotApplicable` where the map is not a sum over the channels of
    one dissected layer, or sums to nothing inside the mask; `ConsilienceError` where
    model, explanation and dissection do not belong together.
    """
    explainer, layer = _sum_of_channels(explanation)
    _check_model(dissection, model)
    known = _of_layer(dissection, layer)
    if model.id != explanation.model_id:
        raise ConsilienceError(
            f"the explanation is of {explanation.model_id}; the model is {model.id}"
        )
    view = model.view(explanation.sample, explanation.provenance["view"])
    parts = channel_maps(model, view, explainer, explanation.target, layer)
    _check_same(parts, explainer, explanation)
    kept = default_cutter(explanation).cut(explanation).on if mask is None else mask
    shares = _shares(parts, kept)
    concepts = dict(zip(known["unit"], known["concept"], strict=True))
    named = tuple(_text(concepts.get(unit)) for unit in range(len(shares)))
    return Carried(
        layer, explanation.explainer, shares, named, known, float(kept.mean())
    )


def _sum_of_channels(explanation: Explanation) -> tuple[LayerMaps, str]:
    """The explainer as it was resolved, and its one layer."""
    explainer = registry.explainers.build(
        explanation.provenance.get("resolved", explanation.explainer)
    )
    if not isinstance(explainer, LayerMaps):
        raise NotApplicable(code="not-a-layer-map", explainer=explanation.name)
    if len(explainer.layer) != 1 or explainer.layer == ("auto",):
        layers = "+".join(explainer.layer)
        raise NotApplicable(
            code="several-layers", explainer=explanation.explainer, layers=layers
        )
    return explainer, explainer.layer[0]


def _check_model(dissection: pd.DataFrame, model: Network) -> None:
    """Refuse a table that says that it is of another model."""
    ids = set(dissection["model"]) if "model" in dissection else {model.id}
    if ids != {model.id}:
        raise NotApplicable(
            code="other-dissection", there=", ".join(sorted(ids)), model=model.id
        )


def _of_layer(dissection: pd.DataFrame, layer: str) -> pd.DataFrame:
    missing = [
        name for name in ("layer", "unit", "concept") if name not in dissection
    ]
    if missing:
        raise ConsilienceError(
            f"a dissection has a column {missing[0]}; this table has "
            f"{', '.join(map(str, dissection))}"
        )
    known = dissection[dissection["layer"] == layer]
    if known.empty:
        there = ", ".join(dict.fromkeys(map(str, dissection["layer"])))
        raise NotApplicable(code="other-layer", there=there, layer=layer)
    known = known.drop(columns=["layer", *({"model"} & set(known))]).drop_duplicates(
        "unit"
    )
    if "detector" in known:
        known = known.assign(
            concept=known["concept"].where(known["detector"].astype(bool), "")
        )
    return known


def _check_same(
    parts: Tensor, explainer: LayerMaps, explanation: Explanation
) -> None:
    """Refuse where the map made again is not the explanation's own."""
    again = parts.sum(dim=0)
    again = again.relu() if explainer.relu else again
    values = torch.from_numpy(explanation.values)
    if _apart(
        enlarge(again.cpu().float(), (values.shape[0], values.shape[1])), values
    ):
        name = explanation.sample.name
        raise ConsilienceError(
            f"the map of {name} made again is not the one at hand: another option or engine"
        )


def _shares(parts: Tensor, mask: Array) -> Array:
    """(C,) float64 of channel maps (C, h', w') inside a mask (h, w)."""
    weights = cell_weights(mask, (parts.shape[1], parts.shape[2]))
    sums = (parts.detach().cpu().double() * weights).sum(dim=(1, 2)).numpy()
    total, loud = float(sums.sum()), float(np.abs(sums).sum())
    if not mask.any() or abs(total) <= LEAST_SHARE * loud or total <= 0:
        raise NotApplicable(code="nothing-to-share")
    shares: Array = sums / total
    return shares


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def known_units(folder: str | Path, models: Sequence[str]) -> pd.DataFrame:
    """The units of a dissection on disk; raises `ConsilienceError` where it is of none
    of these models (their ids).
    """
    found = Dissection.read(folder)
    if found.model_id not in models:
        shown = ", ".join(dict.fromkeys(models))
        raise ConsilienceError(
            f"the dissection in {folder} is of {found.model_id}; images are shown to {shown}"
        )
    return found.table().assign(model=found.model_id)


def explain_by_units(
    model: Network, explanations: Sequence[Explanation], dissection: pd.DataFrame
) -> list[Explanation]:
    """The explanations with ``provenance["units"]``: which units carry each map, or why
    that cannot be told.
    """
    return [
        _with_units(model, explanation, dissection) for explanation in explanations
    ]


def _with_units(
    model: Network, explanation: Explanation, dissection: pd.DataFrame
) -> Explanation:
    try:
        said = carriers(model, explanation, dissection).as_dict()
    except NotApplicable as why:
        said = {"code": why.code, "facts": why.facts}
    except ConsilienceError as why:
        said = {"code": "said", "facts": {"text": str(why)}}
    return replace(explanation, provenance={**explanation.provenance, "units": said})
