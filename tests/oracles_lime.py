"""Slow, literal formulas for perturbations and their surrogate, and models of known
answers.
"""

import numpy as np
import torch

from consilience import images
from consilience.types import ClassTarget, View


class Linear:
    """A model whose two outputs are plane dot products with the image: scores are exact
    and cost nothing.
    """

    id, spec, classes, outputs, can = (
        "linear",
        None,
        ("first", "second"),
        "logits",
        frozenset(),
    )

    def __init__(self, planes, batch=32, bend=lambda values: values):
        self.planes, self.batch, self.bend, self.sizes = (
            torch.as_tensor(planes, dtype=torch.float64),
            batch,
            bend,
            [],
        )

    def scores(self, pixels):
        self.sizes.append(len(pixels))
        return self.bend(
            torch.einsum("nchw,kchw->nk", pixels.double(), self.planes)
        ).float()


class Eavesdropper(Linear):
    """The same, keeping every image it was shown."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def scores(self, pixels):
        self.seen.append(pixels.clone())
        return super().scores(pixels)


def random_model(shape, seed=0, batch=32, scale=0.01, bend=lambda values: values):
    planes = np.random.default_rng(seed).normal(0, scale, (2, 3, *shape))
    return Linear(planes, batch, bend)


def textured(seed=0, shape=(64, 48)):
    """A synthetic uint8 image with blobs, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = (
        np.stack([np.sin(x / 7 + seed), np.cos(y / 5), np.sin((x + y) / 9)], axis=2)
        * 60
        + 128
    )
    image[10:30, 12:28] += (60, -50, 20)
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def view_of(pixels):
    size = pixels.shape[:2]
    return View(
        images.to_tensor(pixels), images.Placement.squash(size, size), "squash"
    )


def target(score="probability", index=0):
    return ClassTarget(index, "first", score)


def composed(image, fill, segments, row):
    """One edited image, pixel by pixel: (3, h, w) arrays in, one out."""
    edited = np.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            keep = 1.0 if row[segments[y, x]] else 0.0
            for c in range(3):
                edited[c, y, x] = keep * image[c, y, x] + (1 - keep) * fill[c, y, x]
    return edited


def blended(image, fill, keep):
    """The same for a soft mask (h, w)."""
    edited = np.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            for c in range(3):
                edited[c, y, x] = (
                    keep[y, x] * image[c, y, x] + (1 - keep[y, x]) * fill[c, y, x]
                )
    return edited


def enlarged(grid, size, align_corners=False):
    """Bilinear interpolation of a (h', w') grid, one output pixel at a time."""
    out = np.empty(size)
    for y in range(size[0]):
        for x in range(size[1]):
            spots = []
            for at, length, cells in (
                (y, size[0], grid.shape[0]),
                (x, size[1], grid.shape[1]),
            ):
                place = (
                    at * (cells - 1) / (length - 1)
                    if align_corners
                    else (at + 0.5) * cells / length - 0.5
                )
                place = min(max(place, 0.0), cells - 1.0)
                low = int(np.floor(place))
                spots.append((low, min(low + 1, cells - 1), place - low))
            (y0, y1, fy), (x0, x1, fx) = spots
            top = (1 - fx) * grid[y0, x0] + fx * grid[y0, x1]
            bottom = (1 - fx) * grid[y1, x0] + fx * grid[y1, x1]
            out[y, x] = (1 - fy) * top + fy * bottom
    return out


def cosine_kernel(on, width):
    """LIME's kernel from the definition of cosine distance to a row of ones."""
    weights = []
    for row in on.astype(float):
        ones = np.ones(len(row))
        length = np.sqrt(row @ row)
        distance = (
            1.0 if length == 0 else 1 - (row @ ones) / (length * np.sqrt(ones @ ones))
        )
        weights.append(np.sqrt(np.exp(-(distance**2) / width**2)))
    return np.array(weights)


def normal_equations(on, scores, weights, alpha):
    """Weighted ridge with an intercept that is not penalised: (coefficients,
    intercept), from the normal equations.
    """
    design = np.hstack([np.ones((len(on), 1)), on.astype(float)])
    penalty = alpha * np.eye(design.shape[1])
    penalty[0, 0] = 0
    left = (
        sum(w * np.outer(row, row) for w, row in zip(weights, design, strict=True))
        + penalty
    )
    right = sum(
        w * y * row for w, y, row in zip(weights, scores, design, strict=True)
    )
    solution = np.linalg.solve(left, right)
    return solution[1:], solution[0]


def weighted_r2(on, scores, weights, coefficients, intercept):
    """1 - weighted residual sum of squares / weighted total sum of squares."""
    mean = sum(w * y for w, y in zip(weights, scores, strict=True)) / sum(weights)
    fitted = [intercept + row @ coefficients for row in on.astype(float)]
    residual = sum(
        w * (y - f) ** 2 for w, y, f in zip(weights, scores, fitted, strict=True)
    )
    return 1 - residual / sum(
        w * (y - mean) ** 2 for w, y in zip(weights, scores, strict=True)
    )
