"""An arrow that points at the middle, as people draw on pictures."""

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


@marks.register("arrow")
@dataclass(frozen=True)
class ArrowMark:
    """A thick arrow that points to the lower right."""

    size: float = option(0.2, help="its width, share of the frame", above=0, most=1)
    opacity: float = option(1.0, help="0 to 1", above=0, most=1)
    place: Place = option("top-left", help="where it lies")
    colour: str = option("red", help="a name or #rrggbb")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.08, 0.14, 0.2, 0.35),
        "place": ("top-left", "top-right", "bottom-left", "bottom-right"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        side = max(8, round(self.size * min(images.shape[-2:])))
        sheet = transparent(side, side)
        draw, ink, full = ImageDraw.Draw(sheet), (*rgb(self.colour), 255), side * FINE
        width = max(FINE, round(0.14 * full))
        draw.line(
            (0.05 * full, 0.05 * full, 0.7 * full, 0.7 * full), fill=ink, width=width
        )
        draw.polygon(
            [(full, full), (0.45 * full, 0.85 * full), (0.85 * full, 0.45 * full)],
            fill=ink,
        )
        return overlaid(images, as_patch(sheet, self.opacity), self.place, seed)
