"""A stamp: two rings round a star, as on documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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


@marks.register("stamp")
@dataclass(frozen=True)
class StampMark:
    """A round stamp: two rings and a star."""

    size: float = option(0.25, help="its width, share of the frame", above=0, most=1)
    opacity: float = option(0.8, help="0 to 1", above=0, most=1)
    place: Place = option("top-right", help="where it lies")
    colour: str = option("crimson", help="a name or #rrggbb")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.1, 0.18, 0.25, 0.4),
        "place": ("top-left", "top-right", "bottom-left", "bottom-right"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        side = max(8, round(self.size * min(images.shape[-2:])))
        sheet = transparent(side, side)
        draw, ink = ImageDraw.Draw(sheet), (*rgb(self.colour), 255)
        full = side * FINE
        for share in (0.0, 0.12):
            edge = share * full
            draw.ellipse(
                (edge, edge, full - 1 - edge, full - 1 - edge),
                outline=ink,
                width=max(FINE, round(0.05 * full)),
            )
        turns = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.13, 0.32) * full
        star = np.stack([np.cos(turns), np.sin(turns)], 1) * radii[:, None] + full / 2
        draw.polygon([tuple(point) for point in star], fill=ink)
        return overlaid(images, as_patch(sheet, self.opacity), self.place, seed)
