"""Plots of a comparison as SVG, drawn here: Venn diagram, grouped bars, heat map, word
cloud.

All labels come from the data that is given. Text is in the ink of the page
(``currentColor``), every plot has its numbers as text, and sizes of words are fixed, so
that a layout made here holds in any browser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
from markupsafe import Markup, escape
from PIL import ImageFont

from consilience.show.panels import ONLY_A, ONLY_B, visible

A, B = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (ONLY_A, ONLY_B))
FONT = 13
DRAWING_WIDTH = 640


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def width_of(text: str, size: float = FONT) -> float:
    """Width of a text in DejaVu Sans."""
    return float(_font(100).getlength(visible(text))) * size / 100


def shortened(text: str, room: float, size: float = FONT) -> str:
    """The text, or its beginning with an ellipsis, so that it is no wider than
    ``room``.
    """
    text = visible(text)
    if width_of(text, size) <= room:
        return text
    while text and width_of(f"{text}…", size) > room:
        text = text[:-1]
    return f"{text}…"


def _svg(width: float, height: float, parts: Sequence[str], alt: str) -> Markup:
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg {frame} role="img" aria-label="{escape(visible(alt))}"'
    style = f'font-family="DejaVu Sans, system-ui, sans-serif" font-size="{FONT}" fill="currentColor"'
    return Markup(f"{head} {style}>{''.join(parts)}</svg>")


def _text(
    x: float, y: float, words: str, anchor: str = "start", extra: str = ""
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(visible(words))}</text>'


def _key(names: Sequence[tuple[str, str]], y: float) -> list[str]:
    """Coloured squares with their names, in a column."""
    parts = []
    for row, (colour, name) in enumerate(names):
        top = y + 20 * row
        parts.append(
            f'<rect x="0" y="{top:.1f}" width="12" height="12" rx="2" fill="{colour}"/>'
        )
        parts.append(_text(18, top + 11, shortened(name, DRAWING_WIDTH - 18)))
    return parts


# ---- Venn


def lens(r1: float, r2: float, distance: float) -> float:
    """Area that two circles share."""
    if distance >= r1 + r2:
        return 0.0
    if distance <= abs(r1 - r2):
        return math.pi * min(r1, r2) ** 2
    to_1 = (distance**2 + r1**2 - r2**2) / (2 * distance)
    return _cap(r1, to_1) + _cap(r2, distance - to_1)


def _cap(radius: float, height: float) -> float:
    """Area of a circle beyond a line at ``height`` from its centre."""
    share = max(-1.0, min(1.0, height / radius))
    return radius**2 * math.acos(share) - height * math.sqrt(
        max(0.0, radius**2 - height**2)
    )


def distance_for(r1: float, r2: float, shared: float) -> float:
    """How far apart the centres are for that shared area, by bisection."""
    low, high = abs(r1 - r2), r1 + r2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lens(r1, r2, middle) > shared else (low, middle)
    return (low + high) / 2


def circles(
    only_a: int, shared: int, only_b: int, room: float = 110
) -> tuple[float, float, float]:
    """Radii of both circles and the distance of their centres: areas are as the counts
    are.
    """
    sizes = (only_a + shared, only_b + shared)
    scale = room / math.sqrt(max(*sizes, 1))
    r1, r2 = (scale * math.sqrt(size) for size in sizes)
    if not min(sizes):
        return r1, r2, r1 + r2
    return r1, r2, distance_for(r1, r2, math.pi * scale**2 * shared)


def venn(a: str, b: str, only_a: int, shared: int, only_b: int) -> Markup:
    """Two circles whose areas and overlap are as the counts are; the counts stand in
    the key.
    """
    r1, r2, apart = circles(only_a, shared, only_b)
    left = (DRAWING_WIDTH - r1 - r2 - apart) / 2 + r1
    middle = 10 + max(r1, r2)
    bottom = middle + max(r1, r2) + 18
    parts = [
        f'<circle cx="{left:.1f}" cy="{middle:.1f}" r="{r1:.1f}" fill="{A}" '
        f'fill-opacity=".45" stroke="{A}"/>',
        f'<circle cx="{left + apart:.1f}" cy="{middle:.1f}" r="{r2:.1f}" fill="{B}" '
        f'fill-opacity=".45" stroke="{B}"/>',
        *_key(
            [(A, _of_own(a, only_a, shared)), (B, _of_own(b, only_b, shared))], bottom
        ),
        _text(18, bottom + 51, f"shared: {shared}"),
    ]
    return _svg(
        DRAWING_WIDTH,
        bottom + 60,
        parts,
        f"{a} has {only_a} concepts of its own, {b} has {only_b}, both have {shared}",
    )


def _of_own(name: str, own: int, shared: int) -> str:
    return f"{name}: {own + shared}, of which {own} are its own"


# ---- bars


def grouped_bars(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    title: str,
    digits: int = 0,
) -> Markup:
    """Grouped horizontal bars: a group a label, in it a bar for each of one or two
    series (name, values); NaN has no bar.
    """
    label_room = min(220.0, max((width_of(label) for label in labels), default=0) + 10)
    top = 20 * len(series) + 10
    largest = (
        max(
            (value for _, values in series for value in values if math.isfinite(value)),
            default=0,
        )
        or 1
    )
    room = DRAWING_WIDTH - label_room - 60
    step = 17 * len(series) + 9
    parts = _key(
        [(colour, name) for (name, _), colour in zip(series, (A, B), strict=False)], 0
    )
    for place, label in enumerate(labels):
        y = top + place * step
        parts.append(
            _text(label_room - 8, y + step / 2, shortened(label, label_room - 8), "end")
        )
        for row, ((_, values), colour) in enumerate(zip(series, (A, B), strict=False)):
            parts += _bar(
                label_room, y + 17 * row, room, values[place], largest, colour, digits
            )
    said = "; ".join(
        f"{name}: {_listed(labels, values, digits)}" for name, values in series
    )
    return _svg(DRAWING_WIDTH, top + step * len(labels) + 4, parts, f"{title}. {said}")


def _listed(labels: Sequence[str], values: Sequence[float], digits: int) -> str:
    return ", ".join(
        f"{label} {value:.{digits}f}"
        for label, value in zip(labels, values, strict=True)
    )


def _bar(
    x: float,
    y: float,
    room: float,
    value: float,
    largest: float,
    colour: str,
    digits: int,
) -> list[str]:
    if not math.isfinite(value):
        return [_text(x + 4, y + 12, "–")]
    length = max(0.0, room * value / largest)
    rect = f'<rect x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="14" rx="2" fill="{colour}"/>'
    return [rect, _text(x + length + 5, y + 12, f"{value:.{digits}f}")]


# ---- heat map


def heat_table(
    rows: Sequence[str],
    columns: Sequence[tuple[str, str]],
    values: Sequence[Sequence[int]],
    title: str,
) -> Markup:
    """Counts by row and (side, layer): a cell is the darker the larger, in its side's
    colour, with the number in it.
    """
    label_room = min(200.0, max((width_of(row) for row in rows), default=0) + 12)
    sides = list(dict.fromkeys(side for side, _ in columns))
    colours = dict(zip(sides, (A, B), strict=False))
    cell = min(90.0, (DRAWING_WIDTH - label_room) / max(len(columns), 1))
    top = 20 * len(sides) + 34
    largest = max((value for row in values for value in row), default=0) or 1
    parts = _key([(colours[side], side) for side in sides], 0)
    for place, (_, layer) in enumerate(columns):
        parts.append(
            _text(
                label_room + cell * (place + 0.5),
                top - 8,
                shortened(layer, cell - 4),
                "middle",
            )
        )
    for y, (row, counts) in enumerate(zip(rows, values, strict=True)):
        parts.append(
            _text(
                label_room - 8, top + 24 * y + 16, shortened(row, label_room - 8), "end"
            )
        )
        for x, (count, (side, _)) in enumerate(zip(counts, columns, strict=True)):
            parts += _cell(
                label_room + cell * x,
                top + 24 * y,
                cell,
                count,
                count / largest,
                colours[side],
            )
    return _svg(DRAWING_WIDTH, top + 24 * len(rows) + 4, parts, title)


def _cell(
    x: float, y: float, width: float, count: int, share: float, colour: str
) -> list[str]:
    opacity = 0.06 if not count else 0.15 + 0.6 * share
    place = (
        f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="22" rx="3"'
    )
    box = f'<rect {place} fill="{colour}" fill-opacity="{opacity:.2f}"/>'
    return [box, _text(x + width / 2, y + 16, str(count) if count else "·", "middle")]


# ---- word cloud


@dataclass(frozen=True)
class Placed:
    """A word in the cloud: its box (left, top, width, height) and its size."""

    word: str
    size: float
    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Placed) -> bool:
        """Whether two boxes overlap."""
        across = self.x < other.x + other.width and other.x < self.x + self.width
        return (
            across
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def laid_out(
    words: Sequence[tuple[str, float]], room: tuple[float, float] = (DRAWING_WIDTH, 300)
) -> list[Placed]:
    """Words (text, weight) placed without overlap, the heaviest in the middle, areas as
    the weights; what finds no room is left out. Nothing is drawn at random: the same
    words lie the same way.
    """
    placed: list[Placed] = []
    heaviest = max((weight for _, weight in words), default=1)
    for word, weight in sorted(words, key=lambda item: -item[1]):
        size = max(9.0, 44 * math.sqrt(weight / heaviest))
        found = next(
            (
                spot
                for spot in _spots(word, size, room)
                if not any(spot.meets(other) for other in placed)
            ),
            None,
        )
        if found is not None:
            placed.append(found)
    return placed


def _spots(word: str, size: float, room: tuple[float, float]) -> Iterator[Placed]:
    """Places on a spiral from the middle outwards, inside the room."""
    width, height = width_of(word, size) + 6, size * 1.2
    for step in range(1400):
        angle = 0.35 * step
        reach = step / 1400 * 0.5
        x = room[0] * (0.5 + reach * math.cos(angle)) - width / 2
        y = room[1] * (0.5 + reach * math.sin(angle)) - height / 2
        if x >= 0 and y >= 0 and x + width <= room[0] and y + height <= room[1]:
            yield Placed(word, size, x, y, width, height)


def cloud(
    name: str,
    words: Sequence[tuple[str, float]],
    colour: str,
    room: tuple[float, float] = (DRAWING_WIDTH, 300),
) -> Markup:
    """Words sized by weight; how many found no room is said below."""
    placed = laid_out(words, room)
    top = min((spot.y for spot in placed), default=0.0)
    bottom = max((spot.y + spot.height for spot in placed), default=0.0) - top
    parts = [_word(replace(spot, y=spot.y - top), colour) for spot in placed]
    left = len(words) - len(placed)
    more = [_text(0, bottom + 16, f"{left} more found no room")] if left else []
    return _svg(
        room[0],
        bottom + (22 if left else 0),
        [*parts, *more],
        f"concepts of {name}, the larger the more units",
    )


def _word(spot: Placed, colour: str) -> str:
    """A word held to the width it was laid out with, whatever font the browser has."""
    held = f' font-size="{spot.size:.1f}" textLength="{spot.width - 6:.1f}" lengthAdjust="spacingAndGlyphs" fill="{colour}"'
    return _text(spot.x + 3, spot.y + 0.82 * spot.height, spot.word, extra=held)
