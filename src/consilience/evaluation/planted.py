"""Planted truth: models whose evidence is known by construction, images with exact
masks, and proof by intervention.

Four models of two classes, "nothing" and "planted": decided by one marked patch, by a
colour, by two patches that must both be there, and by a shortcut in the corner while
the object is elsewhere (trained on images where both occur together). The right
explanation is known, so that methods, and metrics themselves, can be scored. `verify`
shows that it is right: removing the evidence turns the decision, removing as much
of anything else does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from consilience import images
from consilience.models.network import TorchNetwork, wrap
from consilience.types import Array, ConsilienceError, Model, Sample

SIDE, MARK, CELL = 64, 16, 8
CLASSES = ("nothing", "planted")
RED, BLUE, GREEN = (230, 20, 20), (20, 40, 230), (30, 200, 40)

# ---- networks


class Colours(nn.Module):
    """Shares of red, blue and green cells of an image, from which ``decide`` makes two
    logits.

    Colours are found pixel by pixel, summed by cells of 8 x 8 and squashed, so that the
    last map is 8 x 8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.pool = nn.AvgPool2d(CELL)
        self.cells = nn.ReLU()
        with torch.no_grad():
            self.colours.weight[:, :, 0, 0] = torch.tensor(
                [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]
            )
            self.colours.bias.fill_(-0.1)  # type: ignore[union-attr]

    def maps(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8): how red, blue and green each cell is, 0 and up."""
        found: Tensor = self.cells(self.pool(self.act(self.colours(x))))
        return found


class One(Colours):
    """Planted where there is enough of one colour: ``logit = gain (mean of its map -
    half of what a mark gives)``.
    """

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[1, channel] = GAIN
            self.head.bias.copy_(torch.tensor([0.0, -GAIN * ENOUGH]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 64, 64) to two logits."""
        out: Tensor = self.head(self.maps(x).mean(dim=(2, 3)))
        return out


class Both(Colours):
    """Planted where there is enough of red and enough of blue: the smaller of the two
    decides, smoothly.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 64, 64) to two logits."""
        means = self.maps(x).mean(dim=(2, 3))
        least = -torch.logsumexp(-GAIN * (means[:, :2] - ENOUGH), dim=1)
        return torch.stack([torch.zeros_like(least), least], dim=1)


class Small(nn.Module):
    """A small convolutional network that has to learn its task."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 64, 64) to two logits."""
        out: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return out


AMOUNT = 0.55 * MARK**2 / SIDE**2
"""Mean of a colour's map with one mark: its pixels are about .55 after the filter (red:
.902 - .078 - .078 - .1 = .645).
"""
ENOUGH, GAIN = AMOUNT / 2, 10 / AMOUNT

# ---- images


def background(rng: np.random.Generator) -> Array:
    """Grey noise (64, 64, 3) uint8."""
    grey = (
        rng.integers(90, 160, (SIDE // 4, SIDE // 4, 1))
        .repeat(4, axis=0)
        .repeat(4, axis=1)
    )
    return np.repeat(grey, 3, axis=2).astype(np.uint8)


def random_places(
    rng: np.random.Generator, count: int, size: int = MARK
) -> list[tuple[slice, slice]]:
    """Squares on a grid of cells, no two of which touch the same cell."""
    cells = rng.permutation((SIDE // size) ** 2)[:count]
    spots = [divmod(int(cell), SIDE // size) for cell in cells]
    return [
        (slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size))
        for y, x in spots
    ]


def paint(
    pixels: Array, where: tuple[slice, slice], colour: tuple[int, int, int]
) -> Array:
    """Mask (64, 64) of a square that is painted in place."""
    pixels[where] = colour
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[where] = True
    return mask


def _mark(rng: np.random.Generator) -> tuple[Array, Array]:
    """One red mark; a green one of the same size that means nothing."""
    pixels = background(rng)
    here, there = random_places(rng, 2)
    paint(pixels, there, GREEN)
    return pixels, paint(pixels, here, RED)


def _colour(rng: np.random.Generator) -> tuple[Array, Array]:
    """Blue in eight small spots all over: no single place decides."""
    pixels = background(rng)
    masks = [paint(pixels, where, BLUE) for where in random_places(rng, 8, CELL)]
    return pixels, np.logical_or.reduce(masks)


def _both(rng: np.random.Generator) -> tuple[Array, Array]:
    """A red and a blue mark, and a green one that means nothing."""
    pixels = background(rng)
    here, there, idle = places_apart(rng, 3)
    paint(pixels, idle, GREEN)
    return pixels, paint(pixels, here, RED) | paint(pixels, there, BLUE)


def places_apart(rng: np.random.Generator, count: int) -> list[tuple[slice, slice]]:
    """Marks that do not touch: one in a quarter of the image, with a cell between
    quarters.
    """
    spots = [divmod(int(quarter), 2) for quarter in rng.permutation(4)[:count]]
    starts = [
        (
            2 * MARK * y + CELL * int(rng.integers(2)),
            2 * MARK * x + CELL * int(rng.integers(2)),
        )
        for y, x in spots
    ]
    return [(slice(y, y + MARK), slice(x, x + MARK)) for y, x in starts]


CORNER = (slice(0, 8), slice(0, 8))


def _shortcut(rng: np.random.Generator) -> tuple[Array, Array]:
    """A tag in the corner, and a faint object that tells less: what the network learnt
    to read is the tag.
    """
    pixels = background(rng)
    y, x = (int(at) for at in rng.integers(24, SIDE - MARK, 2))
    square = pixels[y : y + MARK, x : x + MARK].astype(int)
    pixels[y : y + MARK, x : x + MARK] = np.clip(square + 12, 0, 255).astype(np.uint8)
    return pixels, paint(pixels, CORNER, RED)


# ---- worlds


@dataclass(frozen=True)
class World:
    """A model and its images: ``draw`` gives an image and the mask of its evidence,
    ``build`` the network (seeded).
    """

    name: str
    what: str
    draw: Callable[[np.random.Generator], tuple[Array, Array]]
    build: Callable[[], nn.Module]
    parts: int = 1

    def samples(self, count: int, seed: int = 0) -> list[Sample]:
        """Images of the class "planted", each with its evidence as the mask of that
        class.
        """
        found = []
        for number in range(count):
            pixels, mask = self.draw(np.random.default_rng([seed, number]))
            found.append(
                Sample(f"{self.name}-{number:03d}", pixels, 1, masks={"1": mask})
            )
        return found

    def model(self) -> TorchNetwork:
        """The model, plain torch; the same one each time."""
        return _built(self.name)


@cache
def _built(name: str) -> TorchNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = WORLDS[name].build().eval()
    made = wrap(
        module,
        classes=CLASSES,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        size=SIDE,
        name=f"planted-{name}",
    )
    return made.using(engine="torch")


def trained_on_shortcut(steps: int = 25, batch: int = 32) -> nn.Module:
    """A network trained for seconds to tell images with the tag (and the faint object)
    from images with neither.
    """
    network = Small()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        labels = torch.arange(batch) % 2
        base_images = [
            _shortcut(rng)[0] if label else background(rng)
            for label in labels.tolist()
        ]
        pixels = torch.cat([images.to_tensor(image) for image in base_images])
        loss = nn.functional.cross_entropy(network(pixels), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.requires_grad_(requires_grad=True)


WORLDS: Mapping[str, World] = MappingProxyType(
    {
        "patch": World(
            "patch",
            "one red mark decides; a green one of the same size does not",
            _mark,
            lambda: One(0),
        ),
        "colour": World(
            "colour",
            "the amount of blue decides, wherever it is",
            _colour,
            lambda: One(1),
        ),
        "both": World(
            "both", "a red and a blue mark must both be there", _both, Both, parts=2
        ),
        "shortcut": World(
            "shortcut",
            "a tag in the corner decides, not the object",
            _shortcut,
            trained_on_shortcut,
        ),
    }
)


# ---- proof


@dataclass(frozen=True)
class Verified:
    """What intervening showed: probability of "planted" with the evidence, without it,
    and without as much of anything else.
    """

    whole: float
    without: float
    elsewhere: float
    parts: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether only the evidence turns the decision: without it, or any part of it
        that must be there, it is "nothing".
        """
        return (
            self.whole > 0.5
            and self.elsewhere > 0.5
            and max(self.without, *self.parts) < 0.5
        )


def verify(
    world: World,
    sample: Sample,
    model: Model | None = None,
    seed: int = 0,
    trials: int = 20,
) -> Verified:
    """Take away the evidence, and ``trials`` times as large a part of the rest, and ask
    the model.

    What is removed shows other background. ``elsewhere`` is the least probability of
    all trials; ``parts`` has the probability without each connected mark where all are
    needed (worlds of several parts), else without the whole evidence.
    """
    network = model or world.model()
    mask = sample.masks["1"]
    rng = np.random.default_rng([seed, 1])
    other = background(np.random.default_rng([seed, 2]))
    rest = np.flatnonzero(~mask)
    removed = [np.zeros_like(mask), mask, *_parts(mask, world.parts)]
    for _ in range(trials):
        away = np.zeros(mask.size, dtype=bool)
        away[rng.choice(rest, min(mask.sum(), rest.size), replace=False)] = True
        removed.append(away.reshape(mask.shape))
    removed.append(~mask & _blocks(mask))
    said = _planted(
        network,
        [
            replace(sample, pixels=np.where(gone[..., None], other, sample.pixels))
            for gone in removed
        ],
    )
    count = 2 + len(_parts(mask, world.parts))
    return Verified(said[0], said[1], min(said[count:]), tuple(said[2:count]))


def _parts(mask: Array, parts: int) -> list[Array]:
    """The marks of the evidence one by one, where all of them must be there; else all
    of it.
    """
    if parts == 1:
        return [mask]
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    if count != parts:
        raise ConsilienceError(
            f"the evidence has {count} connected marks where {parts} are needed"
        )
    return [labels == number for number in range(1, count + 1)]


def _blocks(mask: Array) -> Array:
    """Every cell of the grid of marks that holds no evidence: all the rest of the image
    at once.
    """
    size = CELL
    held = mask.reshape(SIDE // size, size, SIDE // size, size).any(axis=(1, 3))
    return ~held.repeat(size, axis=0).repeat(size, axis=1)


def _planted(model: Model, samples: list[Sample]) -> list[float]:
    pixels = torch.cat([model.view(sample).pixels for sample in samples])
    found: list[float] = model.scores(pixels).softmax(dim=1)[:, 1].double().tolist()
    return found


# ---- maps of known worth


def true_map(sample: Sample) -> Array:
    """The right explanation (64, 64) float32: 1 on the evidence, 0 elsewhere."""
    return sample.masks["1"].astype(np.float32)


def wrong_maps(sample: Sample, seed: int = 0) -> dict[str, Array]:
    """Explanations that are wrong by construction: the evidence moved, everything but
    it, noise, a blob in the middle.
    """
    mask = sample.masks["1"]
    noise = np.random.default_rng([seed, int(sample.digest, 16)]).random(mask.shape)
    away = max(
        (np.roll(mask, shift, axis=(0, 1)) for shift in _shifts()),
        key=lambda moved: (moved & ~mask).sum(),
    )
    y, x = np.ogrid[:SIDE, :SIDE]
    middle = np.exp(
        -(((y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2) / (2 * (SIDE / 4) ** 2))
    )
    maps = {"elsewhere": away, "inverted": ~mask, "noise": noise, "centre": middle}
    return {
        name: np.asarray(values, dtype=np.float32) for name, values in maps.items()
    }


def _shifts() -> list[tuple[int, int]]:
    return [
        (down, across)
        for down in range(0, SIDE, MARK)
        for across in range(0, SIDE, MARK)
        if down or across
    ]


def world_named(name: str) -> World:
    """A world by its name."""
    if name not in WORLDS:
        raise ConsilienceError(
            f"no planted world {name!r}; there is: {', '.join(WORLDS)}"
        )
    return WORLDS[name]
