"""A mark from a PNG of one's own: a logo, a stamp, a frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from torch import Tensor

from consilience.images import opened_image
from consilience.marks.painting import Painted, Place, as_patch, overlaid, trimmed
from consilience.registry import marks, option


@marks.register("png")
@dataclass(frozen=True)
class PictureMark:
    """A picture laid over the image, with its own transparency."""

    file: str = option(help="a PNG (or any picture)")
    size: float = option(
        0.3, help="its longer side, share of the frame", above=0, most=1
    )
    opacity: float = option(1.0, help="0 to 1", above=0, most=1)
    place: Place = option("bottom-right", help="where it lies")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.1, 0.2, 0.3, 0.5),
        "place": ("top-left", "top-right", "bottom-left", "bottom-right"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The picture and its controls."""
        with opened_image(Path(self.file)) as picture:
            cut = trimmed(picture.convert("RGBA"))
        longest = self.size * min(images.shape[-2:])
        scale = longest / max(cut.size)
        size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
        small = (
            cut.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        )
        return overlaid(images, as_patch(small, self.opacity, 1), self.place, seed)
