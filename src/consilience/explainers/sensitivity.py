"""Sensitivity indices over random grids of masks: Sobol and HSIC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from consilience.explainers.soft_masks import (
    FLAT_SCORES,
    Soft,
    _fits,
    _frame,
    cells,
)
from consilience.perturb.fills import Fill, NeutralFill
from consilience.perturb.probe import probe
from consilience.registry import explainers, option
from consilience.types import Array, ConsilienceError, Heat, Model, Target, View


@explainers.register("sobol")
@dataclass(frozen=True)
class Sobol:
    """Total Sobol indices of the cells of a grid (Fel et al., NeurIPS 2021, equation
    5), by Jansen's estimator (1999).

    Each cell is kept to a random degree in [0, 1]; ``S_i = E (f(A) - f(A with cell i of
    B))^2 / (2 Var f)`` is the share of the score's variance that would remain if all
    but cell i were known, its interactions included. A and B are the halves of a
    scrambled Sobol sequence of ``2 grid^2`` dimensions; the variance is that of both.
    It takes ``design (grid^2 + 2)`` passes.

    Indices are 0 and up and have no sign: a cell that speaks against the class counts
    as one that speaks for it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Sobol indices"
    grid: int = option(8, help="cells on a side", least=1)
    design: int = option(32, help="points of the design, a power of two", least=2)
    fill: Fill = option(
        NeutralFill(),
        kind="fill",
        help="what stands where a cell is 0; the paper also blurs",
    )
    seed: int = option(0, help="seed of the sequence's scrambling", least=0)
    score: Literal["logit", "probability"] = option(
        "probability", help="whose variance is shared out"
    )

    def __post_init__(self) -> None:
        if self.design & (self.design - 1):
            raise ConsilienceError(
                f"sobol: design is a power of two; got {self.design}"
            )
        if 2 * self.grid**2 > scipy.stats.qmc.Sobol.MAXDIM:
            raise ConsilienceError(
                f"sobol: grid is at most {int((scipy.stats.qmc.Sobol.MAXDIM / 2) ** 0.5)}; got {self.grid}"
            )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The indices, (grid, grid) float32 and up from 0; all 0 where the score never
        changes.
        """
        _fits("sobol", self.grid, view)
        a, b = sobol_design(self.grid**2, self.design, self.seed)

        def masks(start: int, stop: int) -> Tensor:
            return cells(
                jansen_rows(a, b, start, stop).reshape(-1, self.grid, self.grid),
                _frame(view),
            )

        count = self.design * (self.grid**2 + 2)
        scores = (
            probe(
                model,
                view,
                Soft(count, masks),
                target,
                self.fill.image(view, None),
                self.label,
            )
            .double()
            .numpy()
        )
        facts: dict[str, Any] = {"passes": count, "seed": self.seed}
        if np.ptp(scores) == 0:
            facts["notes"] = [FLAT_SCORES]
        indices = jansen(scores, self.design).reshape(self.grid, self.grid)
        return Heat(torch.from_numpy(indices).float(), facts=facts)


def sobol_design(variables: int, points: int, seed: int) -> tuple[Array, Array]:
    """Two samples A and B, (points, variables) in [0, 1)."""
    both = scipy.stats.qmc.Sobol(
        2 * variables, scramble=True, rng=np.random.default_rng(seed)
    ).random(points)
    return both[:, :variables], both[:, variables:]


def jansen_rows(a: Array, b: Array, start: int, stop: int) -> Array:
    """Rows of the whole design: A, B, then for each variable in turn A with that
    variable of B.
    """
    points = len(a)
    block, row = np.divmod(np.arange(start, stop), points)
    rows = np.where((block == 1)[:, None], b[row], a[row])
    swapped = np.flatnonzero(block >= 2)
    rows[swapped, block[swapped] - 2] = b[row[swapped], block[swapped] - 2]
    return rows


def jansen(scores: Array, points: int) -> Array:
    """Total indices (variables,) of the scores of `jansen_rows`; 0 where they do not
    vary.
    """
    blocks = scores.reshape(-1, points)
    variance = blocks[:2].var(ddof=1)
    if variance == 0:
        return np.zeros(len(blocks) - 2)
    found: Array = ((blocks[0] - blocks[2:]) ** 2).mean(axis=1) / (2 * variance)
    return found


@explainers.register("hsic")
@dataclass(frozen=True)
class Hsic:
    """How much the score depends on each cell of a grid, by HSIC (Novello, Fel &
    Vigouroux, NeurIPS 2022, equation 4).

    Cells are kept or not by a fair coin (Latin hypercube, so that each is kept in half
    of the masks). The criterion of Hilbert and Schmidt, ``tr(K_i H L H) / (n - 1)^2``,
    has K_i 1 where two masks agree about cell i and else 0, and L a Gaussian of the two
    scores' difference, as wide as the median difference of two masks. It sees any
    dependence, not only of the mean.

    Values are 0 and up and have no sign. The authors' code takes the median score
    itself for the width, which depends on where the zero of the scores is.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "HSIC"
    masks: int = option(500, help="masked images shown to the model", least=4)
    grid: int = option(8, help="cells on a side", least=1)
    fill: Fill = option(
        NeutralFill(), kind="fill", help="what stands where a cell is off"
    )
    seed: int = option(0, help="seed of the masks", least=0)
    score: Literal["logit", "probability"] = option(
        "probability", help="whose dependence is measured"
    )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The criterion of each cell, (grid, grid) float32 and up from 0; all 0 where
        the score never changes.
        """
        _fits("hsic", self.grid, view)
        on = hypercube(self.grid**2, self.masks, self.seed)

        def masks(start: int, stop: int) -> Tensor:
            return cells(
                on[start:stop].reshape(-1, self.grid, self.grid), _frame(view)
            )

        fill = self.fill.image(view, None)
        scores = (
            probe(model, view, Soft(self.masks, masks), target, fill, self.label)
            .double()
            .numpy()
        )
        facts: dict[str, Any] = {"passes": self.masks, "seed": self.seed}
        if np.ptp(scores) == 0:
            facts["notes"] = [FLAT_SCORES]
        return Heat(
            torch.from_numpy(hsic(on, scores).reshape(self.grid, self.grid)).float(),
            facts=facts,
        )


def hypercube(variables: int, points: int, seed: int) -> Array:
    """Bits (points, variables), each variable on in half of the points (one more off
    where their number is odd).
    """
    drawn: Array = scipy.stats.qmc.LatinHypercube(
        variables, rng=np.random.default_rng(seed)
    ).random(points)
    return drawn > 0.5


HSIC_ROWS = 512
"""Rows of the scores' Gram matrix at a time."""


def hsic(on: Array, scores: Array) -> Array:
    """Criterion (S,) of bits (n, S) against scores (n,); 0 where those do not vary.

    A bit's centred Gram matrix is ``2 z z^T`` with z the centred bit, so only the
    scores' matrix is made, a block at a time.
    """
    count, width = len(scores), bandwidth(scores)
    if width == 0:
        return np.zeros(on.shape[1])
    centred = on - on.mean(axis=0)
    found: Array = np.zeros(on.shape[1])
    for start in range(0, count, HSIC_ROWS):
        part = slice(start, start + HSIC_ROWS)
        gram = np.exp(-((scores[part, None] - scores) ** 2) / (2 * width**2))
        found += (centred[part] * (gram @ centred)).sum(axis=0)
    return 2 * found / (count - 1) ** 2


def bandwidth(scores: Array) -> float:
    """Median difference of two scores (of at most 1,000, evenly taken); where that is
    0, the mean of those that differ.
    """
    some = scores[:: max(1, len(scores) // 1000)][:1000]
    differences = np.abs(some[:, None] - some)[np.triu_indices(len(some), 1)]
    middle = float(np.median(differences))
    if middle > 0 or not differences.any():
        return middle
    return float(differences[differences > 0].mean())
