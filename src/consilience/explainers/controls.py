"""Control maps: what any explanation has to beat before it has shown anything.

They look at neither the model nor the class, so no table is complete without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import numpy as np
import torch

from consilience.registry import explainers, option
from consilience.types import Heat, Model, Target, View


@explainers.register("random")
@dataclass(frozen=True)
class Random:
    """Smooth noise: standard normal numbers on a coarse grid, the same for an image
    each time, other ones for each image.

    A method that cannot beat it has not shown that its map has anything to do with the
    image.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[bool] = True
    seed: int = option(0, help="another noise for every seed", least=0)
    grid: int = option(
        7, help="cells on a side; 7 is the grid of a ResNet's last layer", least=1
    )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """A (grid, grid) map of noise; neither the model nor the target is asked."""
        noise = np.random.default_rng([self.seed, _digest(view)]).standard_normal(
            (self.grid, self.grid)
        )
        return Heat(
            torch.from_numpy(noise).float(), facts={"passes": 0, "seed": self.seed}
        )


@explainers.register("centre")
@dataclass(frozen=True)
class Centre:
    """A Gaussian blob in the middle of the frame.

    Photographers put things in the middle: a method that cannot beat it has not shown
    that it finds the object rather than the centre (such a blob scores 69.6 % in the
    pointing game on VOC).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[bool] = True
    sigma: float = option(
        0.25, help="standard deviation as a share of the frame's side", above=0
    )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """An (h, w) map, 1 at the centre; neither the model nor the target is asked."""
        down, across = (self._profile(side) for side in view.pixels.shape[-2:])
        return Heat(
            torch.from_numpy(np.outer(down, across)).float(), facts={"passes": 0}
        )

    def _profile(self, side: int) -> np.ndarray:
        offset = (np.arange(side) + 0.5) / side - 0.5
        return np.exp(-(offset**2) / (2 * self.sigma**2))


@explainers.register("edges")
@dataclass(frozen=True)
class Edges:
    """The image's own edges: the Sobel magnitude of its luminance.

    A method that cannot beat it, or that looks like it, has not shown that it explains
    the model rather than the image (Adebayo et al. 2018).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[bool] = True

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """An (h, w) map, 0 and up; neither the model nor the target is asked."""
        from skimage.color import rgb2gray
        from skimage.filters import sobel

        edges = sobel(rgb2gray(view.rgb))
        return Heat(torch.from_numpy(edges).float(), facts={"passes": 0})


@explainers.register("constant")
@dataclass(frozen=True)
class Constant:
    """The same value everywhere.

    A method that cannot beat it has not shown that its map says more than no map, and a
    metric that rewards it can be gamed (average drop is 0 for it).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[bool] = True

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """An (h, w) map of ones; neither the model nor the target is asked."""
        return Heat(torch.ones(view.pixels.shape[-2:]), facts={"passes": 0})


def _digest(view: View) -> int:
    """A number of the image's 8-bit values, so that a device's rounding does not change
    the noise.
    """
    pixels = (view.pixels.detach().cpu() * 255).round().to(torch.uint8).contiguous()
    state = blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    state.update(pixels.numpy().tobytes())
    return int.from_bytes(state.digest(), "big")
