"""Superpixels: the regions whose presence LIME and its kin switch on and off.

A segmenter sees the image in the model's frame and nothing else. Its randomness, where
it has any, is its own `seed`: the seed of an explainer never reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from consilience.registry import option, segmenters
from consilience.types import Array, ConsilienceError


class Segmenter(Protocol):
    """A frozen dataclass that cuts an image into superpixels."""

    def labels(self, image: Array) -> Array:
        """(h, w, 3) float64 in [0, 1] to (h, w) int64 labels 0..S-1."""


def segment(segmenter: Segmenter, image: Array) -> Array:
    """Labels (h, w) int64 of any segmenter, checked and counted 0..S-1 without gaps:
    what explainers call.

    ``image`` is (h, w, 3) float64 in [0, 1]. One segment over the whole image is legal.
    Raises `ConsilienceError` where the segmenter does not label every pixel of it.
    """
    labels = np.asarray(segmenter.labels(image))
    if labels.shape != image.shape[:2]:
        name = type(segmenter).__name__
        raise ConsilienceError(
            f"{name} labels {labels.shape} pixels; the image has {image.shape[:2]}"
        )
    return relabelled(labels)


def relabelled(labels: Array) -> Array:
    """Labels of any values as int64 0..S-1, in the order of the old ones.

    >>> relabelled(np.array([[7, 7], [3, 9]])).tolist()
    [[1, 1], [0, 2]]
    """
    _, inverse = np.unique(labels, return_inverse=True)
    return inverse.reshape(labels.shape).astype(np.int64)


# ---- quickshift

# ---- the others


@segmenters.register("slic")
@dataclass(frozen=True)
class Slic:
    """k-means in colour and place (Achanta et al. 2012) by scikit-image: superpixels of
    about equal size.
    """

    n_segments: int = option(100, help="about how many superpixels", above=0)
    compactness: float = option(
        10.0, help="weight of place against colour; larger means squarer", above=0
    )
    sigma: float = option(0.0, help="blur before, in pixels", least=0)

    def labels(self, image: Array) -> Array:
        """(h, w, 3) in [0, 1] to (h, w) int64."""
        from skimage.segmentation import slic

        found = slic(
            image,
            n_segments=self.n_segments,
            compactness=self.compactness,
            sigma=self.sigma,
            start_label=0,
        )
        return relabelled(found)


@segmenters.register("felzenszwalb")
@dataclass(frozen=True)
class Felzenszwalb:
    """Graph-based merging (Felzenszwalb & Huttenlocher 2004) by scikit-image:
    superpixels of very unequal size.
    """

    scale: float = option(100.0, help="larger means larger superpixels", above=0)
    sigma: float = option(0.5, help="blur before, in pixels", least=0)
    min_size: int = option(50, help="smallest superpixel, in pixels", above=0)

    def labels(self, image: Array) -> Array:
        """(h, w, 3) in [0, 1] to (h, w) int64."""
        from skimage.segmentation import felzenszwalb

        return relabelled(
            felzenszwalb(
                image, scale=self.scale, sigma=self.sigma, min_size=self.min_size
            )
        )


@segmenters.register("grid")
@dataclass(frozen=True)
class Grid:
    """``n`` x ``n`` cells of equal size, whatever is in the image; row by row from the
    top left.
    """

    n: int = option(8, help="cells on a side", above=0)

    def labels(self, image: Array) -> Array:
        """(h, w, 3) to (h, w) int64; where ``n`` exceeds a side, every pixel of that
        side is a cell.
        """
        rows, columns = (np.arange(side) * self.n // side for side in image.shape[:2])
        return relabelled(rows[:, None] * self.n + columns)
