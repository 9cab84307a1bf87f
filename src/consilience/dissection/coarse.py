"""What a null needs of every image: unit masks and labels sampled on a coarse grid,
gathered as sparse pairs.

A cell is one pixel of the label grid, at the middle of its square of the coarse grid.
Units keep the cells they cover, images the labels of their cells. Twelve bytes a
covered cell, of which there are half a percent by construction: 20 MB for 900 units,
1,800 images and a grid of 14 x 14. Only ``most`` images are gathered, drawn with a
seed, so that it ends there.
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


def middles(pixels: int, cells: int) -> Array:
    """The pixel at the middle of each cell."""
    return ((np.arange(cells) + 0.5) * pixels / cells).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Covered cells and labels of ``images`` on a coarse grid of G cells.

    ``owners`` (M,), ``places`` (M,) and ``cells`` (M,): unit (numbered through all
    layers), image and cell of every covered cell. ``shown_places``, ``shown_cells``,
    ``shown_concepts``: the same of every labelled one, sorted by image and cell.
    ``annotated`` (N, K): the categories that an image is annotated for.
    """

    units: int
    concepts: int
    grid: tuple[int, int]
    owners: Array
    places: Array
    cells: Array
    shown_places: Array
    shown_cells: Array
    shown_concepts: Array
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
    """Takes in images one by one, those of ``chosen`` alone."""

    pixels: tuple[int, int]
    units: int
    concepts: int
    categories: int
    chosen: Array
    coarse: int = 14
    _covered: GrowingRows = field(default_factory=lambda: GrowingRows(3))
    _shown: GrowingRows = field(default_factory=lambda: GrowingRows(3))

    def __post_init__(self) -> None:
        self._annotated = GrowingRows(self.categories, bool)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """The coarse grid, never finer than the labels."""
        return min(self.coarse, self.pixels[0]), min(self.coarse, self.pixels[1])

    @cached_property
    def _places(self) -> dict[int, int]:
        return {int(index): place for place, index in enumerate(self.chosen)}

    @cached_property
    def _middles(self) -> tuple[Array, Array]:
        return middles(self.pixels[0], self.grid[0]), middles(
            self.pixels[1], self.grid[1]
        )

    def add_labels(self, index: int, labels: Labels) -> None:
        """Take in the labels of image ``index``."""
        if index not in self._places:
            return
        down, across = self._middles
        cells = self.grid[0] * self.grid[1]
        masks = labels.masks[:, down][:, :, across].reshape(len(labels.masks), cells)
        rows, lit = np.nonzero(masks)
        pairs = [(lit, labels.present[rows])]
        every = np.arange(cells)
        pairs += [(every, np.full(len(every), concept)) for concept in labels.whole]
        cell = np.concatenate([one for one, _ in pairs])
        concept = np.concatenate([one for _, one in pairs])
        order = np.lexsort((concept, cell))
        self._shown.add(self._places[index], cell[order], concept[order])
        self._annotated.add(*labels.annotated[:, None])

    def watch(self, index: int, first: int) -> CellWatch | None:
        """What takes in the masks of image ``index`` of a layer whose units are
        numbered from ``first``.
        """
        if index not in self._places:
            return None
        place = self._places[index]
        down, across = (torch.from_numpy(one) for one in self._middles)

        def take(units: Array, masks: Tensor) -> None:
            few = (
                masks[:, down.to(masks.device)][:, :, across.to(masks.device)]
                .flatten(1)
                .cpu()
                .numpy()
            )
            rows, cells = np.nonzero(few)
            self._covered.add(units[rows] + first, place, cells)

        return take

    def gathered(self) -> Gathered:
        """Everything as arrays."""
        owners, places, cells = self._covered.all.T
        order = np.lexsort((cells, places, owners))
        covered = [part[order] for part in (owners, places, cells)]
        shown = [np.ascontiguousarray(part) for part in self._shown.all.T]
        return Gathered(
            self.units,
            self.concepts,
            self.grid,
            covered[0],
            covered[1],
            covered[2],
            shown[0],
            shown[1],
            shown[2],
            self._annotated.all,
        )

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        return {
            "covered": self._covered.all,
            "shown": self._shown.all,
            "annotated": self._annotated.all,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
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
