"""How alike two maps of one frame are, by name: what stability and sanity are measured
with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from consilience.agreement import overlap
from consilience.agreement.masks import above_cut, pixels_of
from consilience.types import Array

MapSimilarity = Literal["spearman", "pearson", "cosine", "ssim", "iou-at-20"]
TOP_SHARE = 0.2
WINDOW = 7
"""Side of SSIM's window: scikit-image's own."""


def alike(a: Array, b: Array, by: MapSimilarity, magnitude: bool = False) -> float:
    """Similarity of two maps (h, w): 1 for equal maps; ``magnitude`` compares absolute
    values.

    ``spearman`` ranks, ``pearson`` and ``cosine`` values; ``ssim`` (Wang et al. 2004)
    each map divided by its largest magnitude; ``iou-at-20`` the overlap of the largest
    fifths. A flat map says nothing of places: two of them are the same map (1), and it
    has nothing in common with any other (0). Results lie in [-1, 1], those of
    ``iou-at-20`` in [0, 1].
    """
    a, b = (np.abs(values) if magnitude else np.asarray(values) for values in (a, b))
    flat = [values.min() == values.max() for values in (a, b)]
    if any(flat):
        return float(all(flat))
    return min(
        1.0, max(-1.0, MEASURES[by](a.astype(np.float64), b.astype(np.float64)))
    )


def _pearson(a: Array, b: Array) -> float:
    return _cosine(a - a.mean(), b - b.mean())


def _cosine(a: Array, b: Array) -> float:
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / scale) if scale else 0.0


def _ssim(a: Array, b: Array) -> float:
    from skimage.metrics import structural_similarity

    a, b = (values / np.abs(values).max() for values in (a, b))
    span = 1.0 if min(a.min(), b.min()) >= 0 else 2.0
    window = min(WINDOW, min(a.shape) - 1 + min(a.shape) % 2)
    return float(structural_similarity(a, b, data_range=span, win_size=window))


def _iou(a: Array, b: Array) -> float:
    area = pixels_of(TOP_SHARE, a.size)
    masks = above_cut(a, area)[0], above_cut(b, area)[0]
    return overlap.iou(*masks) if masks[0].any() or masks[1].any() else 0.0


MEASURES: Mapping[MapSimilarity, Callable[[Array, Array], float]] = {
    "spearman": overlap.spearman,
    "pearson": _pearson,
    "cosine": _cosine,
    "ssim": _ssim,
    "iou-at-20": _iou,
}
