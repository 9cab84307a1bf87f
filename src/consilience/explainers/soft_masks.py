"""Soft masks that are made a chunk at a time, so that memory does not grow with their
number times the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.types import Array, ConsilienceError, View

FLAT_SCORES = "every masked image has the same score: there is nothing to explain"


@dataclass(frozen=True, eq=False)
class Soft:
    """``count`` soft masks that are only made when it is their turn: ``masks(start,
    stop)`` is (b, h, w) in [0, 1].
    """

    count: int
    masks: Callable[[int, int], Tensor]

    def __len__(self) -> int:
        return self.count

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        for start in range(0, self.count, size):
            keep = self.masks(start, min(start + size, self.count)).to(image)
            yield torch.lerp(fill, image, keep.unsqueeze(1))


def _frame(view: View) -> tuple[int, int]:
    return view.pixels.shape[-2], view.pixels.shape[-1]


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation of two maps; 0 where one of them is flat.

    Ranks would mostly tell of the noise where nothing is.
    """
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# ---- dependence on a grid of cells


def cells(values: Array, frame: tuple[int, int]) -> Tensor:
    """Masks (b, h, w) of values (b, s, s), each cell in one value: cells then are the
    very variables that are drawn.
    """
    rows, columns = (
        np.arange(side) * grid // side
        for side, grid in zip(frame, values.shape[1:], strict=True)
    )
    return torch.from_numpy(values[:, rows[:, None], columns]).float()


def _fits(name: str, grid: int, view: View) -> None:
    if grid > min(_frame(view)):
        raise ConsilienceError(
            f"{name}: a grid of {grid} cells on a side does not fit a frame of {_frame(view)}"
        )
