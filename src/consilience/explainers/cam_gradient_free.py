"""Class activation maps without gradients: each channel, or each cell, of a layer is
tried on the network.

Score-CAM and its kin show the network the image through each channel's mask (`probe`).
Ablation-CAM and Recipro-CAM change the layer itself and run what comes after it
(`tail`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from consilience import progress
from consilience.explainers.cam import (
    OnLayers,
    exact,
    per_layer,
    resolved_layers,
    weighted,
)
from consilience.images import enlarge
from consilience.perturb.fills import Fill, NeutralFill
from consilience.perturb.probe import Grids, Keeps, probe
from consilience.registry import explainers, option
from consilience.types import Heat, Network, Tail, Target, View

# ---- the image through a channel's mask


@dataclass(frozen=True, eq=False)
class Masks:
    """What the network is shown for a layer's channels: ``keep`` (m, h, w), and by
    channel which of them, ``row`` (C,).

    ``keep``, enlarged to the frame, runs from 0 to 1 exactly. All flat channels share
    one mask, which is empty.
    """

    keep: Tensor
    row: Tensor


def channel_masks(
    channels: Tensor, frame: tuple[int, int], align_corners: bool, size: int
) -> Masks:
    """Masks of channels (C, h, w), enlarged and then scaled to [0, 1] as in Score-CAM's
    equations 7 and 8.

    Enlarging is linear and its weights sum to one, so scaling the small channel by the
    enlarged one's extremes is the same; enlarged copies are made ``size`` at a time and
    dropped.
    """
    flat = channels.flatten(1)
    alive = (flat.amax(dim=1) > flat.amin(dim=1)).nonzero()[:, 0]
    keep = torch.cat(
        [
            channels[:0],
            *(
                _scaled(part, frame, align_corners)
                for part in torch.split(channels[alive], size)
            ),
        ]
    )
    row = torch.full((len(channels),), len(alive), device=channels.device)
    row[alive] = torch.arange(len(alive), device=channels.device)
    if len(alive) < len(channels):
        keep = torch.cat([keep, torch.zeros_like(channels[:1])])
    return Masks(keep, row)


def _scaled(channels: Tensor, frame: tuple[int, int], align_corners: bool) -> Tensor:
    low, high = _extremes(enlarge(channels, frame, align_corners))
    return (channels - low) / torch.where(high > low, high - low, 1.0)


def _extremes(maps: Tensor) -> tuple[Tensor, Tensor]:
    flat = maps.flatten(1)
    return flat.amin(dim=1)[:, None, None], flat.amax(dim=1)[:, None, None]


@dataclass(frozen=True)
class Masking(OnLayers):
    """Score-CAM's frame: masks, scores, softmax over channels.

    A method says what it shows of a mask, and how often.
    """

    channels: int = option(
        0,
        help="only that many channels, those of largest sum of absolute activations; 0 is all",
        least=0,
    )
    fill: Fill = option(
        NeutralFill(), kind="fill", help="what stands where a mask is 0"
    )
    align_corners: bool = option(
        False,
        help="enlarge masks with corners on corners instead of half-pixel centres",
    )
    score: Literal["logit", "probability"] = option(
        "logit", help="which number of the class weighs the channels"
    )

    def keeps(self, grids: Grids, frame: tuple[int, int]) -> Keeps:
        """All that is shown: every mask once, or again and again, one round after the
        other.
        """
        return grids

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image: a pass a mask and one for the activations."""
        layers = resolved_layers(self.layer, model)
        activations = model.activations(view.pixels, layers)
        found = [
            self._map(model, view, target, activations[name][0]) for name in layers
        ]
        passes = 1 + sum(count for _, count, _ in found)
        left_out = per_layer(layers, [share for _, _, share in found])
        return self.heats(
            layers,
            [values[None] for values, _, _ in found],
            passes,
            left_out=left_out,
        )[0]

    def _map(
        self, model: Network, view: View, target: Target, channels: Tensor
    ) -> tuple[Tensor, int, float]:
        """The map before any ReLU, the passes it took, the share of activation in
        channels that were left out.
        """
        kept, left_out = strongest(channels, self.channels)
        frame = (view.pixels.shape[-2], view.pixels.shape[-1])
        masks = channel_masks(kept, frame, self.align_corners, max(1, model.batch))
        keeps = self.keeps(Grids(masks.keep, self.align_corners), frame)
        fill = self.fill.image(view, None)
        scores = probe(model, view, keeps, target, fill, type(self).label)  # type: ignore[attr-defined]
        means = scores.double().reshape(-1, len(masks.keep)).mean(dim=0)
        weights = means[masks.row.cpu()].softmax(dim=0)
        return weighted(weights[None], kept[None])[0], len(keeps), left_out


def strongest(channels: Tensor, count: int) -> tuple[Tensor, float]:
    """The ``count`` channels (0: all) of largest sum of absolute activations, in their
    order, and the share of it left out.
    """
    if count in (0, len(channels)) or count > len(channels):
        return channels, 0.0
    strength = exact(channels).abs().sum(dim=(1, 2))
    chosen = strength.sort(descending=True, stable=True).indices[:count].sort().values
    total = float(strength.sum())
    left_out = 1 - float(strength[chosen].sum()) / total if total > 0 else 0.0
    return channels[chosen.to(channels.device)], left_out


@explainers.register("scorecam")
@dataclass(frozen=True)
class ScoreCAM(Masking):
    """Score-CAM (Wang et al., CVPR 2020 workshops, algorithm 1): channels weighted by
    what the network says of their masks.

    ``relu(sum_k alpha_k A_k)`` with ``alpha`` the softmax over channels of ``f(X *
    H_k)``; ``H_k`` is channel k enlarged, then scaled to [0, 1] (equations 7, 8). The
    score of the baseline image that algorithm 1 subtracts is the same for all and
    cancels. A flat channel's mask is empty: such channels share one score, which enters
    the softmax as often as they occur, and a flat channel that is not zero stays in the
    sum.

    ``fill=neutral`` is the paper's product with the normalised image. ``channels=K``
    keeps the K channels of largest sum of |A|; the share of it in the others is kept as
    ``left_out``. The authors' code leaves out the softmax over channels and takes
    probabilities; pytorch-grad-cam enlarges with ``align_corners=true`` and, where a
    channel is flat and not zero, makes rounding into a mask.
    """

    label: ClassVar[str] = "Score-CAM"


@dataclass(frozen=True, eq=False)
class Steps:
    """Each mask at ``1/n, 2/n .. 1`` of its strength, one step after the other."""

    grids: Grids
    count: int

    def __len__(self) -> int:
        return self.count * len(self.grids)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        for step in range(1, self.count + 1):
            fainter = Grids(
                self.grids.keep * (step / self.count), self.grids.align_corners
            )
            yield from fainter.chunks(image, fill, size)


@explainers.register("iscam")
@dataclass(frozen=True)
class ISCAM(Masking):
    """IS-CAM (Naidu et al. 2020, arXiv 2010.03023): Score-CAM with each mask's score
    integrated from the baseline to the mask.

    ``alpha`` is the softmax over channels of ``1/N sum_i f(X * i/N H_k)``, i from 1 to
    N. With one sample it is Score-CAM. torch-cam adds the steps up (1/N, 3/N, 6/N ..),
    which for N = 10 ends at 5.5 times the mask.
    """

    samples: int = option(10, help="steps from the baseline to the mask", least=1)
    label: ClassVar[str] = "IS-CAM"

    def keeps(self, grids: Grids, frame: tuple[int, int]) -> Keeps:
        """The masks at each step."""
        return Steps(grids, self.samples)


@dataclass(frozen=True, eq=False)
class Noisy:
    """Each mask, or the image through it, with normal noise; all channels meet the same
    noise, one draw after the other.
    """

    grids: Grids
    frame: tuple[int, int]
    samples: int
    noise: float
    seed: int
    on: Literal["map", "image"]

    def __len__(self) -> int:
        return self.samples * len(self.grids)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        generator = torch.Generator().manual_seed(self.seed)
        planes = 1 if self.on == "map" else 3
        for _ in range(self.samples):
            field = self.noise * torch.randn(
                planes, *self.frame, generator=generator
            ).to(image)
            if self.on == "image":
                yield from (
                    images + field for images in self.grids.chunks(image, fill, size)
                )
                continue
            for part in torch.split(self.grids.keep, size):
                yield from Grids(self._shaken(part, field)).chunks(image, fill, size)

    def _shaken(self, part: Tensor, field: Tensor) -> Tensor:
        """Masks (b, h, w) in [0, 1] of the frame's size; an empty one stays empty."""
        masks = enlarge(part, self.frame, self.grids.align_corners)
        full = masks.flatten(1).any(dim=1)[:, None, None]
        low, high = _extremes(masks + field)
        return torch.where(
            full,
            (masks + field - low) / torch.where(high > low, high - low, 1.0),
            0.0,
        )


@explainers.register("sscam")
@dataclass(frozen=True)
class SSCAM(Masking):
    """SS-CAM (Wang et al. 2020, arXiv 2006.14255): Score-CAM with each score averaged
    over noisy copies.

    ``on=map`` (the paper's first type) adds noise to the enlarged channel before it is
    scaled to [0, 1], with a standard deviation of ``noise`` times the channel's range;
    ``on=image`` (the second) to the masked image, in units of the pixels' range.
    ``alpha`` is the softmax over channels of the mean score. Without noise it is
    Score-CAM. Every channel meets the same ``samples`` draws, so that channels differ
    by their masks alone.

    The authors' code and torch-cam multiply the image by maps far outside of [0, 1]:
    theirs adds noise of variance (2 / range)^4 to the raw channel, torch-cam of twice
    the range, and neither scales afterwards.
    """

    samples: int = option(10, help="noisy copies of every mask", least=1)
    noise: float = option(
        0.2,
        help="standard deviation, in units of the map's or the pixels' range",
        least=0,
    )
    on: Literal["map", "image"] = option("map", help="where the noise is added")
    seed: int = option(0, help="seed of the noise", least=0)
    label: ClassVar[str] = "SS-CAM"

    def keeps(self, grids: Grids, frame: tuple[int, int]) -> Keeps:
        """The masks with each draw."""
        return Noisy(grids, frame, self.samples, self.noise, self.seed, self.on)


# ---- the layer changed, and what comes after it


@explainers.register("ablationcam")
@dataclass(frozen=True)
class AblationCAM(OnLayers):
    """Ablation-CAM (Desai & Ramaswamy, WACV 2020, section 3): channels weighted by what
    the score loses without them.

    ``relu(sum_k w_k A_k)`` with ``w_k = (y - y_k) / |y|``, where ``y_k`` is the score
    with channel k set to zero. The paper divides by y, which turns the map round where
    the score is negative; its size keeps the sign. A score of 0 divides nothing.
    pytorch-grad-cam sets a channel to the layer's minimum less 1e7 where the layer has
    negative values: another method.
    """

    score: Literal["logit", "probability"] = option(
        "logit", help="the score whose loss weighs the channels"
    )
    label: ClassVar[str] = "Ablation-CAM"
    needs: ClassVar[frozenset[str]] = frozenset({"layers", "module"})

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image: a pass through the rest of the network for every channel that is
        not zero.
        """
        layers = resolved_layers(self.layer, model)
        activations = model.activations(view.pixels, layers)
        tails = [model.tail(view.pixels, name) for name in layers]
        weights = [
            losses(tail, activations[name].shape[1], target)
            for tail, name in zip(tails, layers, strict=True)
        ]
        maps = [
            weighted(weight[None], activations[name])
            for weight, name in zip(weights, layers, strict=True)
        ]
        passes = 1 + runs(
            tails,
            [
                int(activations[name][0].flatten(1).any(dim=1).sum())
                for name in layers
            ],
        )
        return self.heats(
            layers,
            maps,
            passes,
            tail=per_layer(layers, [tail.kind for tail in tails]),
        )[0]


def runs(tails: Sequence[Tail], counts: Sequence[int]) -> int:
    """Passes through the rest of the network; a closed form takes none."""
    return sum(
        count
        for tail, count in zip(tails, counts, strict=True)
        if tail.kind != "closed"
    )


def losses(tail: Tail, channels: int, target: Target) -> Tensor:
    """(C,) float64: the part of the score that is lost without each channel."""
    whole = exact(target.of(tail.logits))
    without = exact(target.of(tail.without(range(channels))))
    return (whole - without) / torch.where(whole == 0, 1.0, whole.abs())


@explainers.register("reciprocam")
@dataclass(frozen=True)
class ReciproCAM(OnLayers):
    """Recipro-CAM (Byun & Lee, CVPR 2024 workshops, arXiv 2209.14074): the score with
    one cell of the layer left at a time.

    A cell's value is the class's probability when the layer is zero elsewhere;
    ``gaussian=true`` leaves the cells around it too, by the paper's 3 x 3 kernel (1 2
    1, 2 4 2, 1 2 1) / 16. The paper scales the map to [0, 1]; here it is raw. The
    authors' code for the kernel spreads a cell's own values over its neighbours instead
    of masking theirs, and never runs.
    """

    relu: bool = option(
        False, help="keep only evidence for the target, on the layer's grid"
    )
    gaussian: bool = option(
        False,
        help="leave a 3 x 3 Gaussian around each cell instead of the cell alone",
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is a cell's value"
    )
    label: ClassVar[str] = "Recipro-CAM"
    needs: ClassVar[frozenset[str]] = frozenset({"layers", "module"})

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image: a pass through the rest of the network for every cell."""
        layers = resolved_layers(self.layer, model)
        activations = model.activations(view.pixels, layers)
        tails = [model.tail(view.pixels, name) for name in layers]
        size = max(1, model.batch)
        maps = [
            self._map(tail, activations[name], target, size)
            for tail, name in zip(tails, layers, strict=True)
        ]
        passes = 1 + runs(tails, [item.numel() for item in maps])
        return self.heats(
            layers,
            maps,
            passes,
            tail=per_layer(layers, [tail.kind for tail in tails]),
        )[0]

    def _map(
        self, tail: Tail, activations: Tensor, target: Target, size: int
    ) -> Tensor:
        """(1, h, w), ``size`` cells at a time."""
        grid = activations.shape[-2:]
        cells = torch.arange(grid.numel(), device=activations.device)
        parts = list(torch.split(cells, size))
        found = [
            target.of(tail(activations * left(part, grid, self.gaussian)))
            for part in progress.track(parts, self.label)
        ]
        return torch.cat(found).reshape(1, *grid).to(activations)


KERNEL = ((1 / 16, 1 / 8, 1 / 16), (1 / 8, 1 / 4, 1 / 8), (1 / 16, 1 / 8, 1 / 16))


def left(cells: Tensor, grid: Sequence[int], gaussian: bool) -> Tensor:
    """Masks (n, 1, h, w) that leave each of the cells alone, or the kernel around it as
    far as it lies on the grid.
    """
    masks = functional.one_hot(cells, grid[0] * grid[1]).float().reshape(-1, 1, *grid)
    kernel = torch.tensor(KERNEL, device=cells.device)[None, None]
    return functional.conv2d(masks, kernel, padding=1) if gaussian else masks
