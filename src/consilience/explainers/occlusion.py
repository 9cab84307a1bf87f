"""Occlusion: a window is covered at one place after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.explainers.soft_masks import Soft, _frame
from consilience.perturb.fills import Fill, Grey
from consilience.perturb.probe import probe
from consilience.registry import explainers, option
from consilience.types import Array, ConsilienceError, Heat, Model, Target, View

# ---- occlusion


@explainers.register("occlusion")
@dataclass(frozen=True)
class Occlusion:
    """Occlusion (Zeiler & Fergus, ECCV 2014, section 4.2): what the score loses under a
    square that slides over the image.

    A pixel's value is the mean loss over the windows that cover it. Windows start every
    ``stride`` pixels; a last one at the border covers what is left. The paper's square
    is grey.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Occlusion"
    window: int = option(
        32,
        help="side of the square, in pixels of the model's frame; at most the frame",
        least=1,
    )
    stride: int = option(
        8, help="pixels between neighbouring squares, at most the window", least=1
    )
    fill: Fill = option(Grey(), kind="fill", help="what the square shows")
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is lost"
    )

    def __post_init__(self) -> None:
        if self.stride > self.window:
            raise ConsilienceError(
                f"occlusion: a stride above the window leaves gaps; got {self.stride} and "
                f"{self.window}"
            )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The mean losses, (h, w) float32 in units of the score."""
        down, across = (
            windows(side, self.window, self.stride) for side in _frame(view)
        )

        def masks(start: int, stop: int) -> Tensor:
            """One more image than windows: the first is whole."""
            row, column = np.divmod(
                np.arange(max(start - 1, 0), stop - 1), len(across)
            )
            hidden = down[row][:, :, None] & across[column][:, None, :]
            whole = np.zeros((1 if start == 0 else 0, *hidden.shape[1:]), dtype=bool)
            return torch.from_numpy(~np.concatenate([whole, hidden]))

        count = len(down) * len(across)
        scores = (
            probe(
                model,
                view,
                Soft(count + 1, masks),
                target,
                self.fill.image(view, None),
                self.label,
            )
            .double()
            .numpy()
        )
        losses = (scores[0] - scores[1:]).reshape(len(down), len(across))
        covered = np.outer(down.sum(axis=0), across.sum(axis=0))
        values = down.T.astype(np.float64) @ losses @ across / covered
        return Heat(
            torch.from_numpy(values).float(),
            facts={"passes": count + 1, "windows": [len(down), len(across)]},
        )


def windows(side: int, window: int, stride: int) -> Array:
    """Which pixels of a side each window covers, (n, side) bool; together they cover
    all.
    """
    last = max(side - window, 0)
    starts = np.append(np.arange(0, last, stride), last)
    at = np.arange(side)
    return (at >= starts[:, None]) & (at < starts[:, None] + window)
