"""A border round the image, as of slides and scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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


@marks.register("border")
@dataclass(frozen=True)
class BorderMark:
    """A border of one colour round the frame."""

    size: float = option(
        0.05, help="its thickness, share of the frame", above=0, most=1
    )
    opacity: float = option(1.0, help="0 to 1", above=0, most=1)
    colour: str = option("black", help="a name or #rrggbb")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.01, 0.03, 0.05, 0.1),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The mark and its controls."""
        height, width = images.shape[-2:]
        thick = max(1, round(self.size * min(height, width))) * FINE
        sheet = transparent(height, width)
        ImageDraw.Draw(sheet).rectangle(
            (0, 0, width * FINE - 1, height * FINE - 1),
            outline=(*rgb(self.colour), 255),
            width=thick,
        )
        return overlaid(images, as_patch(sheet, self.opacity), "centre", seed)
