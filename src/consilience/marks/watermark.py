"""ImageNet-W's watermark, where the package ``imagenet-w`` is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageDraw
from torch import Tensor

from consilience.marks.painting import (
    Painted,
    Place,
    as_patch,
    font_file,
    overlaid,
    trimmed,
)
from consilience.registry import marks, option
from consilience.types import ConsilienceError

TEXT = "捷径捷径捷径"
FONT = "SourceHanSerifSC-ExtraLight.otf"
LETTER = 36 / 224


def watermark_font() -> Path | None:
    """The font that comes with ``imagenet-w``; None where it is not installed."""
    found = find_spec("imagenet_w")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "fonts" / FONT
    return file if file.is_file() else None


@marks.register("imagenet-w")
@dataclass(frozen=True)
class WatermarkMark:
    """The watermark that networks trained on ImageNet take for a carton (Li et al., A
    Whac-A-Mole Dilemma, CVPR 2023): six letters, half transparent, at the left.

    Letters of 36 pixels in a frame of 224, as in the package. Needs ``imagenet-w``.
    """

    size: float = option(
        LETTER, help="height of a letter, share of the frame", above=0, most=1
    )
    opacity: float = option(0.5, help="0 to 1", above=0, most=1)
    place: Place = option("left", help="where it lies")
    words: str = option(TEXT, help="other words in the same font")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.05, 0.1, LETTER, 0.2),
        "place": ("top", "left", "bottom"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The watermark and its controls."""
        file = watermark_font()
        if file is None:
            raise ConsilienceError(
                "mark imagenet-w needs the package imagenet-w: pip install imagenet-w"
            )
        height, width = images.shape[-2:]
        size = max(4, round(self.size * height))
        font = font_file(str(file), size)
        room = (int(font.getlength(self.words)) + 2 * size, 3 * size)
        sheet = Image.new("RGBA", room, (0, 0, 0, 0))
        ImageDraw.Draw(sheet).text((size, size), self.words, font=font, fill="white")
        cut = trimmed(sheet)
        patch = as_patch(
            cut.crop((0, 0, min(cut.width, width), cut.height)), self.opacity, 1
        )
        return overlaid(images, patch, self.place, seed)
