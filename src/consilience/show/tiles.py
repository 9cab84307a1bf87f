"""The images that a report shows of one sample: itself, every map, every mask, and masks
over each other, each with its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, Protocol

import numpy as np

from consilience import images
from consilience.perturb.surrogate import settled
from consilience.show import words
from consilience.show.colours import (
    ONLY_A,
    ONLY_B,
    SHARED,
    Scale,
    both,
    hex_of,
    limits,
    mask,
    overlay,
    superpixels,
)
from consilience.types import Array


class DrawnExplanation(Protocol):
    """What is needed of an explanation to draw it; a run's items have it."""

    @property
    def column(self) -> str:
        """Its short label."""

    @property
    def values(self) -> Array:
        """Raw map (h, w)."""

    @property
    def mask(self) -> Array | None:
        """(h, w) bool, where one was cut."""

    @property
    def extras(self) -> Mapping[str, Array]:
        """LIME: segments and weights."""


class ShownSample(Protocol):
    """What is needed of a sample: its name, its image as the model saw it, its
    explanations.
    """

    @property
    def name(self) -> str:
        """For the heading."""

    @property
    def image(self) -> Array:
        """(h, w, 3) uint8."""

    @property
    def items(self) -> Sequence[DrawnExplanation]:
        """In the order of the columns."""


@dataclass(frozen=True, eq=False)
class Tile:
    """An image with its words: ``image`` (h, w, 3) uint8, a title, lines under it, a
    scale or a key to its colours.

    ``kind`` is what it shows; ``column`` names the column of a map or mask, ``pair`` the
    two whose masks it holds against each other.
    """

    image: Array
    title: str
    alt: str
    lines: tuple[str, ...] = ()
    scale: Scale | None = None
    key: tuple[tuple[str, str], ...] = ()
    pair: tuple[str, str] | None = None
    kind: Literal["image", "map", "mask", "pair"] = "image"
    column: str = ""


def tiles(
    shown: ShownSample, pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[Tile, ...]:
    """The images of one sample: itself, every map, every mask, and the ``pairs`` of
    masks compared.

    ``pairs`` are of column labels; None means the first three pairs there are.
    """
    items = {item.column: item for item in shown.items}
    if pairs is None:
        pairs = list(combinations(items, 2))[:3]
    masked = [item for item in shown.items if item.mask is not None]
    wanted = [(items[a], items[b]) for a, b in pairs if a in items and b in items]
    drawn = [
        (a, b)
        for a, b in wanted
        if a.mask is not None and b.mask is not None and a.mask.shape == b.mask.shape
    ]
    return (
        Tile(shown.image, "image", f"{shown.name}, as the model saw it"),
        *(
            _with_doubt(map_tile(shown.image, item), item, shown.items[0])
            for item in shown.items
        ),
        *(mask_tile(shown.image, item) for item in masked),
        *(pair_tile(shown.image, a, b) for a, b in drawn),
    )


def _with_doubt(tile: Tile, item: DrawnExplanation, first: DrawnExplanation) -> Tile:
    """The image kept is the first column's view of it; a map that lies on another view
    is drawn on it and says so.
    """
    places = [getattr(one, "geometry", None) for one in (item, first)]
    return (
        tile
        if places[0] == places[1]
        else replace(tile, lines=(*tile.lines, "made from another view of the image"))
    )


def map_tile(base_image: Array, item: DrawnExplanation) -> Tile:
    """A map over its image; superpixels with their borders where the explanation has
    them.
    """
    base_image = _in_frame(base_image, item.values)
    segments, weights = item.extras.get("segments"), item.extras.get("weights")
    if segments is not None and weights is not None:
        image = superpixels(base_image, segments, weights, *certainty(item.extras))
        painted = limits(weights[segments], signed=True)
        what = f"weights of {len(weights)} superpixels"
    else:
        image, painted = overlay(base_image, item.values), limits(item.values)
        what = "values"
    if painted.flat:
        value = item.values.flat[0]
        return Tile(
            image,
            item.column,
            f"{item.column}: a flat map",
            (f"flat: every value is {value:.3g}",),
            kind="map",
            column=item.column,
        )
    return Tile(
        image,
        item.column,
        f"{item.column}: {what} over the image",
        _certainty(item),
        scale=painted,
        kind="map",
        column=item.column,
    )


def certainty(extras: Mapping[str, Array]) -> tuple[Array, Array]:
    """The superpixels that are surely among an explanation's top ones, and those of its top
    that may not be; none where it does not say.
    """
    sure, top = settled(extras.get("p_top", np.full(1, np.nan)))
    return sure, np.setdiff1d(top, sure)


def _certainty(item: DrawnExplanation) -> tuple[str, ...]:
    """How sure an explainer is of its top superpixels, and what marks them; nothing
    where it does not say.
    """
    verdict = getattr(item, "provenance", {}).get("verdict")
    lines = [words.stability_sentence(verdict)] if verdict else []
    sure, unsure = certainty(item.extras)
    top = len(sure) + len(unsure)
    if top:
        lines.append(
            f"thick border: surely among the top {top} ({len(sure)} of them)"
        )
    if len(unsure):
        lines.append(f"hatched: may not be among them ({len(unsure)})")
    return tuple(lines)


def mask_tile(base_image: Array, item: DrawnExplanation) -> Tile:
    """What the mask of an explanation keeps of the image, and how much that is."""
    assert item.mask is not None
    area = f"{100 * item.mask.mean():.3g} % of the frame"
    image = mask(_in_frame(base_image, item.mask), item.mask)
    return Tile(
        image,
        f"{item.column} mask",
        f"mask of {item.column}: {area}",
        (area,),
        kind="mask",
        column=item.column,
    )


def pair_tile(base_image: Array, a: DrawnExplanation, b: DrawnExplanation) -> Tile:
    """Two masks over each other, with their IoU."""
    assert a.mask is not None
    assert b.mask is not None
    union = int((a.mask | b.mask).sum())
    shared = int((a.mask & b.mask).sum())
    line = f"IoU {shared / union:.3f}" if union else "IoU –: both masks are empty"
    key = (
        (hex_of(ONLY_A), f"{a.column} only"),
        (hex_of(ONLY_B), f"{b.column} only"),
        (hex_of(SHARED), "both"),
    )
    image = both(_in_frame(base_image, a.mask), a.mask, b.mask)
    alt = f"masks of {a.column} and {b.column} over each other: {line}"
    return Tile(
        image,
        f"{a.column} & {b.column}",
        alt,
        (line,),
        key=key,
        pair=(a.column, b.column),
        kind="pair",
    )


def _in_frame(image: Array, values: Array) -> Array:
    """The image in a map's frame: columns of different models may have frames of
    different sizes.
    """
    height, width = values.shape
    return (
        image
        if image.shape[:2] == (height, width)
        else images.resize(image, (height, width))
    )
