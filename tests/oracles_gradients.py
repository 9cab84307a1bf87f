"""The papers' formulas for gradients and paths, in slow loops and float64, written
apart from the code.
"""

from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import gaussian_filter


def score_function(module, index):
    """S(x) of an image (3, h, w) as float64, by a module in float64."""

    def score(image):
        with torch.no_grad():
            return float(module(torch.as_tensor(image)[None].double())[0, index])

    return score


def difference_quotients(score, image, step=1e-5):
    """dS/dx (3, h, w), one value moved at a time."""
    found = np.zeros(image.shape)
    for place in np.ndindex(*image.shape):
        up, down = image.copy(), image.copy()
        up[place] += step
        down[place] -= step
        found[place] = (score(up) - score(down)) / (2 * step)
    return found


def gradient(module, image, index):
    """dS/dx (3, h, w) float64 by autograd, one image."""
    leaf = torch.as_tensor(image)[None].double().requires_grad_()
    module(leaf)[0, index].backward()
    return leaf.grad[0].numpy()


def integrated(module, image, start, index, places, weights):
    """(x - x') sum_k w_k dS/dx(x' + a_k (x - x'))."""
    summed = np.zeros(image.shape)
    for place, weight in zip(places, weights, strict=True):
        summed += weight * gradient(module, start + place * (image - start), index)
    return (image - start) * summed


def by_steps(module, images, index, side):
    """Gradient times step along a list of images; the gradient of a step's start, its
    end, or the mean of both.
    """
    found = np.zeros(images[0].shape)
    for before, after in pairwise(images):
        left, right = gradient(module, before, index), gradient(module, after, index)
        found += {
            "riemann-left": left,
            "riemann-right": right,
            "trapezoid": (left + right) / 2,
        }[side] * (after - before)
    return found


def blurred(image, sigma):
    """(3, h, w) under a Gaussian, mirrored at the borders."""
    return (
        image
        if sigma == 0
        else np.stack(
            [gaussian_filter(channel, sigma, mode="reflect") for channel in image]
        )
    )


def xrai(values, masks, least):
    """XRAI's algorithm 1 on boolean masks, everything computed anew at every turn."""
    covered = np.zeros(values.shape, dtype=bool)
    found = np.zeros(values.shape)
    while True:
        new = [mask & ~covered for mask in masks]
        gains = [
            values[some].mean() if some.sum() >= least else -np.inf for some in new
        ]
        if not gains or max(gains) == -np.inf:
            break
        best = int(np.argmax(gains))
        found[new[best]] = gains[best]
        covered |= new[best]
    if not covered.all():
        found[~covered] = values[~covered].mean()
    return found
