"""ROAD, remove and debias: pixels are removed and their places filled in from what
is around them, so that little is given away by the shape of the hole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.metrics.perturbation import (
    EditPlan,
    Probing,
    map_of,
    open_ended,
    options_turn,
    ranks,
    read_as,
)
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    ClassTarget,
    Explanation,
    Model,
    NotApplicable,
    Score,
    Target,
    View,
)

AROUND = tuple(
    ((down, across), 1 / 6 if down * across == 0 else 1 / 12)
    for down in (-1, 0, 1)
    for across in (-1, 0, 1)
    if (down, across) != (0, 0)
)
"""Weights of a pixel's eight neighbours in its mean: those beside it 1/6, those at its
corners 1/12.
"""
KNOWN, OUTSIDE = -1, -2


@metrics.register("road")
@dataclass(frozen=True)
class Road(Probing):
    """ROAD (Rong et al., ICML 2022, section 4): the score after pixels are replaced by
    what their surroundings suggest.

    Removed pixels become the weighted mean of their neighbours (noisy linear
    imputation: weights 1/6 beside and 1/12 at the corners, fewer neighbours at the
    borders), which is one sparse linear system an image, and Gaussian noise of standard
    deviation ``noise`` (of [0, 1]) is added to each channel. ``order=morf`` removes the
    most relevant first: the mean of ``f(x_p)`` over ``shares``, lower is better;
    ``order=lerf`` the least relevant: higher is better; ``order=combined``: ``mean_p
    (f(x_p, lerf) - f(x_p, morf)) / 2``, higher is better, 0 for a random map.
    ``reads=accuracy`` counts, as the paper, whether the class is still the first. The
    noise is the same for all methods. The curve is (2, p) or, combined, (3, p): the
    share removed, the score (combined: morf, lerf).

    Quantus mistakes elements of channels for pixels on RGB images and keeps only its
    first batch, so it is not a measure here. Known failure: where much is removed, what is
    filled in is a blur, which a network may still not have seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "ROAD"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-0.5, 0.5)
    cost: ClassVar[str] = "shares passes, combined twice as many"
    order: Literal["combined", "morf", "lerf"] = option(
        "combined", help="most relevant first, least, or half their difference"
    )
    shares: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        help="shares of the pixels removed, above 0 and below 1",
        above=0,
        below=1,
    )
    noise: float = option(
        0.01,
        help="standard deviation of the noise on what is filled in, of [0, 1]",
        least=0,
    )
    reads: Literal["probability", "logit", "accuracy"] = option(
        "probability", help="which number of the class is followed"
    )
    seed: int = option(
        0,
        help="seed of the noise and of the order among pixels of equal value",
        least=0,
    )

    def __post_init__(self) -> None:
        if self.order != "combined":
            options_turn(
                self, higher_is_better=self.order == "lerf", bounds=(0.0, 1.0)
            )
        open_ended(self, self.reads == "logit")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        rank = ranks(map_of(view, explanation), self.seed)
        some = np.rint(np.array(self.shares) * rank.size).astype(np.int64)
        morf, lerf = (
            (np.zeros_like(some), some),
            (rank.size - some, np.full_like(some, rank.size)),
        )
        parts = {"morf": [morf], "lerf": [lerf], "combined": [morf, lerf]}[self.order]
        start, stop = (np.concatenate(edges) for edges in zip(*parts, strict=True))
        keeps = Imputed(rank, start, stop, self.noise, self.seed)
        return EditPlan(
            keeps, view.pixels, self._target(explanation.target), self._finish
        )

    def _target(self, target: Target) -> Target:
        if self.reads != "accuracy":
            return read_as(target, self.reads)
        if not isinstance(target, ClassTarget):
            raise NotApplicable(code="no-first-class", target=target.name)
        return First(target.index, target.name)

    def _finish(self, scores: Array) -> Score:
        rows = scores.reshape(-1, len(self.shares))
        curve = np.concatenate([np.array([self.shares]), rows])
        value = rows.mean(axis=1) @ (
            [-0.5, 0.5] if self.order == "combined" else [1.0]
        )
        return Score(float(value), curve, {"passes": len(scores), "seed": self.seed})


@dataclass(frozen=True)
class First:
    """1 where a class has the largest output, else 0."""

    index: int
    name: str
    score: str = "accuracy"

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of outputs (N, K)."""
        return (outputs.argmax(dim=-1) == self.index).float()


# ---- noisy linear imputation


@dataclass(frozen=True, eq=False)
class Imputed:
    """Images whose pixels of rank ``start[i] <= rank < stop[i]`` are filled in from the
    others, with seeded noise on them.

    An image's noise depends on the seed, the number of pixels removed and the frame,
    not on the chunk it comes in.
    """

    rank: Array
    start: Array
    stop: Array
    noise: float = 0.01
    seed: int = 0

    def __len__(self) -> int:
        return len(self.stop)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time; ``fill`` is not used."""
        whole = image[0].detach().cpu().double().numpy()
        for begin in range(0, len(self), size):
            part = range(begin, min(begin + size, len(self)))
            yield torch.stack(
                [torch.from_numpy(self._one(whole, number)) for number in part]
            ).to(image)

    def _one(self, image: Array, number: int) -> Array:
        gone = (self.rank >= self.start[number]) & (self.rank < self.stop[number])
        count = int(self.stop[number] - self.start[number])
        drawn = np.random.default_rng([self.seed, count]).standard_normal(image.shape)
        whole: Array = imputed(image, gone) + self.noise * drawn * gone
        return whole


def imputed(image: Array, gone: Array) -> Array:
    """``image`` (c, h, w) float64 with every pixel of ``gone`` (h, w) bool the weighted
    mean of its neighbours, known or not.

    Neighbours outside the image do not count. The system is symmetric and, as long as
    one pixel is known, positive definite; it is factorised once for all channels.
    """
    from scipy.sparse.linalg import splu

    if not gone.any():
        return image.copy()
    system, right = _system(image, gone)
    factors = splu(
        system,
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    whole = image.copy()
    whole[:, gone] = factors.solve(right).T
    return whole


def _system(image: Array, gone: Array) -> tuple[Any, Array]:
    """The sparse matrix (n, n) and the right sides (n, c) of the n unknown pixels, row
    after row.
    """
    from scipy import sparse

    count = int(gone.sum())
    number = np.full((gone.shape[0] + 2, gone.shape[1] + 2), OUTSIDE)
    number[1:-1, 1:-1][~gone] = KNOWN
    number[1:-1, 1:-1][gone] = np.arange(count)
    around = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    down, across = np.nonzero(gone)
    weight, right = np.zeros(count), np.zeros((count, len(image)))
    entries = []
    for (dy, dx), share in AROUND:
        at = (down + 1 + dy, across + 1 + dx)
        weight += share * (number[at] != OUTSIDE)
        right += share * (around[:, at[0], at[1]] * (number[at] == KNOWN)).T
        unknown = np.flatnonzero(number[at] >= 0)
        entries.append((np.full(len(unknown), -share), unknown, number[at][unknown]))
    entries.append((weight, np.arange(count), np.arange(count)))
    values, rows, columns = (
        np.concatenate(part) for part in zip(*entries, strict=True)
    )
    return sparse.csc_matrix((values, (rows, columns)), shape=(count, count)), right
