"""What a null needs of every image: unit masks and labels on a grid, gathered as sparse
pairs.

Where it fits, the grid is that of the labels, on which detectors are counted. Else a
cell is a block of its pixels, and how many of them are covered is kept: no mask is lost
for being small. Sixteen bytes a covered cell, at most `MOST_CELLS` of them as far as
that can be told before. Only ``most`` images are gathered, drawn with a seed, so that
it ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.dissection.concepts import Labels
from consilience.dissection.tally import CellWatch
from consilience.types import Array

MOST_CELLS = 3_000_000
"""48 MB; a permutation of so many takes some 30 ms on two cores."""

COARSER_COVERS = 2
"""A mask touches about so many times the share of coarse cells that it covers of pixels:
its outline runs through cells."""


def finest_grid(
    units: int, images: int, pixels: tuple[int, int], covered: float
) -> tuple[int, int]:
    """The label grid, or the finest one whose covered cells fit into `MOST_CELLS`.

    ``covered`` is the share of all pixels in a unit's mask.
    """
    masks = units * images * covered
    if masks * pixels[0] * pixels[1] <= MOST_CELLS:
        return pixels
    share = MOST_CELLS / (COARSER_COVERS * masks * pixels[0] * pixels[1])
    side = min(1.0, share**0.5)
    return max(1, int(pixels[0] * side)), max(1, int(pixels[1] * side))


def cell_starts(pixels: int, cells: int) -> Array:
    """The first pixel of each cell; cells differ by a pixel where they do not divide."""
    return -(-np.arange(cells) * pixels // cells)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Covered cells and labels of ``images`` on a grid of G cells.

    ``owners`` (M,), ``places`` (M,) and ``cells`` (M,): unit (numbered through all
    layers), image and cell of every covered cell, ``pixels`` (M,) how many of its
    pixels are. ``shown_places``, ``shown_cells``, ``shown_concepts``, ``shown_pixels``:
    the same of every labelled one, sorted by image and cell. ``areas`` (G,) are the
    pixels of the cells, ``annotated`` (N, K) the categories that an image is annotated
    for.
    """

    units: int
    concepts: int
    grid: tuple[int, int]
    owners: Array
    places: Array
    cells: Array
    pixels: Array
    shown_places: Array
    shown_cells: Array
    shown_concepts: Array
    shown_pixels: Array
    areas: Array
    annotated: Array

    @property
    def size(self) -> int:
        """Cells an image."""
        return self.grid[0] * self.grid[1]

    @property
    def images(self) -> int:
        """How many images were gathered."""
        return len(self.annotated)


class GrowingRows:
    """Rows of ``width`` numbers in one block that doubles when it is full.

    Not a list of small arrays: kept between the large ones that come and go with every
    image, they leave the heap in pieces.
    """

    def __init__(self, width: int, dtype: Any = np.int32) -> None:
        self._block, self._count = np.empty((1 << 16, width), dtype), 0

    def add(self, *columns: Any) -> None:
        """Append rows, given as ``columns`` (n,) or single numbers."""
        new = np.stack(np.broadcast_arrays(*columns), axis=-1)
        stop = self._count + len(new)
        if stop > len(self._block):
            block = np.empty(
                (max(stop, 2 * len(self._block)), self._block.shape[1]),
                self._block.dtype,
            )
            block[: self._count], self._block = self.all, block
        self._block[self._count : stop], self._count = new, stop

    @property
    def all(self) -> Array:
        """Every row so far (n, width)."""
        return self._block[: self._count]


@dataclass(eq=False)
class Gatherer:
    """Takes in images one by one, those of ``chosen`` alone, on ``grid``, which is no
    finer than ``pixels``.
    """

    pixels: tuple[int, int]
    units: int
    concepts: int
    categories: int
    chosen: Array
    grid: tuple[int, int]
    _covered: GrowingRows = field(default_factory=lambda: GrowingRows(4))
    _shown: GrowingRows = field(default_factory=lambda: GrowingRows(4))

    def __post_init__(self) -> None:
        self._annotated = GrowingRows(self.categories, bool)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {int(index): place for place, index in enumerate(self.chosen)}

    @cached_property
    def _starts(self) -> tuple[Array, Array]:
        down, across = zip(self.pixels, self.grid, strict=True)
        return cell_starts(*down), cell_starts(*across)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """0/1 matrices (cells, pixels) that add up the rows and columns of cells."""
        several = []
        for starts, pixels in zip(self._starts, self.pixels, strict=True):
            cell = np.searchsorted(starts, np.arange(pixels), side="right") - 1
            several.append(np.arange(len(starts))[:, None] == cell)
        return torch.from_numpy(several[0]).float(), torch.from_numpy(
            several[1]
        ).float()

    @cached_property
    def areas(self) -> Array:
        """Pixels (G,) of every cell."""
        down, across = (
            np.diff(starts, append=pixels)
            for starts, pixels in zip(self._starts, self.pixels, strict=True)
        )
        return np.outer(down, across).ravel().astype(np.int32)

    def add_labels(self, index: int, labels: Labels) -> None:
        """Take in the labels of image ``index``."""
        if index not in self._places:
            return
        down, across = self._starts
        counts = np.add.reduceat(labels.masks.astype(np.int32), down, axis=1)
        counts = np.add.reduceat(counts, across, axis=2).reshape(
            len(counts), len(self.areas)
        )
        rows, lit = np.nonzero(counts)
        cells, whole = len(self.areas), list(labels.whole)
        cell = np.concatenate([lit, np.tile(np.arange(cells), len(whole))])
        concept = np.concatenate([labels.present[rows], np.repeat(whole, cells)])
        pixels = np.concatenate([counts[rows, lit], np.tile(self.areas, len(whole))])
        order = np.lexsort((concept, cell))
        place = self._places[index]
        self._shown.add(place, cell[order], concept[order], pixels[order])
        self._annotated.add(*labels.annotated[:, None])

    def watch(self, index: int, first: int) -> CellWatch | None:
        """What takes in the masks of image ``index`` of a layer whose units are
        numbered from ``first``.
        """
        if index not in self._places:
            return None
        place = self._places[index]

        def take(units: Array, masks: Tensor) -> None:
            if self.grid != self.pixels:
                down, across = (one.to(masks) for one in self._sums)
                masks = down @ (masks @ across.T)
            few = masks.flatten(1).cpu().numpy()
            rows, cells = np.nonzero(few)
            counts = few[rows, cells].astype(np.int32)
            self._covered.add(units[rows] + first, place, cells, counts)

        return take

    def gathered(self) -> Gathered:
        """Everything as arrays."""
        rows = self._covered.all
        owners, places, cells, pixels = rows[np.lexsort(rows.T[2::-1])].T
        shown = self._shown.all
        return Gathered(
            units=self.units,
            concepts=self.concepts,
            grid=self.grid,
            owners=np.ascontiguousarray(owners),
            places=np.ascontiguousarray(places),
            cells=np.ascontiguousarray(cells),
            pixels=np.ascontiguousarray(pixels),
            shown_places=np.ascontiguousarray(shown[:, 0]),
            shown_cells=np.ascontiguousarray(shown[:, 1]),
            shown_concepts=np.ascontiguousarray(shown[:, 2]),
            shown_pixels=np.ascontiguousarray(shown[:, 3]),
            areas=self.areas,
            annotated=self._annotated.all,
        )

    def merge(self, other: Gatherer) -> None:
        """Take in what was gathered of a part that comes after."""
        self.restore(other.state())

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        return {
            "covered": self._covered.all,
            "shown": self._shown.all,
            "annotated": self._annotated.all,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, behind what is there."""
        for rows, kept in (
            (self._covered, "covered"),
            (self._shown, "shown"),
            (self._annotated, "annotated"),
        ):
            rows.add(*state[kept].T)


def chosen_images(count: int, most: int, seed: int) -> Array:
    """Which images are gathered: all, or ``most`` drawn with a seed."""
    if count <= most:
        return np.arange(count)
    return np.sort(
        np.random.default_rng((seed, 1)).choice(count, most, replace=False)
    )
