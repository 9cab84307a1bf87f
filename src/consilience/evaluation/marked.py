"""Planted evidence in a network of one's own: images under two marks, and last layers
that decide by one of them.

A mark that is laid over an image is evidence whose place is known, once the network
decides by it. Its last layer is therefore fitted anew on its frozen features: every
image is shown with both marks, with either, and with none, and one rule reads whether
the first is there, another whether the second is. What is explained are both marks
together, by a rule that one of them decides; the other is as easy to see. All of it is
shown to hold by intervention, on images that no rule was fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience import images, progress, registry
from consilience.evaluation.memory import remembering
from consilience.marks.painting import laid, patch_of
from consilience.metrics.planted_mark import DECOY, PlantedMark
from consilience.models import heads
from consilience.models.network import TorchNetwork
from consilience.models.readouts import ReadNetwork
from consilience.types import Array, ConsilienceError, Model, Sample, as_probabilities

CLASSES = ("without the mark", "with the mark")
DECIDES = 1
FITTED = 160
"""Placings that the rules are fitted on, each with both marks, either and none: of other
parts of the images each time, which stand for more images than there are.
"""
TRIES = 4
"""Placings in an image that is kept back, of which the first is taken where the mark
decides.
"""
SMALLEST = 0.4
"""The smallest part of an image that stands for another one, share of its sides."""
LEAST, OF_WHICH = 2, 3
"""Fewer images than that, or than one of so many kept back, show nothing."""

SHOWINGS = ((True, True), (True, False), (False, True), (False, False))
"""Whether the first and the second mark lie in an image."""


@dataclass(frozen=True, eq=False)
class Placing:
    """An image with a place for each of two marks, and how it looks under both, under
    either, and bare (4, C, h, w) in [0, 1], as `SHOWINGS` has them.
    """

    name: str
    shown: Tensor
    masks: tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class MarkedImage:
    """An image under both marks, and for each model the network that one of them
    decides for; the evidence is the mask of class 1.
    """

    sample: Sample
    models: Mapping[int, Model]


def marked_images(
    metric: PlantedMark,
    models: Sequence[Model],
    samples: Iterable[Sample],
    seed: int,
) -> Iterator[MarkedImage]:
    """Marked images as the metric's options say: of two halves of the images each is
    shown under rules that are fitted on the other, and an image is given once where
    every model decides by the mark.

    ``models`` of an image are by ``id()`` of the models given. Raises
    `ConsilienceError` where a model has no last linear layer, models see different
    frames, there are too few images, or the rules hold on too few of them.
    """
    networks = [_opened(model) for model in models]
    found = [heads.class_head(network) for network in networks]
    if len({network.frame for network in networks}) > 1:
        raise ConsilienceError("marks are planted in one frame; these models differ")
    read = list(islice(samples, metric.count))
    if len(read) < 2 * LEAST:
        raise ConsilienceError(
            f"marks are fitted on half of the images and looked for in the others; of "
            f"{len(read)} that is too few"
        )
    order = np.random.default_rng([seed, len(read)]).permutation(len(read))
    halves = order[: len(read) // 2], order[len(read) // 2 :]
    frames = [_frame(networks[0], sample) for sample in read]
    patches = _patches(metric, frames[0], seed)
    names = [sample.name for sample in read]
    given = 0
    for fitting, kept in (halves, halves[::-1]):
        rules = []
        with progress.task("planted marks", len(networks)) as running:
            for network, head in zip(networks, found, strict=True):
                placings = (
                    placed(
                        names[at],
                        part_of_image(frames[at], [seed, number, at]),
                        patches,
                        [seed, number, at],
                    )
                    for number, at in enumerate(_turns(fitting))
                )
                rules.append(_fitted(network, head, placings, metric))
                running.advance()
        for number, at in enumerate(kept):
            deciding = [rule[number % 2] for rule in rules]
            sample = _one(
                metric, names[at], frames[at], patches, deciding, seed, number
            )
            if sample is not None:
                given += 1
                there = zip(models, deciding, strict=True)
                yield MarkedImage(sample, {id(model): one for model, one in there})
    if given < max(LEAST, len(read) / OF_WHICH):
        raise ConsilienceError(
            f"the network's features do not tell the marks well enough: a mark decides in "
            f"{given} of {len(read)} images"
        )


def _one(
    metric: PlantedMark,
    name: str,
    frame: Tensor,
    patches: tuple[Array, Array],
    deciding: Sequence[Model],
    seed: int,
    number: int,
) -> Sample | None:
    """An image under both marks in the first placing that holds; None where none does."""
    which = number % 2
    for attempt in range(TRIES):
        placing = placed(name, frame, patches, [seed, number, attempt, 1])
        if all(holds(network, placing, which) for network in deciding):
            return _sample(placing, which, metric)
    return None


def _opened(model: Model) -> TorchNetwork:
    if not isinstance(model, TorchNetwork) or isinstance(model, ReadNetwork):
        raise ConsilienceError(
            f"{model.id} has no last layer of classes that can be fitted"
        )
    return model


def _frame(network: TorchNetwork, sample: Sample) -> Tensor:
    """What the network sees of an image, in steps of 1/255 as a file would have it."""
    pixels = network.view(sample).pixels[0].detach().cpu()
    return (pixels * 255).round() / 255


def _patches(metric: PlantedMark, frame: Tensor, seed: int) -> tuple[Array, Array]:
    size = (int(frame.shape[1]), int(frame.shape[2]))
    first, second = (
        patch_of(registry.marks.build(spec), len(frame), size, seed)
        for spec in (metric.first, metric.second)
    )
    room_for_both = np.add(first.shape[1:], second.shape[1:])
    if (room_for_both > size).any():
        raise ConsilienceError(
            f"planted-mark: {metric.first} and {metric.second} do not fit beside each "
            f"other in a frame of {size[0]} x {size[1]}"
        )
    return first, second


def _turns(fitting: Array) -> list[int]:
    count = max(FITTED, len(fitting))
    return [int(fitting[at % len(fitting)]) for at in range(count)]


def part_of_image(frame: Tensor, seed: Sequence[Any]) -> Tensor:
    """A part of an image at random, perhaps mirrored, in the frame's size."""
    rng = np.random.default_rng([*(int(part) for part in seed), 2])
    height, width = frame.shape[1:]
    share = rng.uniform(SMALLEST, 1)
    rows, columns = int(height * share), int(width * share)
    top = int(rng.integers(height - rows + 1))
    left = int(rng.integers(width - columns + 1))
    part = frame[None, :, top : top + rows, left : left + columns]
    made = nn.functional.interpolate(
        part, (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]
    return made.flip(2) if rng.random() < 0.5 else made


def placed(
    name: str, frame: Tensor, patches: tuple[Array, Array], seed: Sequence[Any]
) -> Placing:
    """An image with both marks at random, apart from each other."""
    rng = np.random.default_rng([int(part) for part in seed])
    first, second = _corners(rng, patches, (int(frame.shape[1]), int(frame.shape[2])))
    shown = []
    for one, other in SHOWINGS:
        made = frame
        if one:
            made = laid(made, patches[0], first)
        if other:
            made = laid(made, patches[1], second)
        shown.append((made.clamp(0, 1) * 255).round() / 255)
    masks = []
    for patch, (top, left) in zip(patches, (first, second), strict=True):
        mask = np.zeros(frame.shape[1:], dtype=bool)
        mask[top : top + patch.shape[1], left : left + patch.shape[2]] = True
        masks.append(mask)
    return Placing(name, torch.stack(shown), (masks[0], masks[1]))


def _corners(
    rng: np.random.Generator, patches: tuple[Array, Array], frame: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper left corners, uniform among those at which the marks do not overlap."""
    sizes = [patch.shape[1:] for patch in patches]
    while True:
        (y, x), (v, u) = (
            tuple(
                int(rng.integers(room - side + 1))
                for room, side in zip(frame, size, strict=True)
            )
            for size in sizes
        )
        apart_y = y + sizes[0][0] <= v or v + sizes[1][0] <= y
        apart_x = x + sizes[0][1] <= u or u + sizes[1][1] <= x
        if apart_y or apart_x:
            return (y, x), (v, u)


def _fitted(
    network: TorchNetwork,
    head: heads.ClassHead,
    placings: Iterable[Placing],
    metric: PlantedMark,
) -> tuple[TorchNetwork, TorchNetwork]:
    """The network with a last layer for the first mark, and with one for the second."""
    rows = np.concatenate(
        [heads.features_before(network, head, one.shown) for one in placings]
    )
    made = []
    for which, spec in enumerate((metric.first, metric.second)):
        there = np.array([showing[which] for showing in SHOWINGS])
        weights, shift = heads.fitted_head(rows, np.tile(there, len(rows) // 4))
        name = f"{network.name}-reads-{registry.parse(spec).name}"
        reads = heads.with_head(network, head, weights, shift, CLASSES, name)
        made.append(remembering(reads))
    return made[0], made[1]  # type: ignore[return-value]


def holds(network: Model, placing: Placing, which: int) -> bool:
    """Whether the mark decides here: "with the mark" where it lies, whatever the other
    does, and "without" where it does not.
    """
    with torch.no_grad():
        outputs = network.scores(placing.shown).double()
    with_mark = as_probabilities(outputs, network.outputs)[:, DECIDES]
    return all(
        bool(value > 0.5) == showing[which]
        for value, showing in zip(with_mark, SHOWINGS, strict=True)
    )


def _sample(placing: Placing, which: int, metric: PlantedMark) -> Sample:
    pixels = np.rint(images.to_array(placing.shown[:1]) * 255).astype(np.uint8)
    spec = (metric.first, metric.second)[which]
    masks = {str(DECIDES): placing.masks[which], DECOY: placing.masks[1 - which]}
    return Sample(
        f"{placing.name}-{registry.parse(spec).name}-decides",
        pixels,
        DECIDES,
        masks=masks,
        notes=(f"{spec} decides",),
    )
