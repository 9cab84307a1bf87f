"""Which pixels of which concept does each unit cover: the counts of Network Dissection
(Bau et al., CVPR 2017, section 2.1).

A unit's mask is its map enlarged to the label grid and cut at its own threshold. A map
enlarged by weights that sum to 1 is nowhere larger than itself, so only the units of an
image whose maximum passes their threshold are enlarged; their masks (units x pixels)
times the image's labels (pixels x labels) are the intersections.

Memory: intersections and unit pixels (units x concepts and categories, int64), and
`CHUNK` masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from consilience.dissection.concepts import ConceptSet, Labels
from consilience.types import Array, ConsilienceError

Upsample = Literal["half-pixel", "align_corners", "netdissect"]
Union = Literal["paper", "lite"]
CHUNK = 64


# ---- masks


def unit_masks(
    maps: Tensor,
    thresholds: Tensor,
    size: tuple[int, int],
    upsample: Upsample = "half-pixel",
) -> Tensor:
    """Where maps (n, h, w), enlarged bilinearly to ``size``, are above ``thresholds``
    (n,): (n, height, width) bool.

    ``half-pixel``: cells and pixels are areas whose centres are compared.
    ``align_corners``: the centres of the corners coincide. ``netdissect``: cell i
    stands at pixel i height / h, as the receptive fields of a padded network have it in
    the published code.
    """
    return _above(maps, thresholds, size, upsample) > 0


def _above(
    maps: Tensor, thresholds: Tensor, size: tuple[int, int], upsample: Upsample
) -> Tensor:
    """Enlarged maps less their thresholds (n, height, width).

    The threshold is taken off first: a plateau of exactly that height stays exactly 0.
    """
    less = maps - thresholds[:, None, None]
    down = _weights(maps.shape[1], size[0], upsample).to(less)
    across = _weights(maps.shape[2], size[1], upsample).to(less)
    return down @ (less @ across.T)


@cache
def _weights(cells: int, pixels: int, upsample: Upsample) -> Tensor:
    """Interpolation weights (pixels, cells); every row sums to 1."""
    at = _positions(cells, pixels, upsample).clip(0, cells - 1)
    low = np.minimum(np.floor(at).astype(int), max(cells - 2, 0))
    weights = np.zeros((pixels, cells))
    weights[np.arange(pixels), low] = 1 - (at - low)
    weights[np.arange(pixels), np.minimum(low + 1, cells - 1)] += at - low
    return torch.from_numpy(weights).float()


def _positions(cells: int, pixels: int, upsample: Upsample) -> Array:
    """Where each pixel lies, in cells."""
    index = np.arange(pixels)
    if upsample == "half-pixel":
        return (index + 0.5) * cells / pixels - 0.5
    if upsample == "align_corners":
        return index * (cells - 1) / max(pixels - 1, 1)
    if upsample == "netdissect":
        return index * cells / pixels
    raise ConsilienceError(
        f"upsample is one of {', '.join(get_args(Upsample))}; got {upsample!r}"
    )


# ---- one image


@dataclass(frozen=True, eq=False)
class ShownLabels:
    """The labels of an image as the counts need them: rows (L + 1, pixels) float32, the
    last one all ones.
    """

    labels: Labels
    rows: Tensor

    @staticmethod
    def of(labels: Labels, device: torch.device) -> ShownLabels:
        """On the device of the maps."""
        count, height, width = labels.masks.shape
        rows = torch.ones(count + 1, height * width)
        rows[:count] = torch.from_numpy(labels.masks.reshape(count, height * width))
        return ShownLabels(labels, rows.to(device))


CellWatch = Callable[[Array, Tensor], None]
"""Units (n,) and their masks (n, height, width) as 0 and 1."""


class Counts:
    """Intersections and unit pixels of one layer.

    ``intersections`` (U, C) and ``unit_pixels`` (U, K) int64 count pixels of the label
    grid. A unit's pixels count for a category in an image that is annotated for it
    (``paper``), or only where the unit's mask hits one of its labels (``lite``, as
    NetDissect-Lite counts).
    """

    def __init__(
        self,
        thresholds: Array,
        concepts: ConceptSet,
        upsample: Upsample,
        union: Union,
    ) -> None:
        if union not in get_args(Union):
            raise ConsilienceError(
                f"union is one of {', '.join(get_args(Union))}; got {union!r}"
            )
        self.thresholds, self.upsample, self.union = thresholds, upsample, union
        self.grid, self.category_of = concepts.grid, concepts.category_of
        self.intersections = np.zeros(
            (len(thresholds), len(concepts.concepts)), dtype=np.int64
        )
        self.unit_pixels = np.zeros(
            (len(thresholds), len(concepts.categories)), dtype=np.int64
        )

    def add(
        self,
        maps: Tensor,
        peaks: Tensor,
        shown: ShownLabels,
        watch: CellWatch | None = None,
    ) -> None:
        """Count an image's maps (U, h, w) with maxima ``peaks`` (U,) against its
        labels.
        """
        cuts = torch.from_numpy(self.thresholds).to(maps.device)
        active = torch.nonzero(peaks > cuts)[:, 0]
        for units in torch.split(active, CHUNK):
            masks = _above(maps[units], cuts[units], self.grid, self.upsample).gt_(0)
            products = (masks.flatten(1) @ shown.rows.T).round_().long().cpu().numpy()
            self._count(units.cpu().numpy(), products, shown.labels)
            if watch is not None:
                watch(units.cpu().numpy(), masks)

    def _count(self, units: Array, products: Array, labels: Labels) -> None:
        """``products`` (n, L + 1): pixels shared with each label, and the unit's own."""
        hits, area = products[:, :-1], products[:, -1]
        self.intersections[np.ix_(units, labels.present)] += hits
        for concept in labels.whole:
            self.intersections[units, concept] += area
        counts = (
            labels.annotated[None, :]
            if self.union == "paper"
            else self._hit(hits, labels)
        )
        self.unit_pixels[units] += area[:, None] * counts

    def _hit(self, hits: Array, labels: Labels) -> Array:
        """Whether a unit's mask hits a label of a category (n, K)."""
        hit = np.zeros((len(hits), self.unit_pixels.shape[1]), dtype=bool)
        for place, concept in enumerate(labels.present):
            hit[:, self.category_of[concept]] |= hits[:, place] > 0
        hit[:, self.category_of[list(labels.whole)]] = True
        return hit

    def unions(self, label_pixels: Array) -> Array:
        """Unions (U, C) with labels of ``label_pixels`` (C,) in all."""
        unions: Array = (
            self.unit_pixels[:, self.category_of]
            + label_pixels[None, :]
            - self.intersections
        )
        return unions

    def merge(self, other: Counts) -> None:
        """Take in the counts of other images."""
        self.intersections += other.intersections
        self.unit_pixels += other.unit_pixels

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        return {"intersections": self.intersections, "unit_pixels": self.unit_pixels}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.intersections, self.unit_pixels = (
            state["intersections"],
            state["unit_pixels"],
        )


class LabelCounts:
    """Of every concept its pixels and images (C,)."""

    def __init__(self, concepts: ConceptSet) -> None:
        self.area = concepts.grid[0] * concepts.grid[1]
        self.pixels = np.zeros(len(concepts.concepts), dtype=np.int64)
        self.images = np.zeros(len(concepts.concepts), dtype=np.int64)

    def add(self, labels: Labels) -> None:
        """Count an image's labels."""
        sizes = labels.masks.sum(axis=(1, 2))
        self.pixels[labels.present] += sizes
        self.images[labels.present] += sizes > 0
        self.pixels[list(labels.whole)] += self.area
        self.images[list(labels.whole)] += 1

    def merge(self, other: LabelCounts) -> None:
        """Take in the counts of other images."""
        self.pixels += other.pixels
        self.images += other.images

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        return {"pixels": self.pixels, "images": self.images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.pixels, self.images = state["pixels"], state["images"]


# ---- top images


class Tops:
    """The images on which each unit is highest: ``indices`` (U, T), -1 where there is
    none, and ``values`` (U, T).
    """

    def __init__(self, units: int, count: int) -> None:
        self.indices = np.full((units, count), -1, dtype=np.int64)
        self.values = np.full((units, count), -np.inf, dtype=np.float32)

    def add(self, first: int, peaks: Tensor) -> None:
        """Take in maxima (N, U) of images ``first`` and on; of equal ones the earlier
        stays.
        """
        places = np.arange(first, first + len(peaks))
        new = peaks.T.float().cpu().numpy()
        self._take(np.broadcast_to(places, new.shape), new)

    def merge(self, other: Tops) -> None:
        """Take in the top images of a part that comes after."""
        self._take(other.indices, other.values)

    def _take(self, places: Array, new: Array) -> None:
        better = (
            np.flatnonzero((new > self.values[:, -1:]).any(axis=1))
            if self.values.shape[1]
            else np.zeros(0, int)
        )
        values = np.concatenate([self.values[better], new[better]], axis=1)
        indices = np.concatenate([self.indices[better], places[better]], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.values.shape[1]]
        self.values[better] = np.take_along_axis(values, order, axis=1)
        self.indices[better] = np.take_along_axis(indices, order, axis=1)

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        return {"indices": self.indices, "values": self.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.indices, self.values = state["indices"], state["values"]
