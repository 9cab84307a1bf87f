"""What a null needs of every picture: unit masks and labels sampled on a coarse grid, gathered as sparse pairs.

A cell is one pixel of the label grid, at the middle of its square of the coarse grid. Units keep the cells they cover,
pictures the labels of their cells. Twelve bytes a covered cell, of which there are half a percent by construction: 20 MB for
900 units, 1,800 pictures and a grid of 14 x 14. Only ``most`` pictures are gathered, drawn with a seed, so that it ends there.
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
from consilience.dissection.tally import Watch
from consilience.types import Array


def middles(pixels: int, cells: int) -> Array:
    """The pixel at the middle of each cell."""
    return ((np.arange(cells) + 0.5) * pixels / cells).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Covered cells and labels of ``pictures`` on a coarse grid of G cells.

    ``owners`` (M,), ``places`` (M,) and ``cells`` (M,): unit (numbered through all layers), picture and cell of every covered
    cell. ``shown_places``, ``shown_cells``, ``shown_concepts``: the same of every labelled one, sorted by picture and cell.
    ``annotated`` (N, K): the categories that a picture is annotated for.
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
        """Cells a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def pictures(self) -> int:
        """How many pictures were gathered."""
        return len(self.annotated)


@dataclass(eq=False)
class Gatherer:
    """Takes in pictures one by one, those of ``chosen`` alone."""

    pixels: tuple[int, int]
    units: int
    concepts: int
    chosen: Array
    coarse: int = 14
    _covered: list[Array] = field(default_factory=list)
    _shown: list[Array] = field(default_factory=list)
    _annotated: list[Array] = field(default_factory=list)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """The coarse grid, never finer than the labels."""
        return min(self.coarse, self.pixels[0]), min(self.coarse, self.pixels[1])

    @cached_property
    def _places(self) -> dict[int, int]:
        return {int(index): place for place, index in enumerate(self.chosen)}

    @cached_property
    def _middles(self) -> tuple[Array, Array]:
        return middles(self.pixels[0], self.grid[0]), middles(self.pixels[1], self.grid[1])

    def add_labels(self, index: int, labels: Labels) -> None:
        """Take in the labels of picture ``index``."""
        if index not in self._places:
            return
        down, across = self._middles
        masks = labels.masks[:, down][:, :, across].reshape(len(labels.masks), -1)
        rows, cells = np.nonzero(masks)
        pairs = [(cells, labels.present[rows])]
        every = np.arange(self.grid[0] * self.grid[1])
        pairs += [(every, np.full(len(every), concept)) for concept in labels.whole]
        cell = np.concatenate([one for one, _ in pairs])
        concept = np.concatenate([one for _, one in pairs])
        order = np.lexsort((concept, cell))
        place = np.full(len(order), self._places[index])
        self._shown.append(np.stack([place, cell[order], concept[order]]).astype(np.int32))
        self._annotated.append(labels.annotated)

    def watch(self, index: int, first: int) -> Watch | None:
        """What takes in the masks of picture ``index`` of a layer whose units are numbered from ``first``."""
        if index not in self._places:
            return None
        place = self._places[index]
        down, across = (torch.from_numpy(one) for one in self._middles)

        def take(units: Array, masks: Tensor) -> None:
            few = masks[:, down.to(masks.device)][:, :, across.to(masks.device)].flatten(1).cpu().numpy()
            rows, cells = np.nonzero(few)
            self._covered.append(np.stack([units[rows] + first, np.full(len(rows), place), cells]).astype(np.int32))

        return take

    def gathered(self) -> Gathered:
        """Everything as arrays."""
        self._join()
        owners, places, cells = self._covered[0]
        order = np.lexsort((cells, places, owners))
        covered = [part[order] for part in (owners, places, cells)]
        shown = list(self._shown[0])
        return Gathered(
            self.units, self.concepts, self.grid, covered[0], covered[1], covered[2], shown[0], shown[1], shown[2],
            np.stack(self._annotated),
        )  # fmt: skip

    def _join(self) -> None:
        nothing = np.zeros((3, 0), dtype=np.int32)
        self._covered = [np.concatenate([nothing, *self._covered], axis=1)]
        self._shown = [np.concatenate([nothing, *self._shown], axis=1)]

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        self._join()
        annotated = np.stack(self._annotated) if self._annotated else np.zeros((0, 0), dtype=bool)
        return {"covered": self._covered[0], "shown": self._shown[0], "annotated": annotated}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._covered, self._shown = [state["covered"]], [state["shown"]]
        self._annotated = list(state["annotated"])


def chosen_pictures(count: int, most: int, seed: int) -> Array:
    """Which pictures are gathered: all, or ``most`` drawn with a seed."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng((seed, 1)).choice(count, most, replace=False))
