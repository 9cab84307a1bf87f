"""A ruler along an edge, as beside skin lesions and finds."""

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


@marks.register("ruler")
@dataclass(frozen=True)
class RulerMark:
    """A ruler: ticks of three lengths on a pale strip."""

    size: float = option(0.09, help="its height, share of the frame", above=0, most=1)
    opacity: float = option(0.9, help="0 to 1", above=0, most=1)
    place: Place = option("bottom", help="where it lies")
    colour: str = option("black", help="a name or #rrggbb")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.04, 0.06, 0.09, 0.14),
        "place": ("top", "centre", "bottom"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        height, width = images.shape[-2:]
        thick, length = max(6, round(self.size * height)), round(0.9 * width)
        sheet = transparent(thick, length)
        draw, ink = ImageDraw.Draw(sheet), (*rgb(self.colour), 255)
        draw.rectangle((0, 0, length * FINE, thick * FINE), fill=(245, 245, 235, 255))
        step = max(2.0, length / 60)
        for tick in range(int(length / step)):
            long = 0.75 if tick % 10 == 0 else 0.5 if tick % 5 == 0 else 0.3
            x = round((tick + 0.5) * step * FINE)
            draw.line(
                (x, 0, x, long * thick * FINE), fill=ink, width=max(2, FINE // 2)
            )
        return overlaid(images, as_patch(sheet, self.opacity), self.place, seed)
