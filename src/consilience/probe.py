"""The perturbation engine: what does the model say of these edited pictures?

LIME, SHAP, RISE, occlusion, Score-CAM, insertion, deletion, ROAD and IROF are one primitive: score
``keep * image + (1 - keep) * fill`` for thousands of keeps. Composition is vectorised on the model's device, in chunks of the
size the model likes best, so that memory does not grow with the number of samples nor time with that of superpixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consilience import images, progress
from consilience.registry import fills, option
from consilience.types import Array, ConsilienceError, Model, Target, View

# ---------------------------------------------------------------- what is kept


class Keeps(Protocol):
    """Which parts of the picture are kept, a row an edited picture; `Bits` and `Grids`, and what explainers make of them."""

    def __len__(self) -> int:
        """How many edited pictures there are."""

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited pictures (b, 3, h, w), at most ``size`` at a time."""


@dataclass(frozen=True, eq=False)
class Bits:
    """Superpixels on or off: ``segments`` (h, w) int64 labels 0..S-1 and ``on`` (n, S) bool, a row a sample."""

    segments: Array
    on: Array

    def __post_init__(self) -> None:
        if self.on.ndim != 2 or self.on.dtype != np.bool_:
            raise ConsilienceError(f"bits are (n, S) bool; got {self.on.dtype} {self.on.shape}")
        if self.segments.min() < 0 or self.segments.max() >= self.on.shape[1]:
            low, high = self.segments.min(), self.segments.max()
            raise ConsilienceError(f"labels run from {low} to {high}; the bits are of {self.on.shape[1]} superpixels")

    def __len__(self) -> int:
        return len(self.on)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited pictures (b, 3, h, w), at most ``size`` at a time."""
        labels = torch.from_numpy(self.segments.ravel()).to(image.device)
        on = torch.from_numpy(self.on).to(image.device)
        for part in torch.split(on, size):
            keep = part.index_select(1, labels).reshape(-1, 1, *self.segments.shape)
            yield torch.where(keep, image, fill)


@dataclass(frozen=True, eq=False)
class Grids:
    """Soft masks: ``keep`` (n, h', w') in [0, 1], enlarged bilinearly chunk by chunk; half-pixel centres unless told."""

    keep: Tensor
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.keep.ndim != 3 or not self.keep.is_floating_point():
            raise ConsilienceError(f"grids are (n, h, w) floats; got {self.keep.dtype} {tuple(self.keep.shape)}")

    def __len__(self) -> int:
        return len(self.keep)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited pictures (b, 3, h, w), at most ``size`` at a time."""
        frame = (image.shape[-2], image.shape[-1])
        for part in torch.split(self.keep, size):
            keep = part.to(image)
            if keep.shape[-2:] != frame:
                keep = images.enlarge(keep, frame, self.align_corners)
            yield torch.lerp(fill, image, keep.unsqueeze(1))  # exact at keep 0 and 1, and where image and fill are equal


def probe(model: Model, view: View, keeps: Keeps, target: Target, fill: Tensor, label: str = "probing") -> Tensor:
    """Scores (n,) float32 on the CPU of ``keep * image + (1 - keep) * fill`` for every keep.

    ``fill`` is (1, 3, h, w) in [0, 1]. Pictures go through ``model.scores``, ``model.batch`` at a time, and each is reported to
    whoever listens to `progress` under ``label``. Raises `ConsilienceError` where a score is not finite.
    """
    image = view.pixels
    if fill.shape != image.shape:
        raise ConsilienceError(f"the fill is {tuple(fill.shape)}; the picture is {tuple(image.shape)}")
    if isinstance(keeps, Bits) and keeps.segments.shape != image.shape[-2:]:
        raise ConsilienceError(f"the labels are {keeps.segments.shape}; the picture is {tuple(image.shape[-2:])}")
    found = [torch.empty(0)]
    with torch.no_grad(), progress.task(label, len(keeps)) as running:
        for pictures in keeps.chunks(image, fill.to(image), max(1, model.batch)):
            found.append(target.of(model.scores(pictures)).float().cpu())
            running.advance(len(pictures))
    scores = torch.cat(found)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ConsilienceError(
            f"{label}: {target.name} has no finite {target.score} for {bad} of {len(scores)} edited pictures"
        )
    return scores


# ---------------------------------------------------------------- what takes the place of the rest


class Fill(Protocol):
    """A frozen dataclass that says what stands where the picture is taken away."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1] on the view's device; ``segments`` (h, w) labels 0..S-1 where the method has them."""


@fills.register("mean")
@dataclass(frozen=True)
class Mean:
    """Each superpixel in its own mean colour, in float64: the mean of [0, 1] values, never cut to whole numbers."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1]; raises `ConsilienceError` without superpixels."""
        if segments is None:
            others = ", ".join(name for name in fills.names() if name != "mean")
            raise ConsilienceError(f"fill mean needs superpixels, and this method has none; there is: {others}")
        flat = segments.ravel()
        size = np.bincount(flat)
        channels = images.to_array(view.pixels).reshape(-1, 3).T
        means = np.stack([np.bincount(flat, weights=channel) / size for channel in channels])
        return _like(means[:, segments], view)


@fills.register("percentile")
@dataclass(frozen=True)
class Percentile:
    """One colour: the ``q``-th percentile of each colour channel over the picture."""

    q: float = option(20.0, help="0 to 100")

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 100:
            raise ConsilienceError(f"percentile: q lies in [0, 100]; got {self.q:g}")

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1]."""
        return _plain(np.percentile(images.to_array(view.pixels), self.q, axis=(0, 1)), view)


@fills.register("blur")
@dataclass(frozen=True)
class Blur:
    """The picture itself, out of focus: a Gaussian of ``sigma`` pixels, mirrored at the borders."""

    sigma: float = option(10.0, help="standard deviation in pixels")

    def __post_init__(self) -> None:
        if not 0 < self.sigma < np.inf:
            raise ConsilienceError(f"blur: sigma must be positive; got {self.sigma:g}")

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1]."""
        return images.blur(view.pixels, self.sigma).clamp(0, 1)


@fills.register("colour")
@dataclass(frozen=True)
class Colour:
    """One colour: red, green and blue in [0, 1], as ``colour(.5+.2+0)``."""

    rgb: tuple[float, float, float] = option((0.5, 0.5, 0.5), help="red+green+blue, each 0 to 1")

    def __post_init__(self) -> None:
        if not all(0 <= part <= 1 for part in self.rgb):
            raise ConsilienceError(
                f"colour: red, green and blue lie in [0, 1]; got {'+'.join(f'{part:g}' for part in self.rgb)}"
            )

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1]."""
        return _plain(np.array(self.rgb), view)


@fills.register("neutral")
@dataclass(frozen=True)
class Neutral:
    """The colour that the network takes as zero: the mean it normalises with, black where the model names none."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) in [0, 1]."""
        return _plain(np.array(view.neutral), view)


@fills.register("black")
@dataclass(frozen=True)
class Black:
    """Black: 0 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) of 0."""
        return torch.zeros_like(view.pixels)


@fills.register("white")
@dataclass(frozen=True)
class White:
    """White: 1 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) of 1."""
        return torch.ones_like(view.pixels)


@fills.register("grey")
@dataclass(frozen=True)
class Grey:
    """Middle grey: .5 in every channel."""

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, 3, h, w) of .5."""
        return torch.full_like(view.pixels, 0.5)


def _plain(rgb: Array, view: View) -> Tensor:
    return _like(np.broadcast_to(rgb[:, None, None], view.pixels.shape[1:]), view)


def _like(channels: Array, view: View) -> Tensor:
    """(3, h, w) float64 as a batch of one, held to [0, 1] against rounding, on the view's device."""
    return torch.from_numpy(np.clip(channels, 0.0, 1.0)[None]).to(view.pixels)
