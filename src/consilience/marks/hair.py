"""Dark hairs over the image, as on skin."""

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
    as_patch,
    overlaid,
    rgb,
    transparent,
)
from consilience.registry import marks, option


@marks.register("hair")
@dataclass(frozen=True)
class HairMark:
    """Thin dark curves across the frame."""

    opacity: float = option(0.9, help="0 to 1", above=0, most=1)
    colour: str = option("#2a1a10", help="a name or #rrggbb")
    count: int = option(12, help="how many hairs", least=1)

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "count": (3, 6, 12, 24),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        height, width = images.shape[-2:]
        rng = np.random.default_rng(7)  # the mark is the same in every image
        sheet = transparent(height, width)
        draw, ink = ImageDraw.Draw(sheet), (*rgb(self.colour), 255)
        along = np.linspace(0, 1, 40)
        scale = np.array([width, height]) * FINE
        for _ in range(self.count):
            ends, bend = rng.uniform(-0.05, 1.05, (2, 2)), rng.normal(0, 0.15, 2)
            curve = ends[0] + (ends[1] - ends[0]) * along[:, None]
            curve = curve + bend * (4 * along * (1 - along))[:, None]
            points = [tuple(point) for point in curve * scale]
            draw.line(points, fill=ink, width=max(2, round(0.006 * width * FINE)))
        return overlaid(images, as_patch(sheet, self.opacity), "centre", seed)
