"""Where on a grid: one cell, a box or a mask of the image, or everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consilience.data import read_image
from consilience.types import Array, Box, ConsilienceError, Geometry, NotApplicable

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class GridPlace:
    """One cell of a grid (row, column), or a box in pixels of the image, or a mask file
    of its size; or everywhere.
    """

    at: tuple[int, int] | None = None
    box: Corners | None = None
    mask: str = ""

    @property
    def words(self) -> str:
        """``at 3, 5``, ``box 10, 20, 90, 80``, ``mask FILE``; empty for everywhere."""
        numbers = {"at": self.at, "box": self.box}
        said = [
            f"{key} {', '.join(f'{number:g}' for number in given)}"
            for key, given in numbers.items()
            if given is not None
        ]
        return " and ".join(said + ([f"mask {self.mask}"] if self.mask else []))

    @property
    def suffix(self) -> str:
        """For a target's name."""
        return f" ({self.words})" if self.words else ""

    def check(self) -> None:
        """One place at most, and its file is there."""
        if (
            sum(given is not None for given in (self.at, self.box, self.mask or None))
            > 1
        ):
            raise ConsilienceError(f"a place is given once; got {self.words}")
        if self.mask:
            file_digest(self.mask)

    def weights(self, grid: tuple[int, int], geometry: Geometry) -> Tensor | None:
        """Weights (h, w), of sum 1, of the cells of a ``grid`` over the model's input:
        how much of each lies in the place.

        None for everywhere; `NotApplicable` where the model is shown no part of it.
        """
        if self.at is not None:
            return _cell(self.at, grid)
        if self.box is None and not self.mask:
            return None
        covered = (
            _of_box(grid, geometry, self.box)
            if self.box is not None
            else _of_mask(grid, geometry, self.mask)
        )
        if not covered.sum() > 0:
            raise NotApplicable(code="words-not-shown", words=str(self.words))
        return torch.from_numpy(covered / covered.sum()).float()


def _cell(at: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    if not (0 <= at[0] < grid[0] and 0 <= at[1] < grid[1]):
        raise ConsilienceError(
            f"the grid has {grid[0]} rows and {grid[1]} columns; row {at[0]}, column {at[1]} "
            f"is outside"
        )
    weights = torch.zeros(grid)
    weights[at] = 1
    return weights


def _of_box(grid: tuple[int, int], geometry: Geometry, box: Corners) -> Array:
    """How much of each cell lies in a box of the image, in pixels of the input."""
    moved = geometry.to_input(Box(None, *box))
    rows = _shared(
        grid[0], geometry.size[0], np.array([moved.y0]), np.array([moved.y1])
    )
    columns = _shared(
        grid[1], geometry.size[1], np.array([moved.x0]), np.array([moved.x1])
    )
    return np.asarray(rows @ columns.T)


def _of_mask(grid: tuple[int, int], geometry: Geometry, file: str) -> Array:
    """How much of each cell lies in a mask of the image."""
    mask = read_mask(file)
    if mask.shape != tuple(geometry.image):
        sizes = [" x ".join(map(str, size)) for size in (mask.shape, geometry.image)]
        raise ConsilienceError(
            f"mask {file!r} is {sizes[0]}; the image is {sizes[1]}"
        )
    moved = geometry.to_input(mask).astype(np.float64)
    rows, columns = (
        _pixels(cells, side) for cells, side in zip(grid, geometry.size, strict=True)
    )
    return np.asarray(rows @ moved @ columns.T)


def _pixels(cells: int, side: int) -> Array:
    """How much of each of ``side`` pixels lies in each cell."""
    ends = np.arange(side + 1, dtype=np.float64)
    return _shared(cells, side, ends[:-1], ends[1:])


def _shared(cells: int, side: int, low: Array, high: Array) -> Array:
    """Lengths (cells, n) that cells of ``side / cells`` pixels share with the intervals
    from ``low`` to ``high``.
    """
    edges = np.arange(cells + 1) * side / cells
    lengths = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return np.asarray(np.clip(lengths, 0, None))


# ---- files


def read_mask(file: str | Path) -> Array:
    """A mask (H, W) bool: of a .npy file what is not 0, of an image what is brighter
    than half.
    """
    path = Path(file)
    if path.suffix != ".npy":
        return np.asarray(read_image(path).pixels.mean(axis=2) > 127.5)
    values = read_array(path)
    if values.ndim != 2:
        raise ConsilienceError(
            f"mask {str(file)!r} has shape {values.shape}; a mask is (H, W)"
        )
    return np.asarray(values != 0)


def read_array(path: Path) -> Array:
    """The numbers of a .npy file; nothing is unpickled."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConsilienceError(
            f"{str(path)!r} is not an array in a .npy file: {error}"
        ) from None
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "biuf":
        raise ConsilienceError(f"{str(path)!r} holds no plain numbers")
    return loaded


def file_digest(file: str) -> str:
    """Hex digest of a file's bytes."""
    try:
        return blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise ConsilienceError(
            f"{file!r} cannot be read: {error.strerror or error}"
        ) from None


def same_file(file: str, known: str) -> str:
    """The digest of a file (empty for none), which is the ``known`` one where there is
    one.
    """
    if not file:
        return ""
    found = file_digest(file)
    if known and known != found:
        raise ConsilienceError(
            f"{file!r} is another file than when this target was made"
        )
    return found
