"""The grid pointing game: localisation without annotation, on mosaics of images that
the model is sure of.

A mosaic of images of different classes is one image whose evidence for each class is
known to lie in one cell. `mosaics` makes them as ordinary samples with a mask for every
class, so that any explainer explains them and any localisation metric scores them;
`grid-pointing` is the game's own score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import ClassVar

import numpy as np
import torch

from consilience import images, progress
from consilience.metrics.localisation import mass_inside, part_of, place_of
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Model,
    NotApplicable,
    Sample,
    Score,
    View,
    as_probabilities,
)

# ---- making mosaics


@dataclass(frozen=True, eq=False)
class MosaicCell:
    """An image that the model is sure of: its first class, and what the model is shown
    in ``frame``, reduced to ``pixels``.
    """

    name: str
    pixels: Array
    index: int
    frame: tuple[int, int]


def mosaics(
    model: Model,
    samples: Iterable[Sample],
    cells: int = 4,
    seed: int = 0,
    sure: float = 0.9,
    count: int = 50,
) -> tuple[Sample, ...]:
    """At most ``count`` mosaics of ``cells`` (4, 9, ...) images of different predicted
    classes.

    An image is used, once, where the model gives its first class at least ``sure`` (and
    where its label is known, that class is right). The mosaic has the size of the
    model's frame; its cells are what the model is shown of the images, reduced: 112 x
    112 of 224 for 4 cells, 75 or 74 for 9 (``notes`` say so). The authors' networks
    take images of any size and keep whole cells of 224 x 224; a network of a fixed size
    sees smaller objects than it was trained on. Show mosaics with ``view="squash"``,
    which leaves them as they are; a crop cuts their edges. ``label`` is the class of a
    cell drawn at random (explain it by ``target="true"``), ``masks`` has every class's
    cell by the class's number.

    Images are read until there are enough, ``model.batch`` at a time; what is kept are
    the cells. Raises `ConsilienceError` where the model has no probabilities, or too
    few images are sure.
    """
    _check(cells, sure, count, seed)
    side = math.isqrt(cells)
    if model.outputs == "values":
        raise ConsilienceError(
            f"mosaics needs probabilities to know what {model.id} is sure of; it gives bare "
            f"values"
        )
    found, read = _sure_cells(model, samples, side, sure, cells * count, count)
    groups = grouped(found, cells, count, np.random.default_rng([seed, cells]))
    if not groups:
        classes = len({cell.index for cell in found})
        there = f"of {read} images {len(found)}, of {classes} classes, have a probability of {sure:g}"
        raise ConsilienceError(
            f"a mosaic of {cells} cells needs images of as many classes that the model is "
            f"sure of; {there}"
        )
    frame = found[0].frame
    return tuple(
        _mosaic(group, frame, number, seed) for number, group in enumerate(groups)
    )


def _check(cells: int, sure: float, count: int, seed: int = 0) -> None:
    if math.isqrt(max(cells, 0)) ** 2 != cells or cells < 4:
        raise ConsilienceError(f"a mosaic has 4, 9, 16 ... cells; got {cells}")
    if not 0 <= sure <= 1 or count < 1 or seed < 0:
        raise ConsilienceError(
            f"mosaics: sure is from 0 to 1, count from 1, seed from 0; got {sure:g}, {count}, "
            f"{seed}"
        )


def _sure_cells(
    model: Model,
    samples: Iterable[Sample],
    side: int,
    sure: float,
    wanted: int,
    most: int,
) -> tuple[list[MosaicCell], int]:
    """Cells of images that the model is sure of, at most ``most`` a class, up to
    ``wanted``; and how many were read.
    """
    kept: dict[int, list[MosaicCell]] = {}
    read, waiting = 0, iter(samples)
    with progress.task("images for mosaics", wanted) as running:
        while sum(map(len, kept.values())) < wanted and (
            part := list(islice(waiting, max(1, model.batch)))
        ):
            read += len(part)
            for cell in _cells_of(model, part, side, sure):
                if len(kept.setdefault(cell.index, [])) < most:
                    kept[cell.index].append(cell)
                    running.advance()
    return [cell for group in kept.values() for cell in group], read


def _cells_of(
    model: Model, samples: Sequence[Sample], side: int, sure: float
) -> Iterator[MosaicCell]:
    views = [model.view(sample) for sample in samples]
    outputs = model.scores(torch.cat([view.pixels for view in views])).double()
    rows = as_probabilities(outputs, model.outputs)
    for sample, view, row in zip(samples, views, rows, strict=True):
        index, probability = int(row.argmax()), float(row.max())
        if probability >= sure and sample.label in (None, index):
            whole = np.rint(images.to_array(view.pixels) * 255).astype(np.uint8)
            frame = (whole.shape[0], whole.shape[1])
            yield MosaicCell(
                sample.name,
                images.resize(whole, (-(-frame[0] // side), -(-frame[1] // side))),
                index,
                frame,
            )


def grouped(
    cells: Sequence[MosaicCell], size: int, count: int, rng: np.random.Generator
) -> list[list[MosaicCell]]:
    """At most ``count`` groups of ``size`` cells of different classes, each cell used
    once, drawn at random.

    ``n`` groups can be made where the classes, each counted up to n times, have n times
    ``size`` cells; dealing them out class after class then never gives a group two of
    one class.
    """
    by_class: dict[int, list[MosaicCell]] = {}
    for at in rng.permutation(len(cells)):
        by_class.setdefault(cells[at].index, []).append(cells[at])
    able = [
        n
        for n in range(1, count + 1)
        if sum(min(n, len(group)) for group in by_class.values()) >= n * size
    ]
    if not able:
        return []
    most = able[-1]
    order = rng.permutation(sorted(by_class)).tolist()
    row = [cell for index in order for cell in by_class[index][:most]][: most * size]
    return [
        [row[at] for at in rng.permutation(np.arange(number, len(row), most))]
        for number in range(most)
    ]


def _mosaic(
    group: Sequence[MosaicCell], frame: tuple[int, int], number: int, seed: int
) -> Sample:
    """The group's cells, row by row, as one sample of the size of the frame."""
    side = math.isqrt(len(group))
    spots = [
        (down, across)
        for down in _edges(frame[0], side)
        for across in _edges(frame[1], side)
    ]
    depth = group[0].pixels.shape[2]
    pixels = np.zeros((*frame, depth), dtype=np.uint8)
    masks: dict[str, Array] = {}
    for cell, (down, across) in zip(group, spots, strict=True):
        pixels[down, across] = cell.pixels[
            : down.stop - down.start, : across.stop - across.start
        ]
        masks[str(cell.index)] = np.zeros(frame, dtype=bool)
        masks[str(cell.index)][down, across] = True
    asked = group[int(np.random.default_rng([seed, number]).integers(len(group)))]
    height, width = group[0].pixels.shape[:2]
    note = f"mosaic of {side} x {side} cells of {height} x {width} pixels: {', '.join(cell.name for cell in group)}"
    return Sample(
        f"mosaic-{number:03d}", pixels, asked.index, masks=masks, notes=(note,)
    )


def _edges(length: int, parts: int) -> list[slice]:
    """A side cut into parts as equal as whole pixels allow, the larger ones first."""
    ends = [-(-length * part // parts) for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


# ---- the game


@metrics.register("grid-pointing")
@dataclass(frozen=True)
class GridPointing:
    """Grid pointing game (Böhle, Fritz & Schiele, CVPR 2021, section 4.2): share of the
    positive map in the class's own cell.

    ``sum_{own cell} max(M, 0) / sum_{all} max(M, 0)`` on a mosaic made by `mosaics`; a
    map without knowledge has 1 / cells, the ``chance`` in ``facts`` (as much as the
    view shows of the cell). ``facts.shares`` has every cell's share by class.
    `NotApplicable` for other images, for a class that has no cell, and for a map
    without a positive value.

    The options say which mosaics an evaluation makes of its images; a score of a mosaic
    at hand does not ask them.

    0 to 1, no passes.
    """

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Grid pointing game"
    cost: ClassVar[str] = "no passes"
    unit: ClassVar[str] = "mosaic"
    cells: int = option(4, help="cells of a mosaic: 4, 9, 16 ...")
    sure: float = option(
        0.9, help="probability that an image's first class must have"
    )
    count: int = option(50, help="at most so many mosaics")

    def __post_init__(self) -> None:
        _check(self.cells, self.sure, self.count)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The share of the class's own cell."""
        masks = explanation.sample.masks
        if len(masks) < 2 or not bool(
            (np.sum([mask.astype(int) for mask in masks.values()], axis=0) == 1).all()
        ):
            raise NotApplicable(code="no-mosaic", image=explanation.sample.name)
        place = place_of(explanation, "masks")
        values = part_of(explanation.values, "positive")
        share = mass_inside(values, place.on, explanation.explainer)
        shares = {
            name: self._share(values, explanation.geometry.to_input(mask))
            for name, mask in masks.items()
        }
        return Score(
            share,
            facts={
                "cells": len(masks),
                "chance": float(place.on.mean()),
                "shares": shares,
            },
        )

    def _share(self, values: Array, on: Array) -> float:
        return float(values[on].sum() / values.sum())
