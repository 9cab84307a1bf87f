"""What a dissection found: counts by unit and concept, the label of every unit, and
tables of them.

NetDissect's words are kept in its CSV: ``unit`` from 1, ``label``, ``score``, and for
every category ``-label``, ``-truth``, ``-activation``, ``-intersect`` and ``-iou``.
Everywhere else units count from 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from consilience import files
from consilience.files import (
    json_ready,
    read_json,
    read_table,
    spreadsheet_safe,
    write_bytes,
    write_table,
)
from consilience.registry import unknown
from consilience.types import Array, ConsilienceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISSECTION_SCHEMA = 1
MANIFEST, UNITS, SCORES, TOP, CONCEPTS = (
    "dissection.json",
    "units.parquet",
    "scores.parquet",
    "top.parquet",
    "concepts.parquet",
)


# ---- what is known of concepts


@dataclass(frozen=True)
class ConceptFacts:
    """A concept and what the set has of it.

    ``pixels`` on the label grid, ``prevalence`` their share of all pixels.
    ``ceiling`` is the largest IoU that the sizes of the units' masks allow
    (`largest_iou`), of the unit whose size fits best. ``eligible`` says whether units
    may be labelled with it, ``why`` what stands against it.
    """

    index: int
    name: str
    category: str
    number: int
    images: int
    pixels: int
    prevalence: float
    ceiling: float
    eligible: bool
    why: str = ""


def largest_iou(unit_pixels: Any, concept_pixels: Any) -> Array:
    """The largest IoU of masks of so many pixels: one inside the other; 0 where one is
    empty. Arrays are broadcast.
    """
    smaller = np.minimum(unit_pixels, concept_pixels).astype(np.float64)
    larger = np.maximum(unit_pixels, concept_pixels)
    bound: Array = np.divide(
        smaller, larger, out=np.zeros_like(smaller), where=larger > 0
    )
    return bound


def concept_facts(
    concepts: Sequence[Any],
    pixels: Array,
    images: Array,
    unit_pixels: Array,
    *,
    area: int,
    least: int,
    threshold: float,
) -> tuple[ConceptFacts, ...]:
    """Facts of `Concept`s from their pixels and images (C,), and the pixels of every
    unit in images that count for the concept's category (U, C); ``area`` is the number
    of pixels of the whole set.
    """
    ceilings = largest_iou(unit_pixels, pixels[None, :]).max(axis=0, initial=0.0)
    facts = []
    for concept in concepts:
        place = concept.index
        shown, ceiling = int(images[place]), float(ceilings[place])
        why = ""
        if shown < least:
            why = f"in {shown} images; {least} are needed"
        elif ceiling <= threshold:
            why = f"cannot be detected: its IoU is at most {ceiling:.3f}"
        facts.append(
            ConceptFacts(
                place,
                concept.name,
                concept.category,
                concept.number,
                shown,
                int(pixels[place]),
                int(pixels[place]) / area,
                ceiling,
                shown >= least and bool(concept.name),
                why,
            )
        )
    return tuple(facts)


# ---- a layer


@dataclass(frozen=True, eq=False)
class NullResult:
    """A layer under label stacks permuted between images.

    ``p`` (U,) = (1 + b) / (1 + P): the share of permutations in which the unit's best
    IoU, over all eligible concepts, is at least as high as without. ``q`` (U,) are
    Benjamini and Hochberg's within the layer. ``expected_iou`` (U,) is the mean of that
    best IoU, ``expected_detectors`` the mean number of units over the threshold.
    ``alternatives`` (U) are the concepts that could as well be the unit's label: its
    own, and the fewest that are best in 95 % of resamples of the images.
    """

    p: Array
    q: Array
    expected_iou: Array
    expected_detectors: float
    alternatives: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One layer: ``grid`` of its maps (None for a vector), and by unit what
    `Dissection` reads.

    ``thresholds`` (U,) float32: a unit's mask is where its enlarged map is above;
    ``intersections`` and ``unions`` (U, C) and ``unit_pixels`` (U, K) int64 in pixels
    of the label grid; ``top_images`` (U, T) indices of images, the highest first, -1
    where there is none, with the maxima ``top_activations`` (U, T) float32.
    """

    layer: str
    grid: tuple[int, int] | None
    thresholds: Array
    intersections: Array
    unions: Array
    unit_pixels: Array
    top_images: Array
    top_activations: Array
    null: NullResult | None = None

    @property
    def units(self) -> int:
        """How many."""
        return len(self.thresholds)

    @cached_property
    def iou(self) -> Array:
        """Intersection over union (U, C); 0 where there is neither."""
        zero = np.zeros(self.unions.shape)
        return np.divide(
            self.intersections, self.unions, out=zero, where=self.unions > 0
        )


# ---- the whole


@dataclass(frozen=True, eq=False)
class Dissection:
    """Layers of one model compared with one concept set.

    A unit is a detector where its best IoU is over ``threshold``; it is significant
    where its q is at most ``level``. ``facts`` say how all was made; ``random`` is the
    same network with random weights, where that was asked for.
    """

    model_id: str
    model_spec: str | None
    concepts_id: str
    concepts_spec: str
    concepts: tuple[ConceptFacts, ...]
    categories: tuple[str, ...]
    images: tuple[str, ...]
    layers: tuple[LayerResult, ...]
    threshold: float = 0.04
    level: float = 0.05
    facts: Mapping[str, Any] = field(default_factory=dict)
    random: Dissection | None = None

    def layer(self, name: str) -> LayerResult:
        """A layer by name."""
        known = {layer.layer: layer for layer in self.layers}
        if name not in known:
            raise ConsilienceError(unknown("layer", name, known))
        return known[name]

    # -- labels

    def best(self, layer: str, category: str | None = None) -> tuple[Array, Array]:
        """Best eligible concept (U,) of each unit, -1 where none is hit, and its IoU
        (U,); of one category or of all.

        Of concepts with equal IoU the one that comes first in the set.
        """
        fit = [
            one.eligible and category in (None, one.category) for one in self.concepts
        ]
        iou = np.where(fit, self.layer(layer).iou, 0.0)
        if not len(fit):
            return np.full(len(iou), -1), np.zeros(len(iou))
        found = iou.argmax(axis=1)
        scores = np.take_along_axis(iou, found[:, None], axis=1)[:, 0]
        return np.where(scores > 0, found, -1), scores

    def _name(self, index: int) -> str:
        return self.concepts[index].name if index >= 0 else ""

    def _category(self, index: int) -> str:
        return self.concepts[index].category if index >= 0 else ""

    def figure(self, layer: str | None = None) -> Figure:
        """The units of a layer (the first unless given) that detect something, counted
        by concept.
        """
        from consilience.show.figures import dissection_figure

        return dissection_figure(self, self.layer(layer) if layer else self.layers[0])

    def _repr_html_(self) -> str:
        from consilience.show.figures import dissection_html

        return dissection_html(self)

    # -- tables

    def table(self) -> pd.DataFrame:
        """A row a unit.

        ``layer``, ``unit``, ``concept``, ``category``, ``iou``, ``detector``, ``p``,
        ``q``, ``significant``, ``alternatives`` (names joined by "; "), ``ceiling``,
        ``expected_iou``, ``threshold``, and for every category its best concept and
        IoU. ``p`` and ``q`` are NaN where no null was made.
        """
        return pd.concat(
            [self._rows(layer) for layer in self.layers], ignore_index=True
        )

    def _rows(self, layer: LayerResult) -> pd.DataFrame:
        found, scores = self.best(layer.layer)
        nan = np.full(layer.units, math.nan)
        null = layer.null
        q = null.q if null else nan
        rows = pd.DataFrame(
            {
                "layer": layer.layer,
                "unit": np.arange(layer.units),
                "concept": [self._name(one) for one in found],
                "category": [self._category(one) for one in found],
                "iou": scores,
                "detector": scores > self.threshold,
                "p": null.p if null else nan,
                "q": q,
                "significant": q <= self.level,
                "alternatives": self._alternatives(layer),
                "ceiling": self._ceilings(layer, found),
                "expected_iou": null.expected_iou if null else nan,
                "threshold": layer.thresholds,
            }
        )
        for category in self.categories:
            own, iou = self.best(layer.layer, category)
            rows[f"{category}_concept"], rows[f"{category}_iou"] = (
                [self._name(one) for one in own],
                iou,
            )
        return rows

    def _ceilings(self, layer: LayerResult, found: Array) -> Array:
        """The largest IoU (U,) that each unit's own size allows with its concept."""
        ceilings = np.full(layer.units, math.nan)
        for unit in np.flatnonzero(found >= 0):
            concept = self.concepts[found[unit]]
            category = self.categories.index(concept.category)
            own = layer.unit_pixels[unit, category]
            ceilings[unit] = largest_iou(own, concept.pixels)
        return ceilings

    def _alternatives(self, layer: LayerResult) -> list[str]:
        if layer.null is None:
            return [""] * layer.units
        return [
            "; ".join(self._name(one) for one in several)
            for several in layer.null.alternatives
        ]

    def detectors(self, layer: str | None = None) -> pd.DataFrame:
        """The rows of `table` whose IoU is over the threshold, of one layer or of all."""
        rows = self.table()
        return rows[
            rows["detector"] & ((rows["layer"] == layer) | (layer is None))
        ].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """A row a layer: units, detectors, their distinct concepts, detectors expected
        by chance, significant units and their concepts, and detectors by category.
        """
        table = self.table()
        return pd.DataFrame(
            [
                self._summed(layer, table[table["layer"] == layer.layer])
                for layer in self.layers
            ]
        )

    def _summed(self, layer: LayerResult, rows: pd.DataFrame) -> dict[str, Any]:
        over, sure = rows[rows["detector"]], rows[rows["significant"]]
        return {
            "layer": layer.layer,
            "units": layer.units,
            "detectors": len(over),
            "unique_detectors": _distinct(over),
            "expected_detectors": layer.null.expected_detectors
            if layer.null
            else math.nan,
            "significant": len(sure),
            "unique_significant": _distinct(sure),
            "both": int((rows["detector"] & rows["significant"]).sum()),
            **{
                category: int((over["category"] == category).sum())
                for category in self.categories
            },
        }

    def headline(self, layer: str) -> str:
        """How many units detect a concept, and how many would by chance."""
        from consilience.show.words import dissection_headline

        return dissection_headline(self.counts(layer))

    def counts(self, layer: str) -> dict[str, Any]:
        """Units of a layer, how many are over the threshold, how many would be by
        chance, and how many are significant (None where no null was made).
        """
        found, null = self.layer(layer), self.layer(layer).null
        over = int((self.best(layer)[1] > self.threshold).sum())
        return {
            "layer": layer,
            "units": found.units,
            "detectors": over,
            "expected": null.expected_detectors if null else None,
            "significant": self._significant(layer) if null else None,
        }

    def _significant(self, layer: str) -> int:
        rows = self.table()
        return int(rows.loc[rows["layer"] == layer, "significant"].sum())

    def concept_table(self) -> pd.DataFrame:
        """A row a concept: ``concept``, ``category``, images, pixels, prevalence,
        ceiling, eligible, why.
        """
        return pd.DataFrame([asdict(one) for one in self.concepts]).rename(
            columns={"name": "concept"}
        )

    def top(self, layer: str | None = None) -> pd.DataFrame:
        """The images on which each unit is highest: ``layer``, ``unit``, ``rank``,
        ``image``, ``index``, ``activation``.
        """
        chosen = self.layers if layer is None else (self.layer(layer),)
        return pd.concat([self._top(one) for one in chosen], ignore_index=True)

    def _top(self, layer: LayerResult) -> pd.DataFrame:
        units, ranks = np.nonzero(layer.top_images >= 0)
        index = layer.top_images[units, ranks]
        return pd.DataFrame(
            {
                "layer": layer.layer,
                "unit": units,
                "rank": ranks,
                "image": [self.images[one] for one in index],
                "index": index,
                "activation": layer.top_activations[units, ranks],
            }
        )

    def netdissect(self, layer: str) -> pd.DataFrame:
        """The layer in NetDissect's columns, the highest score first.

        ``unit`` from 1, ``category``, ``label``, ``score``, and for every category
        ``-label``, ``-truth``, ``-activation``, ``-intersect`` and ``-iou``.
        """
        found, (best, scores) = self.layer(layer), self.best(layer)
        rows = {
            "unit": np.arange(found.units) + 1,
            "category": [self._category(one) for one in best],
            "label": [self._name(one) for one in best],
            "score": scores,
        }
        for place, category in enumerate(self.categories):
            own, iou = self.best(layer, category)
            rows[f"{category}-label"] = [self._name(one) for one in own]
            rows[f"{category}-truth"] = [
                self.concepts[one].pixels if one >= 0 else 0 for one in own
            ]
            rows[f"{category}-activation"] = found.unit_pixels[:, place]
            rows[f"{category}-intersect"] = np.where(
                own >= 0, found.intersections[np.arange(found.units), own], 0
            )
            rows[f"{category}-iou"] = iou
        return pd.DataFrame(rows).sort_values(
            "score", ascending=False, kind="stable", ignore_index=True
        )

    # -- on disk

    def write(self, folder: str | Path) -> Path:
        """Everything into a folder: tables as Parquet, a CSV a layer in NetDissect's
        columns, the manifest last.
        """
        into = files.place(folder)
        write_table(into / UNITS, self.table())
        write_table(into / CONCEPTS, self.concept_table())
        write_table(into / TOP, self.top())
        write_table(
            into / SCORES,
            pd.concat([_scores(layer) for layer in self.layers], ignore_index=True),
        )
        for layer in self.layers:
            text = io.StringIO()
            spreadsheet_safe(self.netdissect(layer.layer)).to_csv(
                text, index=False, quoting=csv.QUOTE_MINIMAL
            )
            write_bytes(into / f"{layer.layer}.csv", text.getvalue().encode())
        if self.random is not None:
            self.random.write(into / "random")
        manifest = json.dumps(json_ready(self._manifest()), allow_nan=False).encode()
        write_bytes(into / MANIFEST, manifest)
        return into

    def _manifest(self) -> dict[str, Any]:
        return {
            "schema": DISSECTION_SCHEMA,
            **{
                key: getattr(self, key)
                for key in ("model_id", "model_spec", "concepts_id", "concepts_spec")
            },
            **{
                key: getattr(self, key)
                for key in ("categories", "images", "threshold", "level", "facts")
            },
            "counts": [self.counts(layer.layer) for layer in self.layers],
            "layers": [_described(layer) for layer in self.layers],
            "random": self.random is not None,
        }

    @staticmethod
    def read(folder: str | Path) -> Dissection:
        """What `write` wrote."""
        file = files.place(folder) / MANIFEST
        try:
            told = read_json(file)
        except ConsilienceError as error:
            raise ConsilienceError(f"{folder} holds no dissection: {error}") from None
        if told.get("schema") != DISSECTION_SCHEMA:
            raise ConsilienceError(
                f"{file} has schema {told.get('schema')!r}; this version reads "
                f"{DISSECTION_SCHEMA}"
            )
        tables = {
            name: read_table(files.place(folder) / name)
            for name in (UNITS, SCORES, TOP, CONCEPTS)
        }
        rows = tables[CONCEPTS].rename(columns={"concept": "name"}).to_dict("records")
        concepts = tuple(
            ConceptFacts(**{str(key): value for key, value in row.items()})
            for row in rows
        )
        layers = tuple(
            _restored(one, tables, concepts, told["categories"])
            for one in told["layers"]
        )
        random = (
            Dissection.read(files.place(folder) / "random")
            if told["random"]
            else None
        )
        return Dissection(
            told["model_id"],
            told["model_spec"],
            told["concepts_id"],
            told["concepts_spec"],
            concepts,
            tuple(told["categories"]),
            tuple(told["images"]),
            layers,
            told["threshold"],
            told["level"],
            told["facts"],
            random,
        )


def _distinct(rows: pd.DataFrame) -> int:
    return len(rows[["concept", "category"]].drop_duplicates())


# ---- to and from disk


def _scores(layer: LayerResult) -> pd.DataFrame:
    """A row a unit and concept that share a pixel."""
    units, concepts = np.nonzero(layer.intersections)
    return pd.DataFrame(
        {
            "layer": layer.layer,
            "unit": units,
            "concept": concepts,
            "intersection": layer.intersections[units, concepts],
            "union": layer.unions[units, concepts],
            "iou": layer.iou[units, concepts],
        }
    )


def _described(layer: LayerResult) -> dict[str, Any]:
    null = layer.null
    return {
        "layer": layer.layer,
        "grid": layer.grid,
        "units": layer.units,
        "top": layer.top_images.shape[1],
        "unit_pixels": layer.unit_pixels.tolist(),
        "expected_detectors": null.expected_detectors if null else None,
        "alternatives": null.alternatives if null else None,
    }


def _restored(
    told: dict[str, Any],
    tables: Mapping[str, pd.DataFrame],
    concepts: tuple[ConceptFacts, ...],
    categories: list[str],
) -> LayerResult:
    mine = {
        name: rows[rows["layer"] == told["layer"]]
        for name, rows in tables.items()
        if name != CONCEPTS
    }
    units = mine[UNITS].sort_values("unit")
    pixels = np.array(told["unit_pixels"], dtype=np.int64).reshape(told["units"], -1)
    intersections = np.zeros((told["units"], len(concepts)), dtype=np.int64)
    place = mine[SCORES]["unit"].to_numpy(), mine[SCORES]["concept"].to_numpy()
    intersections[place] = mine[SCORES]["intersection"].to_numpy()
    columns = [categories.index(one.category) for one in concepts]
    unions = (
        pixels[:, columns]
        + np.array([one.pixels for one in concepts])[None, :]
        - intersections
    )
    top, heights = _tops(mine[TOP], told["units"], told["top"])
    grid = tuple(told["grid"]) if told["grid"] else None
    cuts = units["threshold"].to_numpy(np.float32)
    return LayerResult(
        told["layer"],
        grid,
        cuts,
        intersections,
        unions,
        pixels,
        top,
        heights,
        _null(told, units),
    )


def _tops(rows: pd.DataFrame, units: int, count: int) -> tuple[Array, Array]:
    top, heights = (
        np.full((units, count), -1, dtype=np.int64),
        np.full((units, count), -np.inf, dtype=np.float32),
    )
    place = rows["unit"].to_numpy(), rows["rank"].to_numpy()
    top[place], heights[place] = (
        rows["index"].to_numpy(),
        rows["activation"].to_numpy(),
    )
    return top, heights


def _null(told: dict[str, Any], units: pd.DataFrame) -> NullResult | None:
    if told["expected_detectors"] is None:
        return None
    p, q, expected = (
        units[name].to_numpy(float) for name in ("p", "q", "expected_iou")
    )
    return NullResult(
        p,
        q,
        expected,
        told["expected_detectors"],
        tuple(tuple(one) for one in told["alternatives"]),
    )
