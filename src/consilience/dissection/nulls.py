"""Could a unit that knows nothing of the labels have reached its IoU?

Whole label stacks are permuted between images, the same way for all units, so that
everything about a unit's masks and about the labels stays, and only which belongs to
which goes. Images are permuted among those annotated for the same categories, so that
the union of the paper stays as it is. The statistic is a unit's best IoU over all
eligible concepts: its p respects the search over them.

It is computed on the grid of the labels, as that of detectors is, where that fits into
memory. On a coarser one (`coarse.Gathered`) a cell in which a unit covers u of A pixels
and a concept l shares u l / A of them, which is what they share on average where neither
knows of the other; the observed statistic is computed so too, and p is valid whatever
the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from scipy import sparse

from consilience import progress
from consilience.dissection.coarse import Gathered
from consilience.dissection.result import NullResult
from consilience.metrics.sanity import own_tensors, randomise
from consilience.models.layers import weights_changed
from consilience.types import Array, ConsilienceError, Network

UPPER_QUANTILE = 0.95
"""Of the resamples in which one of a unit's alternatives is best."""

RESAMPLES_AT_ONCE = 50
UNITS_AT_ONCE = 64
"""Whose overlaps by image stand at a time in the bootstrap: what it takes most memory
for.
"""
THREADS = 2


# ---- IoU on the grid


@dataclass(frozen=True, eq=False)
class Coarse:
    """Overlaps of units with the concepts ``eligible`` (E,), of categories
    ``category_of`` (E,), in pixels.
    """

    gathered: Gathered
    eligible: Array
    category_of: Array

    def of(self, first: int, last: int) -> Coarse:
        """The same of units ``first`` to ``last`` alone, numbered anew; labels are
        shared.
        """
        found = self.gathered
        last = min(last, found.units)
        rows = slice(*np.searchsorted(found.owners, [first, last]))
        some = replace(
            found,
            units=last - first,
            owners=found.owners[rows] - first,
            places=found.places[rows],
            cells=found.cells[rows],
            pixels=found.pixels[rows],
        )
        part = Coarse(some, self.eligible, self.category_of)
        part.__dict__["labels"] = self.labels
        return part

    @cached_property
    def labels(self) -> Any:
        """Sparse (images x cells, E): the share of a cell that shows a concept."""
        found = self.gathered
        column = np.full(found.concepts, -1)
        column[self.eligible] = np.arange(len(self.eligible))
        kept = column[found.shown_concepts] >= 0
        rows = (
            found.shown_places[kept].astype(np.int64) * found.size
            + found.shown_cells[kept]
        )
        shares = found.shown_pixels[kept] / found.areas[found.shown_cells[kept]]
        entries = shares, (rows, column[found.shown_concepts[kept]])
        return sparse.csr_matrix(
            entries, shape=(found.images * found.size, len(self.eligible))
        )

    @cached_property
    def _starts(self) -> Array:
        counts = np.bincount(self.gathered.owners, minlength=self.gathered.units)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    @cached_property
    def _covered(self) -> Array:
        return self.gathered.pixels.astype(np.float64)

    @cached_property
    def unit_pixels(self) -> Array:
        """Pixels (U, K) of every unit in images annotated for each category; permuting
        within strata leaves them.
        """
        found = self.gathered
        pixels = np.zeros((found.units, found.annotated.shape[1]))
        for category in range(pixels.shape[1]):
            counted = found.annotated[found.places, category]
            pixels[:, category] = np.bincount(
                found.owners[counted], self._covered[counted], minlength=found.units
            )
        return pixels

    @cached_property
    def label_pixels(self) -> Any:
        """Pixels (images x cells, E) of every concept, sparse."""
        areas = np.tile(self.gathered.areas, self.gathered.images)
        return sparse.diags_array(areas.astype(np.float64)) @ self.labels

    @cached_property
    def _sums(self) -> Array:
        labels = np.asarray(self.label_pixels.sum(axis=0)).ravel()
        sums: Array = self.unit_pixels[:, self.category_of] + labels
        return sums

    def best(self, order: Array | None = None) -> Array:
        """Best IoU (U,) of every unit; with ``order`` (N,), image n shows the labels of
        image ``order[n]``.
        """
        found = self.gathered
        places = found.places if order is None else order[found.places]
        columns = places * np.int32(found.size) + found.cells
        shape = (found.units, found.images * found.size)
        shared = (
            sparse.csr_matrix((self._covered, columns, self._starts), shape=shape)
            @ self.labels
        ).tocoo()
        iou = shared.data / (self._sums[shared.row, shared.col] - shared.data)
        best = np.zeros(found.units)
        np.maximum.at(best, shared.row, iou)
        return best


def strata(annotated: Array) -> list[Array]:
    """Images by the set of categories (N, K) that they are annotated for."""
    _, kinds = np.unique(annotated, axis=0, return_inverse=True)
    return [
        np.flatnonzero(kinds.ravel() == kind)
        for kind in range(int(kinds.max(initial=-1)) + 1)
    ]


def permuted(groups: Sequence[Array], count: int, seed: int, number: int) -> Array:
    """Permutation ``number`` of a seed: (count,), shuffled within the groups."""
    rng = np.random.default_rng((seed, number))
    order = np.arange(count, dtype=np.int32)
    for group in groups:
        order[group] = rng.permutation(group)
    return order


# ---- the null


def permutation_null(
    coarse: Coarse,
    layers: Sequence[slice],
    threshold: float,
    permutations: int,
    seed: int,
) -> tuple[Array, Array, list[float]]:
    """p (U,), mean best IoU under the null (U,), and by layer the mean number of units
    over ``threshold``.

    ``layers`` are the units of each layer. Raises `ConsilienceError` for less than one
    permutation.
    """
    if permutations < 1:
        raise ConsilienceError(
            f"a null needs at least one permutation; got {permutations}"
        )
    groups = strata(coarse.gathered.annotated)
    observed = coarse.best()
    as_high, total, over = (
        np.zeros(len(observed), dtype=np.int64),
        np.zeros(len(observed)),
        np.zeros(len(observed)),
    )

    def once(number: int) -> Array:
        return coarse.best(permuted(groups, coarse.gathered.images, seed, number))

    with (
        progress.task("permuting labels", permutations) as running,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for start in range(0, permutations, 16):
            for best in pool.map(once, range(start, min(start + 16, permutations))):
                as_high += best >= observed * (1 - 1e-12)
                total += best
                over += best > threshold
                running.advance()
    expected = [float(over[units].sum() / permutations) for units in layers]
    return (1 + as_high) / (1 + permutations), total / permutations, expected


def results(
    gathered: Gathered,
    eligible: Array,
    category_of: Array,
    layers: Sequence[slice],
    own: Array,
    *,
    threshold: float,
    permutations: int,
    resamples: int,
    seed: int,
) -> list[NullResult]:
    """The null of every layer; ``eligible`` (E,) are concepts, ``category_of`` (C,)
    categories, ``own`` (U,) units' labels.
    """
    if not len(eligible):
        nothing = gathered.units
        p, expected, over = np.ones(nothing), np.zeros(nothing), [0.0] * len(layers)
        several: list[tuple[int, ...]] = [()] * nothing
    else:
        coarse = Coarse(gathered, eligible, category_of[eligible])
        p, expected, over = permutation_null(
            coarse, layers, threshold, permutations, seed
        )
        several = alternatives(coarse, own, resamples, seed)
    return [
        NullResult(
            p[units],
            scipy.stats.false_discovery_control(p[units]),
            expected[units],
            over[place],
            tuple(several[units.start : units.stop]),
        )
        for place, units in enumerate(layers)
    ]


# ---- which labels it could as well be


def alternatives(
    coarse: Coarse, own: Array, resamples: int, seed: int
) -> list[tuple[int, ...]]:
    """By unit its ``own`` label (U,), and the fewest others that with it are best in 95
    % of resamples of the images.

    A bootstrap over images: each is drawn as often as chance will have it, and IoU is
    taken over those drawn.
    """
    wins = (
        _wins(coarse, resamples, seed)
        if resamples
        else np.zeros((len(own), len(coarse.eligible)), dtype=np.int64)
    )
    return [
        _several(int(label), row, coarse.eligible, resamples)
        for label, row in zip(own, wins, strict=True)
    ]


def _several(
    own: int, wins: Array, eligible: Array, resamples: int
) -> tuple[int, ...]:
    if own < 0:
        return ()
    covered = int(wins[eligible == own].sum())
    chosen = [own]
    for place in np.argsort(-wins, kind="stable"):
        if covered >= UPPER_QUANTILE * resamples or not wins[place]:
            break
        if eligible[place] != own:
            chosen.append(int(eligible[place]))
            covered += int(wins[place])
    return tuple(chosen)


def _wins(coarse: Coarse, resamples: int, seed: int) -> Array:
    """In how many resamples each eligible concept is a unit's best (U, E)."""
    labels, images = _label_counts(coarse), coarse.gathered.images
    rng = np.random.default_rng((seed, 2))
    sizes = [
        min(RESAMPLES_AT_ONCE, resamples - start)
        for start in range(0, resamples, RESAMPLES_AT_ONCE)
    ]
    even = np.full(images, 1 / images)
    draws = [
        rng.multinomial(images, even, size).T.astype(np.float64) for size in sizes
    ]
    parts = [
        coarse.of(start, start + UNITS_AT_ONCE)
        for start in range(0, coarse.gathered.units, UNITS_AT_ONCE)
    ]
    return np.concatenate([_wins_of(part, labels, draws) for part in parts])


def _wins_of(coarse: Coarse, labels: Any, draws: Sequence[Array]) -> Array:
    """The same for ``draws`` (N, B), how often each image was drawn."""
    found = coarse.gathered
    shared, owners, columns = _by_image(coarse)
    units, kinds = _unit_counts(coarse), coarse.category_of[columns]
    wins = np.zeros((found.units, len(coarse.eligible)), dtype=np.int64)
    for drawn in draws:
        overlap = shared @ drawn
        unions = (
            (units @ drawn)[owners * found.annotated.shape[1] + kinds]
            + (labels @ drawn)[columns]
            - overlap
        )
        iou = np.divide(overlap, unions, out=np.zeros_like(overlap), where=unions > 0)
        _count_wins(wins, iou, owners, columns)
    return wins


def _count_wins(wins: Array, iou: Array, owners: Array, columns: Array) -> None:
    """Rows of ``iou`` (R, B) belong to ``owners`` (R,), sorted, and concepts
    ``columns`` (R,).
    """
    units, starts = np.unique(owners, return_index=True)
    stops = np.append(starts, len(owners))[1:]  # none where no unit meets a label
    for unit, start, stop in zip(units, starts, stops, strict=True):
        best = iou[start:stop].argmax(axis=0)
        hit = iou[start:stop].max(axis=0) > 0
        np.add.at(wins[unit], columns[start + best[hit]], 1)


def _by_image(coarse: Coarse) -> tuple[Any, Array, Array]:
    """Shared pixels as sparse (R, N), a row for every unit and concept that meet, with
    their units and concepts (R,).
    """
    found = coarse.gathered
    keys = found.owners.astype(np.int64) * found.images + found.places
    pairs, starts = np.unique(keys, return_index=True)
    columns = found.places * np.int32(found.size) + found.cells
    pointers = np.concatenate([starts, [len(keys)]]).astype(np.int32)
    shape = (len(pairs), found.images * found.size)
    shared = (
        sparse.csr_matrix((coarse._covered, columns, pointers), shape=shape)
        @ coarse.labels
    ).tocoo()
    owner, place = np.divmod(pairs[shared.row], found.images)
    rows, inverse = np.unique(
        owner * len(coarse.eligible) + shared.col, return_inverse=True
    )
    entries = shared.data.astype(np.float64), (inverse.ravel(), place)
    owners, concepts = np.divmod(rows, len(coarse.eligible))
    return (
        sparse.csr_matrix(entries, shape=(len(rows), found.images)),
        owners,
        concepts,
    )


def _unit_counts(coarse: Coarse) -> Any:
    """Pixels of a unit in an image that counts for a category, sparse (U x K, N)."""
    found = coarse.gathered
    kinds = found.annotated.shape[1]
    pairs, inverse = np.unique(
        found.owners.astype(np.int64) * found.images + found.places,
        return_inverse=True,
    )
    counts = np.bincount(inverse, coarse._covered, minlength=len(pairs))
    owners, places = np.divmod(pairs, found.images)
    pair, category = np.nonzero(found.annotated[places])
    entries = (
        counts[pair],
        (owners[pair] * kinds + category, places[pair]),
    )
    return sparse.csr_matrix(entries, shape=(found.units * kinds, found.images))


def _label_counts(coarse: Coarse) -> Any:
    """Pixels of a concept in an image, sparse (E, N)."""
    found, shown = coarse.gathered, coarse.label_pixels.tocoo()
    entries = shown.data, (shown.col, shown.row // found.size)
    return sparse.csr_matrix(entries, shape=(len(coarse.eligible), found.images))


# ---- the same network that has learned nothing


def with_random_weights(model: Network, seed: int) -> Network:
    """The same architecture as it is before training: every part's own initialisation,
    drawn with ``seed``.

    A part that does not say how it begins (class tokens, positions, scales) gets normal
    numbers of its own mean and deviation.
    """
    module = copy.deepcopy(model.module)
    for name, part in module.named_modules():
        if own_tensors(part):
            randomise(part, name, "reset", seed)
    weights_changed(module)
    return model.with_module(module)
