"""XRAI: integrated gradients added up over superpixels of several sizes, best region
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from scipy.ndimage import distance_transform_edt, find_objects

from consilience.explainers.gradients import CHANNELS, Channels, GradientScore
from consilience.explainers.integrated import IntegratedGradients, QuadratureRule
from consilience.perturb.fills import Black, Fill, White
from consilience.perturb.superpixels import Felzenszwalb, Segmenter, segment
from consilience.registry import explainers, option
from consilience.types import Array, Heat, Network, Target, View

SIZES = (25.0, 50.0, 75.0, 125.0, 250.0, 600.0)


@explainers.register("xrai")
@dataclass(frozen=True)
class Xrai:
    """XRAI (Kapishnikov et al., ICCV 2019, algorithm 1): regions by their density of
    integrated gradients.

    Superpixels of several segmentations, each grown by ``grow`` pixels so that it holds
    its own edge, are candidates. The one with the largest mean attribution over what is
    not taken yet is taken, its pixels get that mean, and so on; a candidate that would
    add fewer than ``least`` pixels is dropped, and what nobody took gets its own mean.
    The map has the sum of the integrated gradients. These are the mean of a black and a
    white baseline, so that no colour gets nothing.

    The segmentations are the authors': Felzenszwalb's at six scales on the image
    stretched to its full range (theirs to [-1, 1] and scales twice as large, which is
    the same). Their code takes the largest signed colour where here colours are summed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "XRAI"
    steps: int = option(
        50, help="places on the way from each baseline, a pass each", least=1
    )
    baseline: tuple[Fill, ...] = option(
        (Black(), White()), kind="fill", help="baselines of the integrated gradients"
    )
    segments: tuple[Segmenter, ...] = option(
        tuple(Felzenszwalb(size, 0.8, 150) for size in SIZES),
        kind="segmenter",
        help="segmentations, joined by +",
    )
    grow: int = option(5, help="pixels that each superpixel grows by", least=0)
    least: int = option(50, help="fewest new pixels of a region", least=1)
    rule: QuadratureRule = option(
        "gauss-legendre", help="quadrature of the integrated gradients"
    )
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score a pixel. Extras: ``rank`` (h, w), 0 for the
        region taken first.
        """
        fine = IntegratedGradients(
            self.steps, self.baseline, self.rule, channels=self.channels
        ).explain(model, view, target)
        candidates = regions(view.rgb, self.segments, self.grow)
        values, rank = taken(
            fine.values.cpu().double().numpy(), candidates, self.least
        )
        extras = {**fine.extras, "rank": rank}
        return Heat(
            torch.from_numpy(values).float(),
            extras,
            {**fine.facts, "regions": int(rank.max()) + 1},
        )


# ---- candidates


def regions(
    image: Array, segmenters: Sequence[Segmenter], grow: int
) -> sparse.csr_matrix:
    """Candidates (S, h w), a row each, of an image (h, w, 3); kept as places, not as
    images.
    """
    low, high = image.min(), image.max()
    stretched = (image - low) / (high - low) if high > low else image
    places = [
        region
        for one in segmenters
        for region in _grown(segment(one, stretched), grow)
    ]
    ends = np.cumsum([0, *map(len, places)])
    shape = (len(places), image.shape[0] * image.shape[1])
    return sparse.csr_matrix((np.ones(ends[-1]), np.concatenate(places), ends), shape)


def _grown(labels: Array, grow: int) -> Iterator[Array]:
    """Flat places of each superpixel and of all within ``grow`` pixels of it; only its
    surroundings are looked at.
    """
    height, width = labels.shape
    for label, found in enumerate(find_objects(labels + 1)):
        rows, columns = (
            slice(max(side.start - grow, 0), min(side.stop + grow, most))
            for side, most in zip(found, (height, width), strict=True)
        )
        near = labels[rows, columns] == label
        if grow:
            near = distance_transform_edt(~near) <= grow
        down, across = np.nonzero(near)
        yield (down + rows.start) * width + across + columns.start


# ---- taking them


def taken(
    values: Array, candidates: sparse.csr_matrix, least: int
) -> tuple[Array, Array]:
    """Regions in the order of their gain: the map (h, w) float64 and each pixel's rank.

    Sums and sizes of what is left of each candidate are kept up to date: a pixel is
    taken out of those that hold it once.
    """
    flat = values.ravel()
    holders = candidates.T.tocsr()
    sums, sizes = candidates @ flat, np.diff(candidates.indptr).astype(np.float64)
    gains, rank = np.zeros_like(flat), np.full(flat.shape, -1)
    for turn in range(len(sizes)):
        density = np.divide(
            sums, sizes, out=np.full_like(sums, -math.inf), where=sizes >= least
        )
        best = int(density.argmax())
        if density[best] == -math.inf:
            break
        new = candidates.indices[
            candidates.indptr[best] : candidates.indptr[best + 1]
        ]
        new = new[rank[new] < 0]
        gains[new], rank[new] = flat[new].mean(), turn
        lost = holders[new]
        sums -= lost.T @ flat[new]
        sizes -= np.asarray(lost.sum(axis=0)).ravel()
    rest = rank < 0
    if rest.any():
        gains[rest], rank[rest] = flat[rest].mean(), rank.max() + 1
    return gains.reshape(values.shape), rank.reshape(values.shape)
