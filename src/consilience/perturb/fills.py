"""What is put in place of the parts of an image that are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consilience import images
from consilience.registry import fills, option
from consilience.types import Array, ConsilienceError, View

# ---- what takes the place of the rest


class Fill(Protocol):
    """A frozen dataclass that says what stands where the image is removed."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1] on the view's device; ``segments`` (h, w) labels
        0..S-1 where the method has them.
        """


@fills.register("mean")
@dataclass(frozen=True)
class MeanFill:
    """Each superpixel in its own mean colour, in float64: the mean of [0, 1] values,
    never cut to whole numbers.
    """

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]; raises `ConsilienceError` without superpixels."""
        if segments is None:
            others = ", ".join(name for name in fills.names() if name != "mean")
            raise ConsilienceError(
                f"fill mean needs superpixels, and this method has none; there is: {others}"
            )
        flat = segments.ravel()
        size = np.bincount(flat)
        array = images.to_array(view.pixels)
        channels = array.reshape(-1, array.shape[2]).T
        means = np.stack(
            [np.bincount(flat, weights=channel) / size for channel in channels]
        )
        return _like(means[:, segments], view)


@fills.register("percentile")
@dataclass(frozen=True)
class PercentileFill:
    """One colour: the ``q``-th percentile of each colour channel over the image."""

    q: float = option(20.0, help="0 to 100", least=0, most=100)

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        return _plain(
            np.percentile(images.to_array(view.pixels), self.q, axis=(0, 1)), view
        )


@fills.register("blur")
@dataclass(frozen=True)
class BlurFill:
    """The image itself, out of focus: a Gaussian of ``sigma`` pixels, mirrored at the
    borders.
    """

    sigma: float = option(10.0, help="standard deviation in pixels", above=0)

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        return images.blur(view.pixels, self.sigma).clamp(0, 1)


@fills.register("colour")
@dataclass(frozen=True)
class ColourFill:
    """One colour: red, green and blue in [0, 1], as ``colour(.5+.2+0)``; a number a
    channel where there are not three, or one for all.
    """

    rgb: tuple[float, ...] = option(
        (0.5, 0.5, 0.5), help="red+green+blue, each 0 to 1", least=0, most=1
    )

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]; `ConsilienceError` for another number of channels."""
        channels = int(view.pixels.shape[1])
        if len(self.rgb) not in (1, channels):
            raise ConsilienceError(
                f"fill colour has {len(self.rgb)} numbers; the image has {channels} "
                f"channel{'s' if channels > 1 else ''}"
            )
        return _plain(np.array(self.rgb * (channels // len(self.rgb))), view)


@fills.register("neutral")
@dataclass(frozen=True)
class NeutralFill:
    """The colour that the network takes as zero: the mean it normalises with, black
    where the model names none.
    """

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        return _plain(np.array(view.neutral), view)


@fills.register("black")
@dataclass(frozen=True)
class Black:
    """Black: 0 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) of 0."""
        return torch.zeros_like(view.pixels)


@fills.register("white")
@dataclass(frozen=True)
class White:
    """White: 1 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) of 1."""
        return torch.ones_like(view.pixels)


@fills.register("grey")
@dataclass(frozen=True)
class Grey:
    """Middle grey: .5 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) of .5."""
        return torch.full_like(view.pixels, 0.5)


@fills.register("inverted")
@dataclass(frozen=True)
class Inverted:
    """The negative: 1 minus the image, which flips the sign of what is coded from -1 to
    1 (Bach et al. 2015).
    """

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        return 1 - view.pixels


@fills.register("noise")
@dataclass(frozen=True)
class NoiseFill:
    """Uniform noise in [0, 1], every channel of every pixel its own; the same for all
    images of a size.
    """

    seed: int = option(0, help="another noise for every seed", least=0)

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        return _like(
            np.random.default_rng(self.seed).random(tuple(view.pixels.shape[1:])),
            view,
        )


@fills.register("rise-blur")
@dataclass(frozen=True)
class RiseBlur:
    """The blur that insertion starts from in the code of RISE (Petsiuk et al.

    2018), for comparison with its numbers.

    Its kernel is a Gaussian of ``sigma`` within ``side`` x ``side`` pixels, what would
    lie outside mirrored into it, so that with the defaults it is nearly a box; outside
    the image lies the colour that the network takes as zero.
    """

    side: int = option(11, help="side of the kernel in pixels, odd", least=1)
    sigma: float = option(5.0, help="standard deviation in pixels", above=0)

    def __post_init__(self) -> None:
        if self.side % 2 == 0:
            raise ConsilienceError(
                f"rise-blur: side is odd and at least 1; got {self.side}"
            )

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w) in [0, 1]."""
        zero = torch.tensor(view.neutral).to(view.pixels).reshape(1, -1, 1, 1)
        kernel = torch.from_numpy(images.mirrored_kernel(self.side, self.sigma)).to(
            view.pixels
        )
        return (images.convolved(view.pixels - zero, kernel) + zero).clamp(0, 1)


def _plain(rgb: Array, view: View) -> Tensor:
    return _like(np.broadcast_to(rgb[:, None, None], view.pixels.shape[1:]), view)


def _like(channels: Array, view: View) -> Tensor:
    """(C, h, w) float64 as a batch of one, held to [0, 1] against rounding, on the
    view's device.
    """
    return torch.from_numpy(np.clip(channels, 0.0, 1.0)[None]).to(view.pixels)
