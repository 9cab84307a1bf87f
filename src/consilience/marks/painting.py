"""A mark in images, and beside it what a mark has to be held against.

A mark changes more than one thing: it covers a part of the image, it has a colour, it
has a shape. Its controls change all but one of them, over the same area: the same
pixels scattered (no shape), the same colour flat (no shape, no edges); ``elsewhere`` is
the mark itself in another place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

from consilience.types import Array, ConsilienceError

Place = Literal[
    "top-left",
    "top",
    "top-right",
    "left",
    "centre",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
]
MARGIN = 0.02
"""What is left free between a mark and the edge, as a share of the frame."""

FINE = 4
"""Shapes are drawn so many times finer and averaged, for smooth edges."""

DRAWS = 8
"""How many scatterings there are; images take them in turn, so that no one pattern of
scattered pixels is the control.
"""

ELSEWHERE = "elsewhere"
"""The name of the mark in another place, which is no control of its shape."""


@dataclass(frozen=True, eq=False)
class Painted:
    """Images with a mark, ``marked`` (n, C, h, w) in [0, 1], the same with each of its
    ``controls``, and ``where`` (h, w) in [0, 1]: how opaque the mark lies.
    """

    marked: Tensor
    controls: Mapping[str, Tensor]
    where: Array


class Mark(Protocol):
    """A frozen dataclass that paints itself into images.

    ``doses`` are values of its options, from weak to strong, that a dose curve tries.
    """

    doses: Mapping[str, tuple[object, ...]]

    def paint(self, images: Tensor, seed: int) -> Painted:
        """``images`` (n, C, h, w) in [0, 1] with the mark and with its controls."""


# ---- what is laid over the image


def overlaid(images: Tensor, patch: Array, place: Place, seed: int) -> Painted:
    """Images under a patch (p, q, 4) of RGBA in [0, 1], at a place of the frame."""
    height, width = images.shape[-2:]
    patch = patch[:height, :width]
    top, left = corner(place, patch.shape[:2], (height, width))
    there = (top, left)
    scattered = np.stack([_scattered(patch, seed + draw) for draw in range(DRAWS)])
    controls = {
        "scattered": _blended(images, scattered, there),
        "flat": _blended(images, _flat(patch)[None], there),
    }
    other = _elsewhere(there, patch.shape[:2], (height, width))
    if other is not None:
        controls[ELSEWHERE] = _blended(images, patch[None], other)
    where = np.zeros((height, width), np.float32)
    where[top : top + patch.shape[0], left : left + patch.shape[1]] = patch[..., 3]
    return Painted(_blended(images, patch[None], there), controls, where)


def corner(
    place: Place, patch: tuple[int, int], frame: tuple[int, int]
) -> tuple[int, int]:
    """Upper left corner (y, x) of a patch at a place of the frame."""
    rows = {"top": 0.0, "bottom": 1.0}
    columns = {"left": 0.0, "right": 1.0}
    words = place.split("-")
    shares = (
        next((rows[word] for word in words if word in rows), 0.5),
        next((columns[word] for word in words if word in columns), 0.5),
    )
    found = []
    for share, size, room in zip(shares, patch, frame, strict=True):
        margin = min(round(MARGIN * room), (room - size) // 2)
        found.append(round(margin + share * (room - size - 2 * margin)))
    return found[0], found[1]


def _elsewhere(
    there: tuple[int, int], patch: tuple[int, int], frame: tuple[int, int]
) -> tuple[int, int] | None:
    """The corner of the place that is farthest away; None where it would touch."""
    places = [corner(place, patch, frame) for place in get_args(Place)]
    gaps = [max(abs(y - there[0]), abs(x - there[1])) for y, x in places]
    far = places[int(np.argmax(gaps))]
    apart = abs(far[0] - there[0]) >= patch[0] or abs(far[1] - there[1]) >= patch[1]
    return far if apart else None


def _scattered(patch: Array, seed: int) -> Array:
    """The patch's own pixels in another order."""
    pixels = patch.reshape(-1, 4)
    order = np.random.default_rng(seed).permutation(len(pixels))
    found: Array = pixels[order].reshape(patch.shape)
    return found


def _flat(patch: Array) -> Array:
    """One colour of one opacity over the patch, with as much ink as the patch has."""
    opacity = patch[..., 3:]
    ink = float(opacity.sum())
    colour = (patch[..., :3] * opacity).sum((0, 1)) / max(ink, 1e-12)
    flat = np.empty_like(patch)
    flat[..., :3], flat[..., 3] = colour, opacity.mean()
    return flat


def _blended(images: Tensor, patches: Array, there: tuple[int, int]) -> Tensor:
    """Images under patches (d, p, q, 4), which are taken in turn."""
    top, left = there
    height, width = patches.shape[1:3]
    part = (slice(top, top + height), slice(left, left + width))
    layers = torch.from_numpy(patches).to(images).permute(0, 3, 1, 2)
    colours, opacities = _in_channels(layers[:, :3], images.shape[1]), layers[:, 3:]
    made = images.clone()
    covered = made[:, :, part[0], part[1]]
    for turn, (colour, opacity) in enumerate(zip(colours, opacities, strict=True)):
        covered[turn :: len(patches)].lerp_(colour, opacity)
    return made


def _in_channels(colour: Tensor, channels: int) -> Tensor:
    """A colour as a network of so many channels sees it: luma (ITU-R BT.601) of one."""
    if channels == 3:
        return colour
    if channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).to(colour)
        return (colour * weights[:, None, None]).sum(1, keepdim=True)
    raise ConsilienceError(
        f"marks have a colour; this network sees images of {channels} channels"
    )


# ---- what is done to the whole image


def replaced(
    images: Tensor, changed: Tensor, controls: Mapping[str, Tensor]
) -> Painted:
    """Images that are changed everywhere, clipped to [0, 1]."""
    bounded = {name: one.clamp(0, 1) for name, one in controls.items()}
    where = np.ones(images.shape[-2:], np.float32)
    return Painted(changed.clamp(0, 1), bounded, where)


def scattered_change(images: Tensor, changed: Tensor, seed: int) -> Tensor:
    """Images with the same changes of pixels, each change at another pixel."""
    count = images.shape[-2] * images.shape[-1]
    orders = [
        torch.from_numpy(np.random.default_rng(seed + draw).permutation(count))
        for draw in range(min(DRAWS, len(images)))
    ]
    change = (changed - images).flatten(2)
    made = images.flatten(2).clone()
    for draw, order in enumerate(orders):
        made[draw :: len(orders)] += change[draw :: len(orders)][
            :, :, order.to(images.device)
        ]
    return made.reshape(images.shape)


# ---- drawing


def transparent(height: int, width: int) -> Image.Image:
    """A sheet to draw on, `FINE` times finer."""
    return Image.new("RGBA", (width * FINE, height * FINE), (0, 0, 0, 0))


def as_patch(sheet: Image.Image, opacity: float, fine: int = FINE) -> Array:
    """A drawing as RGBA (h, w, 4) float32 in [0, 1]: premultiplied when it is averaged,
    so that edges keep their colour.
    """
    fine_pixels = np.asarray(sheet.convert("RGBA"), np.float32) / 255
    height, width = (side // fine for side in fine_pixels.shape[:2])
    blocks = fine_pixels[: height * fine, : width * fine].reshape(
        height, fine, width, fine, 4
    )
    alpha = blocks[..., 3:].mean((1, 3))
    colour = (blocks[..., :3] * blocks[..., 3:]).mean((1, 3)) / np.maximum(
        alpha, 1e-6
    )
    return np.concatenate([colour, alpha * opacity], axis=2).astype(np.float32)


def trimmed(sheet: Image.Image) -> Image.Image:
    """A drawing without its empty edges."""
    box = sheet.getchannel("A").getbbox()
    if box is None:
        raise ConsilienceError("the mark is empty: nothing of it can be seen")
    return sheet.crop(box)


@cache
def font_file(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of a size in pixels; without a path DejaVu Sans, which comes with
    matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic, Armenian and Georgian letters.
    """
    if not path:
        import matplotlib

        path = str(
            Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        )
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ConsilienceError(f"font {path!r} cannot be read: {error}") from error


def rgb(colour: str) -> tuple[int, int, int]:
    """A colour by its name or as ``#rrggbb``."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError as error:
        raise ConsilienceError(
            f"no colour {colour!r}; a colour is a name (white, red) or #rrggbb"
        ) from error


# ---- a mark as a thing of its own


def patch_of(mark: Mark, channels: int, frame: tuple[int, int], seed: int) -> Array:
    """What a mark lays over images of a frame, cut out: (channels + 1, p, q) float32,
    colour times opacity and then opacity.

    Raises `ConsilienceError` for a mark that changes the whole image.
    """
    grounds = torch.zeros(2, channels, *frame)
    grounds[1] = 1
    painted = mark.paint(grounds, seed)
    on = painted.where > 0
    if on.all():
        raise ConsilienceError(
            f"{type(mark).__name__} changes the whole image; a mark that can be put "
            "anywhere covers a part of it"
        )
    rows, columns = (np.flatnonzero(on.any(axis)) for axis in (1, 0))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    black, white = (one[:, part[0], part[1]].numpy() for one in painted.marked)
    opacity = 1 - (white - black).mean(0, keepdims=True)
    return np.concatenate([black, opacity]).astype(np.float32)


def laid(image: Tensor, patch: Array, there: tuple[int, int]) -> Tensor:
    """An image (C, h, w) in [0, 1] under a patch (C + 1, p, q) of `patch_of`, whose
    upper left corner is ``there``.
    """
    height, width = patch.shape[1:]
    part = (
        slice(None),
        slice(there[0], there[0] + height),
        slice(there[1], there[1] + width),
    )
    layer = torch.from_numpy(patch).to(image)
    made = image.clone()
    made[part] = image[part] * (1 - layer[-1:]) + layer[:-1]
    return made
