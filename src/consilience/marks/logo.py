"""A made-up logo: a disc, a bar and a wedge in two colours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from PIL import ImageDraw
from torch import Tensor

from consilience.marks.painting import (
    FINE,
    Painted,
    Place,
    as_patch,
    overlaid,
    rgb,
    transparent,
)
from consilience.registry import marks, option


@marks.register("logo")
@dataclass(frozen=True)
class LogoMark:
    """A made-up logo of simple shapes in two colours."""

    size: float = option(0.2, help="its width, share of the frame", above=0, most=1)
    opacity: float = option(0.9, help="0 to 1", above=0, most=1)
    place: Place = option("bottom-right", help="where it lies")
    colour: str = option("navy", help="a name or #rrggbb")
    second: str = option("gold", help="its other colour")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.08, 0.14, 0.2, 0.35),
        "place": ("top-left", "top-right", "bottom-left", "bottom-right"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        side = max(8, round(self.size * min(images.shape[-2:])))
        sheet = transparent(side, side)
        draw, full = ImageDraw.Draw(sheet), side * FINE
        first, second = (*rgb(self.colour), 255), (*rgb(self.second), 255)
        draw.rounded_rectangle((0, 0, full - 1, full - 1), full // 6, fill=first)
        draw.ellipse((0.15 * full, 0.15 * full, 0.6 * full, 0.6 * full), fill=second)
        wedge = [(0.85 * full, 0.2 * full), (0.85 * full, 0.85 * full)]
        draw.polygon([*wedge, (0.35 * full, 0.85 * full)], fill=second)
        return overlaid(images, as_patch(sheet, self.opacity), self.place, seed)
