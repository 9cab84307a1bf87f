"""Are there groups among the explanations of one class, or is it one?

SpRAy (Lapuschkin et al., Nature Communications 10:1096, 2019) clusters the maps of a
class and lets a person look whether a cluster rests on something it should not. It
always finds clusters. Here "one" is an answer, and both of two tests have to speak
against it: the silhouette of the best grouping against that of normal maps of the same
covariance (SigClust, Liu et al., JASA 103:483, 2008), and the dip (Hartigan and
Hartigan, Annals of Statistics 13:70, 1985) of the maps along the line between two
groups. The first alone takes objects whose place varies for groups, since such maps lie
on a bent sheet; along it they have no gap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import zoom

from consilience import stats
from consilience.types import Array, ConsilienceError, Explanation

GRID = 14
"""Cells on a side that maps are averaged to: finer detail is not what groups them."""

COMPONENTS = 5
MOST = 6
NULLS = 199
RESAMPLES = 50
FEWEST = 8
NO_CONCEPT = "units without a concept"
TYPICAL = 6


@dataclass(frozen=True)
class ConceptShare:
    """A concept's mean share of the maps of a group and of the others (NaN where there
    are none), and whether they differ by more than permuted groups do, at the largest
    difference of all concepts at .05. "" collects units that detect no concept.
    """

    concept: str
    here: float
    elsewhere: float
    shown: bool


@dataclass(frozen=True, eq=False)
class Cluster:
    """A group of images: places in the order given (n_k,), the most ``typical`` first.

    ``mean`` (g, g) is the mean map; ``apart`` (g, g) its difference from the other
    images' mean, ``shown`` (g, g) bool where that is more than chance (permuted groups,
    the largest difference over cells at .05). ``stability`` is the mean Jaccard index
    with its best match in resamples (Hennig 2007: above .75 stable, below .6 not).
    ``right`` and ``known`` count images that are classified as labelled, of those with
    a label. ``concepts`` are those of a dissection that the maps were made with, the
    largest difference first; none without one.
    """

    members: Array
    typical: Array
    mean: Array
    apart: Array
    shown: Array
    stability: float
    right: int
    known: int
    concepts: tuple[ConceptShare, ...] = ()

    def apart_by(self) -> tuple[ConceptShare, ...]:
        """The concepts whose share is shown to differ from the other images'."""
        return tuple(one for one in self.concepts if one.shown)


@dataclass(frozen=True, eq=False)
class Clusters:
    """What was found among maps of one class by one method.

    ``count`` is 1 where ``p``, the larger of ``p_silhouette`` and ``p_dip``, is above
    .05; ``silhouette`` is the best grouping's, ``by_chance`` its mean over normal maps,
    ``tried`` its number of groups. ``labels`` (n,) number
    the clusters from the largest, ``agreement`` is the mean adjusted Rand index with
    clusters of resamples.
    """

    images: tuple[str, ...]
    method: str
    class_name: str
    count: int
    tried: int
    silhouette: float
    by_chance: float
    p_silhouette: float
    p_dip: float
    labels: Array
    agreement: float
    clusters: tuple[Cluster, ...]

    @property
    def p(self) -> float:
        """p of one cluster: both tests have to speak against it."""
        return max(self.p_silhouette, self.p_dip)

    def table(self) -> pd.DataFrame:
        """A row a cluster, the largest first."""
        return pd.DataFrame(
            {
                "cluster": number,
                "images": len(one.members),
                "stability": one.stability,
                "accuracy": one.right / one.known if one.known else math.nan,
                "known": one.known,
                "cells_apart": int(one.shown.sum()),
                "concepts_apart": "; ".join(
                    f"{share.concept or NO_CONCEPT} {share.here:.3f} against "
                    f"{share.elsewhere:.3f}"
                    for share in one.apart_by()
                ),
                "typical": ", ".join(self.images[at] for at in one.typical),
            }
            for number, one in enumerate(self.clusters, start=1)
        )

    def sentence(self) -> str:
        """What was shown."""
        by = (
            f"silhouette {self.silhouette:.3f}, one cluster gives {self.by_chance:.3f}, "
            f"p {self.p_silhouette:.3f}; dip p {self.p_dip:.3f}; {len(self.images)} images"
        )
        if self.count == 1:
            return f"{self.class_name} by {self.method}: no groups shown ({by})."
        sizes = ", ".join(str(len(one.members)) for one in self.clusters)
        return (
            f"{self.class_name} by {self.method}: {self.count} groups of {sizes} images "
            f"({by}; resamples agree by {self.agreement:.2f}, adjusted Rand)."
        )


def clusters_of(
    explanations: Sequence[Explanation],
    most: int = MOST,
    nulls: int = NULLS,
    seed: int = 0,
) -> Clusters:
    """Groups among explanations of one class by one method.

    Raises `ConsilienceError` for fewer than eight, for several methods or classes, and
    where every map is the same.
    """
    kinds = {(one.explainer, one.target.name) for one in explanations}
    if len(kinds) > 1:
        said = "; ".join(sorted(f"{by} of {name}" for by, name in kinds)[:4])
        raise ConsilienceError(
            f"clusters are of one method and one class; got {len(kinds)}: {said}"
        )
    if len(explanations) < FEWEST:
        raise ConsilienceError(
            f"clusters need {FEWEST} maps of a class; got {len(explanations)}"
        )
    maps = np.stack([on_grid(one.values) for one in explanations])
    [(method, name)] = kinds
    correct = np.array([_right(one) for one in explanations], np.float64)
    names = tuple(one.sample.name for one in explanations)
    found = cluster_maps(maps, names, method, name, correct, most, nulls, seed)
    shares, concepts = concept_shares(explanations)
    return with_concepts(found, shares, concepts, seed) if concepts else found


def concept_shares(
    explanations: Sequence[Explanation],
) -> tuple[Array, tuple[str, ...]]:
    """The share (n, concepts) of each map that units of a concept carry, as a dissection
    told them (`dissection.units.Carried`), and the concepts; NaN for a map of which it
    could not.
    """
    told = [
        (one.provenance.get("units") or {}).get("concepts") for one in explanations
    ]
    concepts = tuple(sorted({name for one in told if one for name in one}))
    rows = [
        [math.nan if one is None else one.get(name, 0.0) for name in concepts]
        for one in told
    ]
    return np.array(rows, np.float64).reshape(len(told), len(concepts)), concepts


def with_concepts(
    found: Clusters, shares: Array, concepts: Sequence[str], seed: int = 0
) -> Clusters:
    """Groups with the concepts whose shares (n, concepts) differ between them; images
    whose shares are not known are left out.
    """
    known = np.isfinite(shares).all(1)
    rows, labels = shares[known], found.labels[known]
    groups = []
    for number, one in enumerate(found.clusters):
        inside = labels == number
        if not inside.any() or (inside.all() and found.count > 1):
            groups.append(one)  # nothing is known of one side
            continue
        here = rows[inside].mean(0)
        others = np.full(len(concepts), math.nan)
        shown = np.zeros(len(concepts), bool)
        if not inside.all():
            others = rows[~inside].mean(0)
            _, shown = _apart(rows, inside, seed)
        size = np.abs(here if inside.all() else here - others)
        groups.append(
            replace(
                one,
                concepts=tuple(
                    ConceptShare(
                        concepts[at],
                        float(here[at]),
                        float(others[at]),
                        bool(shown[at]),
                    )
                    for at in np.argsort(-size, kind="stable")
                ),
            )
        )
    return replace(found, clusters=tuple(groups))


def _right(one: Explanation) -> float:
    """1 or 0 for an image with a label, else NaN."""
    label = one.sample.label
    said = (one.provenance.get("prediction") or {}).get("index")
    return math.nan if label is None or said is None else float(said == label)


def on_grid(values: Array, side: int = GRID) -> Array:
    """A map's means over cells, (side, side); a smaller map is enlarged."""
    array = np.asarray(values, np.float64)
    if min(array.shape) < side:
        factors = [side / length for length in array.shape]
        enlarged: Array = zoom(
            array, factors, order=1, grid_mode=True, mode="nearest"
        )
        return enlarged
    for axis in (0, 1):
        edges = np.linspace(0, array.shape[axis], side + 1).round().astype(int)
        sums = np.add.reduceat(array, edges[:-1], axis=axis)
        lengths = np.diff(edges)
        array = sums / (lengths[:, None] if axis == 0 else lengths[None, :])
    return array


def cluster_maps(
    maps: Array,
    names: Sequence[str],
    method: str = "",
    class_name: str = "",
    correct: Array | None = None,
    most: int = MOST,
    nulls: int = NULLS,
    seed: int = 0,
) -> Clusters:
    """Groups among maps (n, g, g), each brought to length 1; ``correct`` (n,) is 1, 0 or
    NaN. See `clusters_of`.
    """
    if most < 2 or nulls < 19:
        raise ConsilienceError(
            f"clusters need most >= 2 and nulls >= 19; got {most} and {nulls}"
        )
    rows = maps.reshape(len(maps), -1).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    points, spreads = _components(rows)
    most = min(most, (len(rows) - 1) // 3)
    score, tried, labels = _best(points, most, seed)
    rng = np.random.default_rng(seed)
    chance = np.array(
        [
            _best(rng.standard_normal(points.shape) * spreads, most, seed)[0]
            for _ in range(nulls)
        ]
    )
    p = float((1 + np.count_nonzero(chance >= score)) / (1 + nulls))
    p_dip = _dip(points, seed)
    if max(p, p_dip) > 0.05:
        labels = np.zeros(len(rows), int)
    labels = _by_size(labels)
    count = int(labels.max()) + 1
    agreement, jaccard = _resampled(points, labels, count, seed)
    known = np.full(len(rows), math.nan) if correct is None else correct
    shaped = rows.reshape(maps.shape)
    groups = tuple(
        _cluster(shaped, points, labels, number, jaccard[number], known, seed)
        for number in range(count)
    )
    return Clusters(
        tuple(names),
        method,
        class_name,
        count,
        tried,
        score,
        float(chance.mean()),
        p,
        p_dip,
        labels,
        agreement,
        groups,
    )


def _components(rows: Array) -> tuple[Array, Array]:
    """Principal components (n, d) and the standard deviation of each."""
    centred = rows - rows.mean(0)
    if not np.abs(centred).max() > 1e-12:
        raise ConsilienceError("every map is the same: there is nothing to group")
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(COMPONENTS, int((values > 1e-9 * values[0]).sum()))
    points: Array = left[:, :kept] * values[:kept]
    return points, points.std(0, ddof=1)


def _best(points: Array, most: int, seed: int) -> tuple[float, int, Array]:
    """The grouping by k-means of the largest silhouette: that, its number, labels."""
    from sklearn.metrics import silhouette_score

    found = (-1.0, 1, np.zeros(len(points), int))
    for count in range(2, most + 1):
        labels = _kmeans(points, count, seed).labels_
        if len(np.unique(labels)) < 2:
            continue
        score = float(silhouette_score(points, labels))
        if score > found[0]:
            found = (score, count, labels)
    return found


def _dip(points: Array, seed: int) -> float:
    """p of one mode along the line between the centres of two groups."""
    from diptest import diptest

    labels = _kmeans(points, 2, seed).labels_
    line = points[labels == 1].mean(0) - points[labels == 0].mean(0)
    return float(diptest(points @ line)[1])


def _kmeans(points: Array, count: int, seed: int) -> Any:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        return KMeans(count, n_init=5, random_state=seed).fit(points)


def _by_size(labels: Array) -> Array:
    """The same groups, numbered from the largest; of two alike the first met first."""
    groups, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = sorted(range(len(groups)), key=lambda at: (-sizes[at], first[at]))
    new = {groups[at]: number for number, at in enumerate(order)}
    return np.array([new[one] for one in labels])


def _resampled(
    points: Array, labels: Array, count: int, seed: int
) -> tuple[float, Array]:
    """How much clusters of resamples agree: mean adjusted Rand index of the images
    drawn, and by cluster the mean Jaccard index with its best match.
    """
    from sklearn.metrics import adjusted_rand_score

    if count == 1:
        return math.nan, np.array([math.nan])
    rng = np.random.default_rng(seed)
    rand: list[float] = []
    jaccard: list[list[float]] = [[] for _ in range(count)]
    for draw in range(RESAMPLES):
        drawn = np.unique(rng.integers(0, len(points), len(points)))
        if len(drawn) <= count:
            continue
        again = _kmeans(points[drawn], count, seed + draw).labels_
        own = labels[drawn]
        rand.append(float(adjusted_rand_score(own, again)))
        for number in range(count):
            mine = own == number
            if mine.any():
                jaccard[number].append(
                    max(
                        float(
                            (mine & (again == other)).sum()
                            / (mine | (again == other)).sum()
                        )
                        for other in np.unique(again)
                    )
                )
    return float(np.mean(rand)), np.array([np.mean(one) for one in jaccard])


def _cluster(
    maps: Array,
    points: Array,
    labels: Array,
    number: int,
    stability: float,
    known: Array,
    seed: int,
) -> Cluster:
    inside = labels == number
    members = np.flatnonzero(inside)
    centre = points[inside].mean(0)
    order = np.argsort(
        np.linalg.norm(points[members] - centre, axis=1), kind="stable"
    )
    if inside.all():
        apart, shown = np.zeros(maps.shape[1:]), np.zeros(maps.shape[1:], bool)
    else:
        apart, shown = _apart(maps, inside, seed)
    mine = known[members]
    return Cluster(
        members,
        members[order][:TYPICAL],
        maps[inside].mean(0),
        apart,
        shown,
        float(stability),
        int(np.nansum(mine)),
        int(np.isfinite(mine).sum()),
    )


def _apart(
    maps: Array, inside: Array, seed: int, draws: int = 999
) -> tuple[Array, Array]:
    """Where a group's mean of maps or numbers (n, ...) differs from the others' by more
    than groups drawn anew do,
    at the largest of all cells.

    The groups were made from the maps, so that this describes what separates them; that
    they are there is shown by the silhouette alone.
    """
    rows = maps.reshape(len(maps), -1)

    def difference(chosen: Array) -> Array:
        weights = np.where(chosen, 1 / chosen.sum(), -1 / (~chosen).sum())
        found: Array = weights @ rows
        return found

    apart = difference(inside)
    rng = np.random.default_rng(seed)
    largest = np.array(
        [np.abs(difference(rng.permutation(inside))).max() for _ in range(draws)]
    )
    bar = np.sort(largest)[math.ceil(0.95 * (draws + 1)) - 1]
    shape = maps.shape[1:]
    return apart.reshape(shape), (np.abs(apart) > bar).reshape(shape)


def accuracy_interval(one: Cluster) -> stats.Interval:
    """The share of images that are classified as labelled, with Wilson's interval."""
    return stats.wilson(one.right, one.known)
