"""A concept set that the program draws: colours, textures and shapes with exact masks,
nothing kept.

Every image is quiet grey noise with a few items on it. An item has a shape and is
filled with a colour or a texture; later ones cover earlier ones, in the image and in
the masks. Image ``i`` of a seed is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from consilience.dissection.concepts import (
    ConceptSet,
    ImageSource,
    Plane,
    concept_digest,
    concept_sets,
    numbered,
    spec_of,
)
from consilience.registry import option
from consilience.types import Array

COLOURS = {
    "red": (224, 32, 32),
    "green": (32, 176, 48),
    "blue": (32, 64, 224),
    "yellow": (240, 216, 32),
    "purple": (144, 32, 176),
    "orange": (248, 136, 16),
    "pink": (248, 128, 192),
    "turquoise": (32, 200, 200),
}
DARK, LIGHT = 40, 215

Field = Callable[[Array, Array], Array]

# Textures are (y, x) -> light or dark, of period 4 pixels in the item's own
# coordinates.
TEXTURES: dict[str, Field] = {
    "striped": lambda y, x: x % 4 < 2,
    "banded": lambda y, x: y % 4 < 2,
    "chequered": lambda y, x: (y // 2 + x // 2) % 2 == 0,
    "dotted": lambda y, x: (y % 4 < 2) & (x % 4 < 2),
    "diagonal": lambda y, x: (y + x) % 4 < 2,
    "gridded": lambda y, x: (y % 4 == 0) | (x % 4 == 0),
}

# Shapes are (y, x) -> inside, for y and x from -1 to 1.
SHAPES: dict[str, Field] = {
    "square": lambda y, x: (abs(y) <= 0.9) & (abs(x) <= 0.9),
    "circle": lambda y, x: y**2 + x**2 <= 1,
    "triangle": lambda y, x: abs(x) <= (y + 1) / 2,
    "cross": lambda y, x: (abs(x) <= 0.35) | (abs(y) <= 0.35),
    "ring": lambda y, x: (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.36),
    "bar": lambda y, x: abs(y) <= 0.4,
}

CATEGORIES = ("color", "texture", "shape")
_NAMES = (tuple(COLOURS), tuple(TEXTURES), tuple(SHAPES))
_FIRST = (1, 1 + len(COLOURS), 1 + len(COLOURS) + len(TEXTURES))


@concept_sets.register("drawn")
@dataclass(frozen=True)
class DrawnConcepts:
    """Colours, textures and shapes drawn by the program; the label grid has the images'
    own resolution.
    """

    images: int = option(240, help="how many", least=1, formerly="pictures")
    seed: int = option(0, help="of everything drawn", least=0)
    size: int = option(128, help="pixels a side", least=32)
    items: int = option(3, help="items an image", least=1)
    noise: float = option(
        6.0,
        help="standard deviation of the grey ground, in levels of 255",
        least=0,
        most=30,
    )

    def open(self) -> ConceptSet:
        """The set; images are drawn when asked for."""
        rows = [
            (name, category, first + place)
            for category, names, first in zip(CATEGORIES, _NAMES, _FIRST, strict=True)
            for place, name in enumerate(names)
        ]
        names = tuple(f"drawn/{index:05d}" for index in range(self.images))
        grid = (self.size, self.size)
        return ConceptSet(
            spec_of(self),
            concept_digest(self),
            numbered(rows),
            CATEGORIES,
            names,
            _Source(self),
            grid,
        )


@dataclass(frozen=True, eq=False)
class _Source(ImageSource):
    spec: DrawnConcepts

    def image(self, index: int) -> Array:
        return _draw(self.spec, index)[0].copy()

    def planes(self, index: int) -> Sequence[Plane]:
        return [
            Plane(category, numbers)
            for category, numbers in enumerate(_draw(self.spec, index)[1])
        ]


@lru_cache(maxsize=4)
def _draw(spec: DrawnConcepts, index: int) -> tuple[Array, Array]:
    """An image (size, size, 3) uint8 and its label maps (3, size, size)."""
    rng = np.random.default_rng((spec.seed, index))
    ground = ndimage.gaussian_filter(rng.normal(size=(spec.size, spec.size)), 4)
    grey = np.rint(128 + spec.noise * ground / ground.std()).clip(0, 255)
    pixels = np.repeat(grey[:, :, None], 3, axis=2)
    labels = np.zeros((3, spec.size, spec.size), dtype=np.int64)
    for _ in range(spec.items):
        _place(pixels, labels, rng)
    return pixels.astype(np.uint8), labels


def _place(pixels: Array, labels: Array, rng: Generator) -> None:
    """Draw one item, and its labels over whatever it covers."""
    whole = len(pixels)
    side = int(rng.integers(max(8, whole // 12), max(9, whole // 6) + 1))
    top, left = (int(one) for one in rng.integers(0, whole - side + 1, 2))
    window = slice(top, top + side), slice(left, left + side)
    shape = int(rng.integers(len(SHAPES)))
    inside = _shape(shape, side)
    fill, numbers = _fill(side, rng)
    pixels[window][inside] = fill[inside]
    for category, number in enumerate([*numbers, _FIRST[2] + shape]):
        labels[category][window][inside] = number


def _shape(shape: int, side: int) -> Array:
    centres = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return SHAPES[_NAMES[2][shape]](y, x)


def _fill(side: int, rng: Generator) -> tuple[Array, list[int]]:
    """Pixels (side, side, 3), and the numbers of the colour and of the texture, 0 for
    none.
    """
    if rng.random() < 0.5:
        colour = int(rng.integers(len(COLOURS)))
        return np.broadcast_to(
            np.array(COLOURS[_NAMES[0][colour]], dtype=float), (side, side, 3)
        ), [_FIRST[0] + colour, 0]
    texture = int(rng.integers(len(TEXTURES)))
    y, x = np.indices((side, side))
    light = TEXTURES[_NAMES[1][texture]](y, x)
    return np.repeat(
        np.where(light, LIGHT, DARK).astype(float)[:, :, None], 3, axis=2
    ), [0, _FIRST[1] + texture]
