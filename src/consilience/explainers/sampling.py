"""Masks that know nothing of the picture: RISE, occlusion, Sobol indices and HSIC.

Masks are kept as the few numbers they are made of and enlarged a chunk at a time, so that memory does not grow with their
number times the frame. None of these needs more of the model than its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from consilience import images
from consilience.probe import Fill, Grey, Neutral, probe
from consilience.registry import explainers, option
from consilience.types import Array, ConsilienceError, Heat, Model, Target, View

FLAT = "every masked picture has the same score: there is nothing to explain"


@dataclass(frozen=True, eq=False)
class Soft:
    """``count`` soft masks that are only made when it is their turn: ``masks(start, stop)`` is (b, h, w) in [0, 1]."""

    count: int
    masks: Callable[[int, int], Tensor]

    def __len__(self) -> int:
        return self.count

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited pictures (b, 3, h, w), at most ``size`` at a time."""
        for start in range(0, self.count, size):
            keep = self.masks(start, min(start + size, self.count)).to(image)
            yield torch.lerp(fill, image, keep.unsqueeze(1))


def _at_least(name: str, least: int, **values: int) -> None:
    for key, value in values.items():
        if value < least:
            raise ConsilienceError(f"{name}: {key} must be at least {least}; got {value}")


def _seed(name: str, seed: int) -> None:
    if seed < 0:
        raise ConsilienceError(f"{name}: seed must not be negative; got {seed}")


def _frame(view: View) -> tuple[int, int]:
    return view.pixels.shape[-2], view.pixels.shape[-1]


# ---------------------------------------------------------------- RISE

ROUND = 500
"""Masks between two looks at whether the map is stable."""


@explainers.register("rise")
@dataclass(frozen=True)
class Rise:
    """RISE (Petsiuk, Das & Saenko, BMVC 2018, equation 6): ``1 / (N p) sum_i f(I * M_i) M_i`` over random masks.

    A mask is ``grid`` x ``grid`` coins, 1 with probability ``p``, enlarged bilinearly to one cell more than the frame and cut
    at a random offset within a cell (section 3.2). The paper takes a 7 x 7 grid, p = .5, and 4,000 masks for VGG16 or 8,000 for
    ResNet-50. The authors' code multiplies the normalised picture by the mask, so what is hidden has the colour that the
    network was normalised with, not black: ``fill=neutral``. It mirrors the grid at its borders where here its outer cells
    are held, which shows in the outer half cell of the enlarged grid.

    A map's level says little: a pixel that does not matter has the mean score. ``until=stable`` looks every 500 masks: the map
    from every second mask is correlated with the map from the others, and it stops where that reaches ``agreement`` twice in a
    row; ``masks`` is then the most it may take.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "RISE"
    masks: int = option(4000, help="masked pictures shown to the model; at most, with until=stable")
    grid: int = option(7, help="cells on a side of a mask")
    p: float = option(0.5, help="probability that a cell is kept, above 0 and below 1")
    fill: Fill = option(Neutral(), kind="fill", help="what stands where a mask is 0")
    seed: int = option(0, help="seed of the masks; more of them begin with the same ones")
    score: Literal["logit", "probability"] = option("probability", help="which number of the class weighs the masks")
    until: Literal["masks", "stable"] = option("masks", help="stop early where the two halves' maps agree")
    agreement: float = option(0.95, help="correlation of the halves' maps at which the map is stable")

    def __post_init__(self) -> None:
        _at_least("rise", 2, masks=self.masks)
        _at_least("rise", 1, grid=self.grid)
        _seed("rise", self.seed)
        if not 0 < self.p < 1:
            raise ConsilienceError(f"rise: p lies above 0 and below 1; got {self.p:g}")
        if not 0 < self.agreement < 1:
            raise ConsilienceError(f"rise: agreement lies above 0 and below 1; got {self.agreement:g}")

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The map, (h, w) float32 in units of the score.

        Facts: ``agreement``, the correlation of the maps of every second mask and of the others, and by
        Spearman and Brown's formula ``reliability``, that of the whole map with another of as many masks.
        """
        drawn = Shifted.draw(self.masks, self.grid, self.p, _frame(view), self.seed)
        fill = self.fill.image(view, None)
        stops = [*range(ROUND, self.masks, ROUND), self.masks] if self.until == "stable" else [self.masks]
        scores, looks = np.empty(0), [0.0]
        for stop in stops:
            more = drawn.part(len(scores), stop)
            scores = np.append(scores, probe(model, view, Soft(len(more.on), more.masks), target, fill, self.label).double())
            halves = [drawn.part(0, stop, half).summed(scores[half::2]) for half in (0, 1)]
            looks.append(correlation(*halves))
            if min(looks[-2:]) >= self.agreement:
                break
        values = (halves[0] + halves[1]) / (len(scores) * self.p)
        return Heat(torch.from_numpy(values).float(), facts=self._facts(scores, looks))

    def _facts(self, scores: Array, looks: list[float]) -> dict[str, Any]:
        half = looks[-1]
        facts: dict[str, Any] = {"passes": len(scores), "seed": self.seed, "agreement": half}
        facts["reliability"] = 2 * half / (1 + half) if half > 0 else 0.0
        if self.until == "stable":
            facts["stable"] = min(looks[-2:]) >= self.agreement
        return {**facts, "notes": [FLAT]} if np.ptp(scores) == 0 else facts


@dataclass(frozen=True, eq=False)
class Shifted:
    """Masks as coins ``on`` (n, s, s), offsets ``shift`` (n, 2) down and across, and the enlarging ``rows``, ``columns``.

    A mask is ``rows[down] @ on @ columns[across].T``: what bilinear enlarging by whole cells and cutting comes to. ``rows`` is
    (cell height, h, s), a matrix an offset.
    """

    on: Array
    shift: Array
    rows: Array
    columns: Array

    @staticmethod
    def draw(count: int, grid: int, p: float, frame: tuple[int, int], seed: int) -> Shifted:
        """``count`` masks for a frame; a longer draw begins with the shorter one of the same seed."""
        rows, columns = (_enlarging(grid, side) for side in frame)
        on = np.random.default_rng([seed, 0]).random((count, grid, grid)) < p
        shift = np.random.default_rng([seed, 1]).integers(0, [len(rows), len(columns)], (count, 2))
        return Shifted(on, shift, rows, columns)

    def part(self, start: int, stop: int, half: int | None = None) -> Shifted:
        """Some of the masks; ``half`` 0 or 1 takes every second one, from the first or the second."""
        some = slice(start, stop) if half is None else slice(start + half, stop, 2)
        return Shifted(self.on[some], self.shift[some], self.rows, self.columns)

    def masks(self, start: int, stop: int) -> Tensor:
        """Masks (b, h, w) float32."""
        down, across = self.shift[start:stop].T
        made = self.rows[down] @ self.on[start:stop].astype(np.float64) @ self.columns[across].transpose(0, 2, 1)
        return torch.from_numpy(made).float()

    def summed(self, weights: Array) -> Array:
        """``sum_i weights_i M_i``, (h, w), without making a mask: coins are added up by offset, then enlarged."""
        cells, size = (len(self.rows), len(self.columns)), self.on.shape[1:]
        total: Array = np.zeros((*cells, *size))
        np.add.at(total, tuple(self.shift.T), self.on * weights[:, None, None])
        summed: Array = np.einsum("yha,yxac,xwc->hw", self.rows, total, self.columns, optimize=True)
        return summed


def _enlarging(grid: int, side: int) -> Array:
    """Matrices (cell, side, grid) that enlarge ``grid`` cells to one more than ``side`` holds and cut at each offset."""
    cell = -(-side // grid)
    unit = torch.eye(grid, dtype=torch.float64)[:, :, None]
    whole = images.enlarge(unit, ((grid + 1) * cell, 1))[:, :, 0].T.numpy()
    return np.stack([whole[offset : offset + side] for offset in range(cell)])


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation of two maps; 0 where one of them is flat. Ranks would mostly tell of the noise where nothing is."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# ---------------------------------------------------------------- occlusion


@explainers.register("occlusion")
@dataclass(frozen=True)
class Occlusion:
    """Occlusion (Zeiler & Fergus, ECCV 2014, section 4.2): what the score loses under a square that slides over the picture.

    A pixel's value is the mean loss over the windows that cover it. Windows start every ``stride`` pixels; a last one at the
    border covers what is left. The paper's square is grey.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Occlusion"
    window: int = option(32, help="side of the square, in pixels of the model's frame; at most the frame")
    stride: int = option(8, help="pixels between neighbouring squares, at most the window")
    fill: Fill = option(Grey(), kind="fill", help="what the square shows")
    score: Literal["logit", "probability"] = option("probability", help="which number of the class is lost")

    def __post_init__(self) -> None:
        _at_least("occlusion", 1, window=self.window, stride=self.stride)
        if self.stride > self.window:
            raise ConsilienceError(f"occlusion: a stride above the window leaves gaps; got {self.stride} and {self.window}")

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The mean losses, (h, w) float32 in units of the score."""
        down, across = (windows(side, self.window, self.stride) for side in _frame(view))

        def masks(start: int, stop: int) -> Tensor:
            """One more picture than windows: the first is whole."""
            row, column = np.divmod(np.arange(max(start - 1, 0), stop - 1), len(across))
            hidden = down[row][:, :, None] & across[column][:, None, :]
            whole = np.zeros((1 if start == 0 else 0, *hidden.shape[1:]), dtype=bool)
            return torch.from_numpy(~np.concatenate([whole, hidden]))

        count = len(down) * len(across)
        scores = probe(model, view, Soft(count + 1, masks), target, self.fill.image(view, None), self.label).double().numpy()
        losses = (scores[0] - scores[1:]).reshape(len(down), len(across))
        covered = np.outer(down.sum(axis=0), across.sum(axis=0))
        values = down.T.astype(np.float64) @ losses @ across / covered
        return Heat(torch.from_numpy(values).float(), facts={"passes": count + 1, "windows": [len(down), len(across)]})


def windows(side: int, window: int, stride: int) -> Array:
    """Which pixels of a side each window covers, (n, side) bool; together they cover all."""
    last = max(side - window, 0)
    starts = np.append(np.arange(0, last, stride), last)
    at = np.arange(side)
    return (at >= starts[:, None]) & (at < starts[:, None] + window)


# ---------------------------------------------------------------- dependence on a grid of cells


def cells(values: Array, frame: tuple[int, int]) -> Tensor:
    """Masks (b, h, w) of values (b, s, s), each cell in one value: cells then are the very variables that are drawn."""
    rows, columns = (np.arange(side) * grid // side for side, grid in zip(frame, values.shape[1:], strict=True))
    return torch.from_numpy(values[:, rows[:, None], columns]).float()


def _fits(name: str, grid: int, view: View) -> None:
    if grid > min(_frame(view)):
        raise ConsilienceError(f"{name}: a grid of {grid} cells on a side does not fit a frame of {_frame(view)}")


@explainers.register("sobol")
@dataclass(frozen=True)
class Sobol:
    """Total Sobol indices of the cells of a grid (Fel et al., NeurIPS 2021, equation 5), by Jansen's estimator (1999).

    Each cell is kept to a random degree in [0, 1]; ``S_i = E (f(A) - f(A with cell i of B))^2 / (2 Var f)`` is the share of
    the score's variance that would remain if all but cell i were known, its interactions included. A and B are the halves of a
    scrambled Sobol sequence of ``2 grid^2`` dimensions; the variance is that of both. It takes ``design (grid^2 + 2)`` passes.

    Indices are 0 and up and have no sign: a cell that speaks against the class counts as one that speaks for it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Sobol indices"
    grid: int = option(8, help="cells on a side")
    design: int = option(32, help="points of the design, a power of two")
    fill: Fill = option(Neutral(), kind="fill", help="what stands where a cell is 0; the paper also blurs")
    seed: int = option(0, help="seed of the sequence's scrambling")
    score: Literal["logit", "probability"] = option("probability", help="whose variance is shared out")

    def __post_init__(self) -> None:
        _at_least("sobol", 1, grid=self.grid)
        _at_least("sobol", 2, design=self.design)
        _seed("sobol", self.seed)
        if self.design & (self.design - 1):
            raise ConsilienceError(f"sobol: design is a power of two; got {self.design}")
        if 2 * self.grid**2 > qmc.Sobol.MAXDIM:
            raise ConsilienceError(f"sobol: grid is at most {int((qmc.Sobol.MAXDIM / 2) ** 0.5)}; got {self.grid}")

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The indices, (grid, grid) float32 and up from 0; all 0 where the score never changes."""
        _fits("sobol", self.grid, view)
        a, b = sobol_design(self.grid**2, self.design, self.seed)

        def masks(start: int, stop: int) -> Tensor:
            return cells(jansen_rows(a, b, start, stop).reshape(-1, self.grid, self.grid), _frame(view))

        count = self.design * (self.grid**2 + 2)
        scores = probe(model, view, Soft(count, masks), target, self.fill.image(view, None), self.label).double().numpy()
        facts: dict[str, Any] = {"passes": count, "seed": self.seed}
        if np.ptp(scores) == 0:
            facts["notes"] = [FLAT]
        indices = jansen(scores, self.design).reshape(self.grid, self.grid)
        return Heat(torch.from_numpy(indices).float(), facts=facts)


def sobol_design(variables: int, points: int, seed: int) -> tuple[Array, Array]:
    """Two samples A and B, (points, variables) in [0, 1)."""
    both = qmc.Sobol(2 * variables, scramble=True, rng=np.random.default_rng(seed)).random(points)
    return both[:, :variables], both[:, variables:]


def jansen_rows(a: Array, b: Array, start: int, stop: int) -> Array:
    """Rows of the whole design: A, B, then for each variable in turn A with that variable of B."""
    points = len(a)
    block, row = np.divmod(np.arange(start, stop), points)
    rows = np.where((block == 1)[:, None], b[row], a[row])
    swapped = np.flatnonzero(block >= 2)
    rows[swapped, block[swapped] - 2] = b[row[swapped], block[swapped] - 2]
    return rows


def jansen(scores: Array, points: int) -> Array:
    """Total indices (variables,) of the scores of `jansen_rows`; 0 where they do not vary."""
    blocks = scores.reshape(-1, points)
    variance = blocks[:2].var(ddof=1)
    if variance == 0:
        return np.zeros(len(blocks) - 2)
    found: Array = ((blocks[0] - blocks[2:]) ** 2).mean(axis=1) / (2 * variance)
    return found


@explainers.register("hsic")
@dataclass(frozen=True)
class Hsic:
    """How much the score depends on each cell of a grid, by HSIC (Novello, Fel & Vigouroux, NeurIPS 2022, equation 4).

    Cells are kept or not by a fair coin (Latin hypercube, so that each is kept in half of the masks). The criterion of Hilbert
    and Schmidt, ``tr(K_i H L H) / (n - 1)^2``, has K_i 1 where two masks agree about cell i and else 0, and L a Gaussian of the
    two scores' difference, as wide as the median difference of two masks. It sees any dependence, not only of the mean.

    Values are 0 and up and have no sign. The authors' code takes the median score itself for the width, which depends on
    where the zero of the scores is.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "HSIC"
    masks: int = option(500, help="masked pictures shown to the model")
    grid: int = option(8, help="cells on a side")
    fill: Fill = option(Neutral(), kind="fill", help="what stands where a cell is off")
    seed: int = option(0, help="seed of the masks")
    score: Literal["logit", "probability"] = option("probability", help="whose dependence is measured")

    def __post_init__(self) -> None:
        _at_least("hsic", 4, masks=self.masks)
        _at_least("hsic", 1, grid=self.grid)
        _seed("hsic", self.seed)

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The criterion of each cell, (grid, grid) float32 and up from 0; all 0 where the score never changes."""
        _fits("hsic", self.grid, view)
        on = hypercube(self.grid**2, self.masks, self.seed)

        def masks(start: int, stop: int) -> Tensor:
            return cells(on[start:stop].reshape(-1, self.grid, self.grid), _frame(view))

        fill = self.fill.image(view, None)
        scores = probe(model, view, Soft(self.masks, masks), target, fill, self.label).double().numpy()
        facts: dict[str, Any] = {"passes": self.masks, "seed": self.seed}
        if np.ptp(scores) == 0:
            facts["notes"] = [FLAT]
        return Heat(torch.from_numpy(hsic(on, scores).reshape(self.grid, self.grid)).float(), facts=facts)


def hypercube(variables: int, points: int, seed: int) -> Array:
    """Bits (points, variables), each variable on in half of the points (one more off where their number is odd)."""
    drawn: Array = qmc.LatinHypercube(variables, rng=np.random.default_rng(seed)).random(points)
    return drawn > 0.5


BLOCK = 512
"""Rows of the scores' Gram matrix at a time."""


def hsic(on: Array, scores: Array) -> Array:
    """Criterion (S,) of bits (n, S) against scores (n,); 0 where those do not vary.

    A bit's centred Gram matrix is ``2 z z^T`` with z the centred bit, so only the scores' matrix is made, a block at a time.
    """
    count, width = len(scores), bandwidth(scores)
    if width == 0:
        return np.zeros(on.shape[1])
    centred = on - on.mean(axis=0)
    found: Array = np.zeros(on.shape[1])
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        gram = np.exp(-((scores[part, None] - scores) ** 2) / (2 * width**2))
        found += (centred[part] * (gram @ centred)).sum(axis=0)
    return 2 * found / (count - 1) ** 2


def bandwidth(scores: Array) -> float:
    """Median difference of two scores (of at most 1,000, evenly taken); where that is 0, the mean of those that differ."""
    some = scores[:: max(1, len(scores) // 1000)][:1000]
    differences = np.abs(some[:, None] - some)[np.triu_indices(len(some), 1)]
    middle = float(np.median(differences))
    if middle > 0 or not differences.any():
        return middle
    return float(differences[differences > 0].mean())
