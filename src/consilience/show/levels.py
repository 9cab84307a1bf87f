"""Maps as 65,536 levels, small enough to travel in a page and fine enough to be cut
there: what a page embeds of a map, and back.

A level is half the rank of a value in its map and half its place between the lowest and
the highest: no level holds more than 1/32,767 of the frame (ties apart, which share one)
nor of the range. So a cut by area and a cut by value are both what they are in the
map, to within a pixel or two.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np

from consilience.types import Array

TOP = 65535
"""The highest level; 0 is the lowest."""
KNOTS = 257
"""So many levels, evenly spread, are told with their values; others lie between."""


@dataclass(frozen=True, eq=False)
class Levels:
    """A map (h, w) as ``levels`` uint16, rising with the value, and the values of
    `KNOTS` of them in ``knots`` float32; values between are read along straight lines.
    """

    levels: Array
    knots: Array

    @property
    def values(self) -> Array:
        """The map again, each value to within 1/128 of the range (h, w) float32."""
        at = np.linspace(0, TOP, KNOTS)
        return np.interp(self.levels, at, self.knots).astype(np.float32)


def levels_of(values: Array) -> Levels:
    """The levels of a map (h, w) of finite values; what is not finite counts as the
    lowest.
    """
    known = np.isfinite(values)
    floor = values[known].min() if known.any() else 0.0
    flat: Array = np.where(known, values, floor).astype(np.float64).ravel()
    distinct, where, counts = np.unique(flat, return_inverse=True, return_counts=True)
    if len(distinct) == 1:
        knots = np.full(KNOTS, distinct[0], np.float32)
        return Levels(np.zeros(values.shape, np.uint16), knots)
    below = np.cumsum(counts) - counts  # how many pixels are less
    rank = below / below[-1]
    share = (distinct - distinct[0]) / (distinct[-1] - distinct[0])
    level = np.round(TOP * (rank + share) / 2)
    between = np.interp(np.linspace(0, TOP, KNOTS), level, distinct)
    coded = level[where].astype(np.uint16).reshape(values.shape)
    return Levels(coded, between.astype(np.float32))


def packed(levels: Array) -> str:
    """Levels (h, w) uint16 as base64 of zlib: differences along the rows, all their
    high bytes and then all their low ones, which is small where a map is smooth.
    """
    across = np.diff(levels.astype(np.uint16).ravel(), prepend=np.uint16(0))
    halves = np.concatenate((across >> 8, across & 255)).astype(np.uint8)
    return _text(halves)


def unpacked(text: str, shape: tuple[int, int]) -> Array:
    """Inverse of `packed`."""
    halves = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    high, low = halves.reshape(2, -1).astype(np.uint16)
    levels: Array = np.cumsum((high << 8) | low, dtype=np.uint16).reshape(shape)
    return levels


def packed_mask(on: Array) -> str:
    """A mask (h, w) bool as base64 of zlib, eight pixels a byte, the first the highest
    bit.
    """
    return _text(np.packbits(on))


def packed_bytes(values: Array) -> str:
    """Small whole numbers (h, w) uint8 as base64 of zlib."""
    return _text(values.astype(np.uint8))


def floats(values: Array) -> str:
    """Numbers as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _text(content: Array) -> str:
    return base64.b64encode(zlib.compress(content.tobytes(), 7)).decode()
