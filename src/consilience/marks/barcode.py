"""A bar code on a white label."""

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


@marks.register("barcode")
@dataclass(frozen=True)
class BarcodeMark:
    """Black bars of four widths on a white label."""

    size: float = option(0.25, help="its width, share of the frame", above=0, most=1)
    opacity: float = option(1.0, help="0 to 1", above=0, most=1)
    place: Place = option("bottom-left", help="where it lies")
    colour: str = option("black", help="a name or #rrggbb")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.1, 0.18, 0.25, 0.4),
        "place": ("top-left", "top-right", "bottom-left", "bottom-right"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        wide = max(16, round(self.size * images.shape[-1]))
        tall = max(8, wide // 2)
        sheet = transparent(tall, wide)
        draw, ink = ImageDraw.Draw(sheet), (*rgb(self.colour), 255)
        draw.rectangle((0, 0, wide * FINE, tall * FINE), fill=(255, 255, 255, 255))
        rng, x = np.random.default_rng(4), 0.08 * wide
        while x < 0.9 * wide:
            bar, gap = rng.integers(1, 5, 2) * wide / 100
            draw.rectangle(
                (x * FINE, 0.12 * tall * FINE, (x + bar) * FINE, 0.88 * tall * FINE),
                fill=ink,
            )
            x += bar + gap
        return overlaid(images, as_patch(sheet, self.opacity), self.place, seed)
