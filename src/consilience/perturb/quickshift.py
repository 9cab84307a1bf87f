"""Quickshift superpixels, computed in strips of bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt

import numpy as np
import torch

from consilience.perturb.superpixels import relabelled
from consilience.registry import option, segmenters
from consilience.types import Array

FAR = 1e4
"""The colour of what lies outside the image: so far from any that its weight is exactly
0.
"""
CLOSE = 1e-11
"""Densities closer than this may have another order in another order of summation;
measured differences stay below 1e-12.
"""
DOUBT = 1e-5
"""Share of a density within which two in float32 do not decide; measured errors of one stay
below 4e-6."""
MANY = 0.1
"""Share of places in doubt from which on it is faster to sum all of them in float64."""
PAIRS = 1 << 21
"""Pairs of places whose weights are held at a time: two buffers of 17 MB in float64."""
BESIDE = 2
"""Squared length up to which a link is sought for all places at once."""
STRIP = 32768
"""Pairs of places at a time where links are sought."""


@segmenters.register("quickshift")
@dataclass(frozen=True)
class Quickshift:
    """Mode seeking in colour and place (Vedaldi & Soatto 2008): the very labels of
    scikit-image, in a fraction of its time.

    The defaults are lime's. A pixel's density is a sum of Gaussians over a window of 3
    ``kernel_size``; every pixel is linked to the nearest denser one in the window, no
    further than ``max_dist``, and each tree is a superpixel. Densities are summed for
    pairs of pixels in float32; where a comparison could turn on that, in float64; where it
    could turn on the order of summation, scikit-image is asked.
    """

    kernel_size: float = option(
        4.0,
        help="width of the density's Gaussian, in pixels, 1 and up; larger: fewer superpixels",
        least=1,
    )
    max_dist: float = option(
        200.0, help="longest link between two pixels of a superpixel", above=0
    )
    ratio: float = option(
        0.2, help="weight of colour against place, 0 to 1", least=0, most=1
    )
    seed: int = option(42, help="seed of the noise that breaks ties", least=0)

    def labels(self, image: Array) -> Array:
        """(h, w, 3) in [0, 1] to (h, w) int64."""
        from skimage.color import rgb2lab

        height, width = image.shape[:2]
        field = _Field.of(rgb2lab(image) * self.ratio, ceil(3 * self.kernel_size))
        noise = np.random.default_rng(self.seed).normal(
            scale=0.00001, size=(height, width)
        )
        links, distance, gap = _links(
            field, _Densities.of(field, self.kernel_size, noise)
        )
        if gap < CLOSE:
            return self._asked(image)
        steps = np.where(np.sqrt(distance) > self.max_dist, 0, links)
        return _trees(field.inner(steps), field.stride)

    def _asked(self, image: Array) -> Array:
        from skimage.segmentation import quickshift

        found = quickshift(
            image,
            kernel_size=self.kernel_size,
            max_dist=self.max_dist,
            ratio=self.ratio,
            rng=self.seed,
        )
        return relabelled(found)


@dataclass(frozen=True, eq=False)
class _Field:
    """An image row after row in flat planes (c, n), with a margin of ``reach``: the way
    to a neighbour is one number.
    """

    planes: Array
    size: tuple[int, int]
    reach: int

    @staticmethod
    def of(image: Array, reach: int) -> _Field:
        empty = _Field(np.empty((0, 0)), (image.shape[0], image.shape[1]), reach)
        planes = np.stack(
            [
                empty.padded(image[:, :, channel], FAR)
                for channel in range(image.shape[2])
            ]
        )
        return _Field(planes, empty.size, reach)

    @property
    def stride(self) -> int:
        return self.size[1] + self.reach

    def padded(self, plane: Array, outside: float) -> Array:
        """(h, w) laid out flat: margins above and below, one between rows that serves
        both.
        """
        (height, width), reach = self.size, self.reach
        flat = np.full((height + 2 * reach) * self.stride + reach, outside)
        flat[: -reach or None].reshape(-1, self.stride)[
            reach : reach + height, :width
        ] = plane
        return flat

    def inner(self, flat: Array) -> Array:
        """(h, w) of a flat plane."""
        (height, width), reach = self.size, self.reach
        return flat[: -reach or None].reshape(-1, self.stride)[
            reach : reach + height, :width
        ]

    def pixels(self) -> Array:
        """Places (h w,) of the image's pixels in a flat plane."""
        places: Array = self.inner(np.arange(self.planes.shape[1])).ravel()
        return places

    def offsets(self) -> Array:
        """Ways (m, 3) to all others of the window, row by row: down, across, and
        squared length.
        """
        side = np.arange(-self.reach, self.reach + 1)
        down, across = (
            axis.ravel() for axis in np.meshgrid(side, side, indexing="ij")
        )
        ways = np.stack([down, across, down**2 + across**2], axis=1)
        return ways[ways[:, 2] > 0]


def _sums(field: _Field, kernel_size: float, dtype: torch.dtype) -> Array:
    """Sums (n,) of Gaussians over the window of each place; each pair of pixels is
    looked at once, a row of the window at a time.
    """
    planes = torch.from_numpy(field.planes * sqrt(0.5) / kernel_size).to(dtype)
    reach, stride = field.reach, field.stride
    total = torch.zeros(planes.shape[1], dtype=torch.float64)
    first, last = reach * stride, (reach + field.size[0]) * stride
    most = min(max(1, PAIRS // (2 * reach + 1)), last - first)
    buffers = torch.empty(2, (2 * reach + 1) * most, dtype=dtype)
    for start in range(first, last, most):
        size = min(most, last - start)
        for down in range(reach + 1):
            across = torch.arange(1 if down == 0 else -reach, reach + 1)
            way = start + down * stride + int(across[0])
            shape = (len(across), size)
            step, weight = (one[: shape[0] * size].view(shape) for one in buffers)
            near = -0.5 * (down**2 + across.double() ** 2) / kernel_size**2
            weight.copy_(near.to(dtype)[:, None].expand(shape))
            for plane in planes:
                others = plane.as_strided(shape, (1, 1), plane.storage_offset() + way)
                torch.sub(plane[start : start + size], others, out=step)
                weight.addcmul_(step, step, value=-1)
            weight.exp_()
            total[start : start + size].add_(weight.sum(dim=0))
            others = torch.zeros(size + len(across) - 1, dtype=dtype)
            for place, row in enumerate(weight):
                others[place : place + size].add_(row)
            total[way : way + len(others)].add_(others)
    return total.numpy() + 1


@dataclass(frozen=True, eq=False)
class _Densities:
    """Densities (n,) of a flat plane with the noise that breaks ties: in float32 until one
    is in doubt. Outside of the image they are -inf.
    """

    field: _Field
    kernel_size: float
    noise: Array
    values: Array
    exact: Array

    @staticmethod
    def of(field: _Field, kernel_size: float, noise: Array) -> _Densities:
        """Nearly all of them, in float32."""
        padded = field.padded(noise, -inf)
        values = padded + _sums(field, kernel_size, torch.float32)
        return _Densities(field, kernel_size, padded, values, np.isinf(values))

    def higher(self, places: Array, there: Array) -> Array:
        """How much denser it is ``there`` (k, m) than at ``places`` (k,); what is in doubt
        is summed anew.
        """
        while True:
            own = self.values[places][:, None]
            higher: Array = self.values[there] - own
            rows, ways = np.nonzero(np.abs(higher) <= DOUBT * own)
            both = np.stack([places[rows], there[rows, ways]])
            open_ones = both[~self.exact[both]]
            if not len(open_ones):
                return higher
            self._settle(np.unique(open_ones))

    def settle_beside(self, places: slice, steps: list[int]) -> None:
        """Sum anew whatever is in doubt between ``places`` and those ``steps`` away."""
        values, exact = self.values, self.exact
        while True:
            found: list[Array] = []
            own = values[places]
            for step in steps:
                beside = slice(places.start + step, places.stop + step)
                with np.errstate(invalid="ignore"):
                    doubt = np.abs(values[beside] - own) <= DOUBT * own
                at = np.flatnonzero(doubt) + places.start
                found += [at, at + step]
            both = np.unique(np.concatenate(found))
            if exact[both].all():
                return
            self._settle(both[~exact[both]])

    def _settle(self, places: Array) -> None:
        if len(places) > MANY * len(self.noise):
            self.values[:] = self.noise + _sums(
                self.field, self.kernel_size, torch.float64
            )
            self.exact[:] = True
            return
        ways = torch.from_numpy(self.field.offsets())
        steps = ways[:, 0] * self.field.stride + ways[:, 1]
        near = ways[:, 2].double()
        planes = torch.from_numpy(self.field.planes)
        for some in torch.split(torch.from_numpy(places), max(1, STRIP // len(ways))):
            apart, there = near.expand(len(some), -1).clone(), some[:, None] + steps
            for plane in planes:
                step = plane.take(there).sub_(plane[some][:, None])
                apart.addcmul_(step, step)
            sums = apart.mul_(-0.5 / self.kernel_size**2).exp_().sum(dim=1).numpy()
            self.values[some.numpy()] = self.noise[some.numpy()] + sums + 1
        self.exact[places] = True


def _links(field: _Field, density: _Densities) -> tuple[Array, Array, float]:
    """By place the way to the nearest denser one, its squared length, and the smallest
    difference of densities compared.

    Of equally near ones the first by rows. What is further away in place alone than a
    link already found cannot be nearer, so most pixels are done after the four beside
    them.
    """
    links, distance, gap = (
        np.zeros(len(density.values), dtype=np.int64),
        np.full(len(density.values), inf),
        inf,
    )
    ways, places, seen = field.offsets(), field.pixels(), BESIDE
    gap = _beside(field, density, ways[ways[:, 2] <= BESIDE], links, distance)
    for ring in (8, 25, 2 * field.reach**2):
        part = ways[(ways[:, 2] > seen) & (ways[:, 2] <= ring)]
        places = places[distance[places] > seen]
        for some in np.array_split(places, max(1, len(places) * len(part) // STRIP)):
            gap = min(gap, _link(field, density, part, some, links, distance))
        seen = max(seen, ring)
    return links, distance, gap


def _beside(
    field: _Field, density: _Densities, ways: Array, links: Array, distance: Array
) -> float:
    """Links of all places to those beside them, as in `_link`, plane by plane."""
    first, last = (
        field.reach * field.stride,
        (field.reach + field.size[0]) * field.stride,
    )
    steps = (ways[:, 0] * field.stride + ways[:, 1]).tolist()
    density.settle_beside(slice(first, last), steps)
    gap, best = inf, distance[first:last]
    for step, (down, across, _) in zip(steps, ways.tolist(), strict=True):
        beside = slice(first + step, last + step)
        with np.errstate(invalid="ignore"):  # between two places outside of the image
            higher = density.values[beside] - density.values[first:last]
        length = np.zeros(last - first)
        for plane in field.planes:
            length += (plane[first:last] - plane[beside]) ** 2
        length += down**2
        length += across**2
        better = (higher > 0) & (length < best)
        best[better], links[first:last][better] = length[better], step
        gap = min(gap, float(np.nanmin(np.abs(higher))))
    return gap


def _link(
    field: _Field,
    density: _Densities,
    ways: Array,
    places: Array,
    links: Array,
    distance: Array,
) -> float:
    """Better links for ``places`` over ``ways``, written to ``links`` and ``distance``;
    the smallest difference met.
    """
    if ways.size == 0 or places.size == 0:
        return inf
    step = ways[:, 0] * field.stride + ways[:, 1]
    there = places[:, None] + step
    higher = density.higher(places, there)
    length = np.zeros(there.shape)
    for plane in field.planes:
        length += (plane[places][:, None] - plane[there]) ** 2
    length = np.where(
        higher > 0, (length + ways[:, 0] ** 2) + ways[:, 1] ** 2, inf
    )  # summed in scikit-image's order
    best = length.argmin(axis=1)
    nearest, way = length[np.arange(len(places)), best], step[best]
    better = (nearest < distance[places]) | (
        (nearest == distance[places]) & (nearest < inf) & (way < links[places])
    )
    links[places[better]], distance[places[better]] = way[better], nearest[better]
    return float(np.abs(higher).min())


def _trees(steps: Array, stride: int) -> Array:
    """Labels (h, w) of the trees that steps (h, w) in a flat plane make."""
    height, width = steps.shape
    down = np.rint(steps / stride).astype(np.int64)
    parent = (
        np.arange(height * width).reshape(height, width)
        + down * width
        + (steps - down * stride)
    ).ravel()
    while (parent != (above := parent[parent])).any():
        parent = above
    return relabelled(parent.reshape(height, width))
