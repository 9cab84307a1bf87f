"""Words: captions, watermarks, dates, in any script that the font has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageDraw
from torch import Tensor

from consilience.marks.painting import (
    FINE,
    Painted,
    Place,
    as_patch,
    font_file,
    overlaid,
    rgb,
    trimmed,
)
from consilience.registry import marks, option
from consilience.types import ConsilienceError

WORDS = {
    "latin": "shortcut",
    "cyrillic": "сайт фото",
    "greek": "φωτογραφία",
    "hebrew": "קיצור דרך",
    "arabic": "طريق مختصر",
    "armenian": "կարճ ճանապարհ",
    "georgian": "მოკლე გზა",
}


@marks.register("text")
@dataclass(frozen=True)
class TextMark:
    """Words over the image. A script's name (latin, cyrillic, greek, hebrew, arabic,
    armenian, georgian) stands for words in it; other scripts need a ``font``.
    """

    words: str = option("latin", help="the words, or a script's name")
    size: float = option(
        0.16, help="height of a line, share of the frame", above=0, most=1
    )
    opacity: float = option(0.5, help="0 to 1", above=0, most=1)
    place: Place = option("left", help="where it lies")
    colour: str = option("white", help="a name or #rrggbb")
    font: str = option("", help="a font file (default: DejaVu Sans)")

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "opacity": (0.1, 0.25, 0.5, 1.0),
        "size": (0.05, 0.1, 0.16, 0.24),
        "place": ("top", "left", "centre", "bottom"),
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The words and their controls; raises `ConsilienceError` for letters that the
        font lacks.
        """
        height, width = images.shape[-2:]
        text = WORDS.get(self.words, self.words)
        size = max(4, round(self.size * height)) * FINE
        font = font_file(self.font, size)
        lacks = sorted({letter for letter in text if _missing(font, letter)})
        if lacks:
            raise ConsilienceError(
                f"the font of text:{self.words} lacks {''.join(lacks)}; give font=FILE"
            )
        sheet = Image.new(
            "RGBA", (int(font.getlength(text)) + 2 * size, 3 * size), (0, 0, 0, 0)
        )
        ImageDraw.Draw(sheet).text(
            (size, size), text, font=font, fill=(*rgb(self.colour), 255)
        )
        cut = trimmed(sheet)
        most = int(width * FINE * 0.96)
        if cut.width > most:  # longer than the frame: smaller letters
            cut = cut.resize((most, max(FINE, round(cut.height * most / cut.width))))
        return overlaid(images, as_patch(cut, self.opacity), self.place, seed)


def _missing(font: object, letter: str) -> bool:
    """Whether a font draws its sign for what it lacks."""
    if letter.isspace():
        return False
    mask, lack = (font.getmask(one) for one in (letter, "\U0010ffff"))  # type: ignore[attr-defined]
    return mask.size == lack.size and bytes(mask) == bytes(lack)
