"""RISE: random masks, weighted by the score of what they leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import images
from consilience.explainers.soft_masks import (
    FLAT_SCORES,
    Soft,
    _frame,
    correlation,
)
from consilience.perturb.fidelity import FIDELITY, Asked, ask, asked_facts
from consilience.perturb.fills import Fill, NeutralFill
from consilience.perturb.probe import probe
from consilience.registry import explainers, option
from consilience.types import Array, Fidelity, Heat, Model, Target, View

# ---- RISE

ROUND = 500
"""Masks between two looks at whether the map is stable."""


@explainers.register("rise")
@dataclass(frozen=True)
class Rise:
    """RISE (Petsiuk, Das & Saenko, BMVC 2018, equation 6): ``1 / (N p) sum_i f(I * M_i)
    M_i`` over random masks.

    A mask is ``grid`` x ``grid`` coins, 1 with probability ``p``, enlarged bilinearly
    to one cell more than the frame and cut at a random offset within a cell (section
    3.2). The paper takes a 7 x 7 grid, p = .5, and 4,000 masks for VGG16 or 8,000 for
    ResNet-50. The authors' code multiplies the normalised image by the mask, so what is
    hidden has the colour that the network was normalised with, not black:
    ``fill=neutral``. It mirrors the grid at its borders where here its outer cells are
    held, which shows in the outer half cell of the enlarged grid.

    A map's level says little: a pixel that does not matter has the mean score.
    ``until=stable`` looks every 500 masks: the map from every second mask is correlated
    with the map from the others, and it stops where that reaches ``agreement`` twice in
    a row; ``masks`` is then the most it may take.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "RISE"
    masks: int = option(
        4000,
        help="masked images shown to the model; at most, with until=stable",
        least=2,
    )
    grid: int = option(7, help="cells on a side of a mask", least=1)
    p: float = option(
        0.5,
        help="probability that a cell is kept, above 0 and below 1",
        above=0,
        below=1,
    )
    fill: Fill = option(
        NeutralFill(), kind="fill", help="what stands where a mask is 0"
    )
    seed: int = option(
        0, help="seed of the masks; more of them begin with the same ones", least=0
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class weighs the masks"
    )
    until: Literal["masks", "stable"] = option(
        "masks", help="stop early where the two halves' maps agree"
    )
    agreement: float = option(
        0.95,
        help="correlation of the halves' maps at which the map is stable",
        above=0,
        below=1,
    )
    fidelity: Fidelity = option("exact", help=FIDELITY)

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The map, (h, w) float32 in units of the score.

        Facts: ``agreement``, the correlation of the maps of every second mask and of
        the others, and by Spearman and Brown's formula ``reliability``, that of the
        whole map with another of as many masks.
        """
        drawn = Shifted.draw(self.masks, self.grid, self.p, _frame(view), self.seed)
        fill = self.fill.image(view, None)
        stops = (
            [*range(ROUND, self.masks, ROUND), self.masks]
            if self.until == "stable"
            else [self.masks]
        )
        scores, looks = np.empty(0), [0.0]
        asked: list[Asked] = []
        for stop in stops:
            more = drawn.part(len(scores), stop)
            score = partial(self._scores, view, target, fill, more)
            alone = np.arange(len(more.on))[:, None]
            nothing: Array = np.empty((len(more.on), 0))
            seed = self.seed + len(asked)
            asked.append(ask(self.fidelity, model, score, nothing, alone, seed))
            scores = np.concatenate([one.scores for one in asked])
            halves = [
                drawn.part(0, stop, half).summed(scores[half::2]) for half in (0, 1)
            ]
            looks.append(correlation(*halves))
            if min(looks[-2:]) >= self.agreement:
                break
        values = (halves[0] + halves[1]) / (len(scores) * self.p)
        facts = self._facts(scores, looks) | asked_facts(asked)
        return Heat(torch.from_numpy(values).float(), facts=facts)

    def _scores(
        self,
        view: View,
        target: Target,
        fill: Tensor,
        drawn: Shifted,
        model: Model,
        rows: Array,
    ) -> Array:
        """What a model says of some masks."""
        some = replace(drawn, on=drawn.on[rows], shift=drawn.shift[rows])
        soft = Soft(len(rows), some.masks)
        return probe(model, view, soft, target, fill, self.label).double().numpy()

    def _facts(self, scores: Array, looks: list[float]) -> dict[str, Any]:
        half = looks[-1]
        facts: dict[str, Any] = {
            "passes": len(scores),
            "seed": self.seed,
            "agreement": half,
        }
        facts["reliability"] = 2 * half / (1 + half) if half > 0 else 0.0
        if self.until == "stable":
            facts["stable"] = min(looks[-2:]) >= self.agreement
        return {**facts, "notes": [FLAT_SCORES]} if np.ptp(scores) == 0 else facts


@dataclass(frozen=True, eq=False)
class Shifted:
    """Masks as coins ``on`` (n, s, s), offsets ``shift`` (n, 2) down and across, and
    the enlarging ``rows``, ``columns``.

    A mask is ``rows[down] @ on @ columns[across].T``: what bilinear enlarging by whole
    cells and cutting comes to. ``rows`` is (cell height, h, s), a matrix an offset.
    """

    on: Array
    shift: Array
    rows: Array
    columns: Array

    @staticmethod
    def draw(
        count: int, grid: int, p: float, frame: tuple[int, int], seed: int
    ) -> Shifted:
        """``count`` masks for a frame; a longer draw begins with the shorter one of the
        same seed.
        """
        rows, columns = (_enlarging(grid, side) for side in frame)
        on = np.random.default_rng([seed, 0]).random((count, grid, grid)) < p
        shift = np.random.default_rng([seed, 1]).integers(
            0, [len(rows), len(columns)], (count, 2)
        )
        return Shifted(on, shift, rows, columns)

    def part(self, start: int, stop: int, half: int | None = None) -> Shifted:
        """Some of the masks; ``half`` 0 or 1 takes every second one, from the first or
        the second.
        """
        some = slice(start, stop) if half is None else slice(start + half, stop, 2)
        return Shifted(self.on[some], self.shift[some], self.rows, self.columns)

    def masks(self, start: int, stop: int) -> Tensor:
        """Masks (b, h, w) float32."""
        down, across = self.shift[start:stop].T
        made = (
            self.rows[down]
            @ self.on[start:stop].astype(np.float64)
            @ self.columns[across].transpose(0, 2, 1)
        )
        return torch.from_numpy(made).float()

    def summed(self, weights: Array) -> Array:
        """``sum_i weights_i M_i``, (h, w), without making a mask: coins are added up by
        offset, then enlarged.
        """
        cells, size = (len(self.rows), len(self.columns)), self.on.shape[1:]
        total: Array = np.zeros((*cells, *size))
        np.add.at(total, tuple(self.shift.T), self.on * weights[:, None, None])
        summed: Array = np.einsum(
            "yha,yxac,xwc->hw", self.rows, total, self.columns, optimize=True
        )
        return summed


def _enlarging(grid: int, side: int) -> Array:
    """Matrices (cell, side, grid) that enlarge ``grid`` cells to one more than ``side``
    holds and cut at each offset.
    """
    cell = -(-side // grid)
    unit = torch.eye(grid, dtype=torch.float64)[:, :, None]
    whole = images.enlarge(unit, ((grid + 1) * cell, 1))[:, :, 0].T.numpy()
    return np.stack([whole[offset : offset + side] for offset in range(cell)])
