"""The perturbation engine: what does the model say of these edited images?

LIME, SHAP, RISE, occlusion, Score-CAM, insertion, deletion, ROAD and IROF are one
primitive: score ``keep * image + (1 - keep) * fill`` for thousands of keeps.
Composition is vectorised on the model's device, in chunks of the size the model likes
best, so that memory does not grow with the number of samples nor time with that of
superpixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consilience import images, progress
from consilience.types import Array, ConsilienceError, Model, Target, View

# ---- what is kept


class Keeps(Protocol):
    """Which parts of the image are kept, a row an edited image; `Bits` and `Grids`, and
    what explainers make of them.
    """

    def __len__(self) -> int:
        """How many edited images there are."""

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""


@dataclass(frozen=True, eq=False)
class Bits:
    """Superpixels on or off: ``segments`` (h, w) int64 labels 0..S-1 and ``on`` (n, S)
    bool, a row a sample.
    """

    segments: Array
    on: Array

    def __post_init__(self) -> None:
        if self.on.ndim != 2 or self.on.dtype != np.bool_:
            raise ConsilienceError(
                f"bits are (n, S) bool; got {self.on.dtype} {self.on.shape}"
            )
        if self.segments.min() < 0 or self.segments.max() >= self.on.shape[1]:
            low, high = self.segments.min(), self.segments.max()
            raise ConsilienceError(
                f"labels run from {low} to {high}; the bits are of {self.on.shape[1]} "
                f"superpixels"
            )

    def __len__(self) -> int:
        return len(self.on)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        labels = torch.from_numpy(self.segments.ravel()).to(image.device)
        on = torch.from_numpy(self.on).to(image.device)
        for part in torch.split(on, size):
            # seven times as fast as index_select along this axis
            keep = part.gather(1, labels.expand(len(part), -1))
            keep = keep.reshape(-1, 1, *self.segments.shape)
            yield torch.where(keep, image, fill)


@dataclass(frozen=True, eq=False)
class Grids:
    """Soft masks: ``keep`` (n, h', w') in [0, 1], enlarged bilinearly chunk by chunk;
    half-pixel centres unless told.
    """

    keep: Tensor
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.keep.ndim != 3 or not self.keep.is_floating_point():
            raise ConsilienceError(
                f"grids are (n, h, w) floats; got {self.keep.dtype} {tuple(self.keep.shape)}"
            )

    def __len__(self) -> int:
        return len(self.keep)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        frame = (image.shape[-2], image.shape[-1])
        for part in torch.split(self.keep, size):
            keep = part.to(image)
            if keep.shape[-2:] != frame:
                keep = images.enlarge(keep, frame, self.align_corners)
            yield torch.lerp(
                fill, image, keep.unsqueeze(1)
            )  # exact at keep 0 and 1, and where image and fill are equal


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits of one image: ``fill`` (1, 3, h, w) in [0, 1] stands where nothing is
    kept, ``target`` scores them.
    """

    view: View
    keeps: Keeps
    target: Target
    fill: Tensor

    def __post_init__(self) -> None:
        image, keeps = self.view.pixels, self.keeps
        if self.fill.shape != image.shape:
            raise ConsilienceError(
                f"the fill is {tuple(self.fill.shape)}; the image is {tuple(image.shape)}"
            )
        if isinstance(keeps, Bits) and keeps.segments.shape != image.shape[-2:]:
            raise ConsilienceError(
                f"the labels are {keeps.segments.shape}; the image is {tuple(image.shape[-2:])}"
            )


def probe(
    model: Model,
    view: View,
    keeps: Keeps,
    target: Target,
    fill: Tensor,
    label: str = "probing",
) -> Tensor:
    """Scores (n,) float32 on the CPU of ``keep * image + (1 - keep) * fill`` for every
    keep.

    ``fill`` is (1, 3, h, w) in [0, 1]. Images go through ``model.scores``,
    ``model.batch`` at a time, and each is reported to whoever listens to `progress`
    under ``label``. Raises `ConsilienceError` where a score is not finite.
    """
    return probe_many(model, [Edits(view, keeps, target, fill)], label)[0]


def probe_many(
    model: Model, edits: Sequence[Edits], label: str = "probing"
) -> list[Tensor]:
    """`probe` of several images, scores (n,) of each.

    A chunk is filled up with edits of the next image, so that only the very last one is
    short: an engine of a fixed batch takes as long for a short one. Raises
    `ConsilienceError` where a score is not finite.
    """
    found: list[list[Tensor]] = [[torch.empty(0)] for _ in edits]
    with (
        torch.no_grad(),
        progress.task(label, sum(len(one.keeps) for one in edits)) as running,
    ):
        for owners, images in _chunks(edits, max(1, model.batch)):
            outputs = model.scores(images)
            for owner, rows in zip(
                owners, torch.split(outputs, list(owners.values())), strict=True
            ):
                found[owner].append(edits[owner].target.of(rows).float().cpu())
            running.advance(len(images))
    return [
        _finite(torch.cat(scores), one.target, label)
        for scores, one in zip(found, edits, strict=True)
    ]


def _chunks(
    edits: Sequence[Edits], size: int
) -> Iterator[tuple[dict[int, int], Tensor]]:
    """Full chunks over all images, each with whose edits it holds and how many; images
    of another size start a new one.
    """
    owners: dict[int, int] = {}
    parts: list[Tensor] = []
    for owner, edited in _pieces(edits, size):
        while len(edited):
            if parts and parts[0].shape[1:] != edited.shape[1:]:
                yield owners, _joined(parts)
                owners, parts = {}, []
            fits, edited = torch.tensor_split(edited, [size - sum(owners.values())])
            owners[owner] = owners.get(owner, 0) + len(fits)
            parts.append(fits)
            if sum(owners.values()) == size:
                yield owners, _joined(parts)
                owners, parts = {}, []
    if parts:
        yield owners, _joined(parts)


def _pieces(edits: Sequence[Edits], size: int) -> Iterator[tuple[int, Tensor]]:
    for owner, one in enumerate(edits):
        image = one.view.pixels
        for edited in one.keeps.chunks(image, one.fill.to(image), size):
            yield owner, edited


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _finite(scores: Tensor, target: Target, label: str) -> Tensor:
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ConsilienceError(
            f"{label}: {target.name} has no finite {target.score} for {bad} of {len(scores)} "
            f"edited images"
        )
    return scores
