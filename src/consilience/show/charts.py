"""Charts of evaluations, dissections and comparisons as matplotlib figures: forest plot,
critical-difference plot, curves with bands, Venn diagram, bars, heat map, word cloud.

All labels come from the data that is given. Text is in the ink of the page, and every
chart's label says its numbers as text. Methods have colours, controls are grey and
dashed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from consilience.show.colours import ONLY_A, ONLY_B, hex_of
from consilience.show.figures import CURRENT, DPI, FONT, points, shortened, width_of

A, B = hex_of(ONLY_A), hex_of(ONLY_B)
PALETTE = ("#2f80c2", "#d9640c", "#1a936f", "#b5489b", "#b58900", "#6a5acd")
GREY = "#8a939d"
TEXT = 13
"""Pixels of a letter."""
CHART_WIDTH = 360
"""As wide as a phone shows without scaling the letters down; what needs more is wider
and can be moved sideways.
"""
NAMES = 150
"""Pixels for the names of rows."""


# ---- pages and axes


def _page(height: float, alt: str, width: float = CHART_WIDTH) -> tuple[Figure, Axes]:
    """A figure whose one axes is in pixels, from the upper left corner."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.patch.set_alpha(0)
    figure.set_label(alt)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def _plot(height: float, alt: str) -> tuple[Figure, Axes]:
    """A figure with axes in the ink of the page."""
    figure = Figure(
        figsize=(CHART_WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained"
    )
    figure.patch.set_alpha(0)
    figure.set_label(alt)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(CURRENT)
    axes.grid(axis="x", color=CURRENT, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=CURRENT, labelsize=points(TEXT))
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _text(
    axes: Axes,
    x: float,
    y: float,
    said: str,
    align: str = "left",
    size: float = TEXT,
    colour: str = CURRENT,
) -> None:
    axes.text(
        x,
        y,
        said,
        ha=align,
        va="baseline",
        fontsize=points(size),
        color=colour,
        family=FONT,
        parse_math=False,
    )


def _key(axes: Axes, names: Sequence[tuple[str, str]], top: float) -> None:
    """Coloured squares with their names, in a column."""
    for row, (colour, name) in enumerate(names):
        y = top + 20 * row
        axes.add_patch(Rectangle((0, y), 12, 12, facecolor=colour, linewidth=0))
        _text(axes, 18, y + 11, shortened(name, CHART_WIDTH - 18, TEXT))


def _legend(figure: Figure, place: Any, columns: int) -> None:
    legend = figure.legend(
        loc=place, ncols=columns, frameon=False, fontsize=points(TEXT)
    )
    for text in legend.get_texts():
        text.set_color(CURRENT)
        text.set_parse_math(False)


def _name_rows(axes: Axes, labels: Sequence[str], room: float = NAMES) -> None:
    axes.set_yticks(range(len(labels)))
    axes.set_yticklabels(
        [shortened(label, room, TEXT) for label in labels],
        parse_math=False,
        family=FONT,
    )
    axes.set_ylim(len(labels) - 0.5, -0.6)


# ---- evaluations


@dataclass(frozen=True)
class Bar:
    """A mean with its interval (NaN where there is none), and its colour."""

    label: str
    mean: float
    low: float
    high: float
    colour: str
    control: bool = False


@dataclass(frozen=True)
class CurveLine:
    """A mean curve with half the width of its band."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    half: Sequence[float | None]
    colour: str
    control: bool = False


def forest_figure(
    bars: Sequence[Bar], title: str, at: float | None = None
) -> Figure | None:
    """Means with their intervals, a row each; controls are grey, with open marks. ``at``
    is a value with a line of its own.

    None where no bar has a mean.
    """
    known = [bar for bar in bars if math.isfinite(bar.mean)]
    if not known:
        return None
    said = "; ".join(f"{bar.label} {bar.mean:.3f}" for bar in known)
    figure, axes = _plot(24 * len(known) + 36, f"{title}. {said}")
    if at is not None:
        axes.axvline(at, color=CURRENT, linewidth=1.2)
    for row, bar in enumerate(known):
        if math.isfinite(bar.low) and math.isfinite(bar.high):
            ends = ([bar.low, bar.high], [row, row])
            axes.plot(*ends, color=bar.colour, linewidth=2.4, alpha=0.65)
        axes.plot(
            [bar.mean],
            [row],
            marker="o",
            markersize=7,
            markerfacecolor="none" if bar.control else bar.colour,
            markeredgecolor=bar.colour,
            markeredgewidth=1.5,
            linestyle="none",
        )
    _name_rows(axes, [bar.label for bar in known])
    return figure


def curves_with_bands(lines: Sequence[CurveLine], title: str) -> Figure:
    """Mean curves with their 95 % bands; controls are thin and dashed, without bands."""
    figure, axes = _plot(240 + 20 * len(lines), title)
    axes.grid(axis="y", color=CURRENT, alpha=0.13, linewidth=0.8)
    for line in sorted(lines, key=lambda one: not one.control):
        mean = np.asarray(line.mean, dtype=float)
        if not line.control and all(half is not None for half in line.half):
            half = np.asarray(line.half, dtype=float)
            band = (mean - half, mean + half)
            axes.fill_between(
                line.x, *band, color=line.colour, alpha=0.16, linewidth=0
            )
        style = ("--", 1.1) if line.control else ("-", 1.9)
        axes.plot(
            line.x,
            mean,
            color=line.colour,
            linestyle=style[0],
            linewidth=style[1],
            label=shortened(line.label, CHART_WIDTH - 70, TEXT),
        )
    axes.margins(x=0)
    _legend(figure, "outside lower center", 1)
    return figure


def critical_difference_figure(
    labels: Sequence[str],
    ranks: Sequence[float],
    difference: float,
    groups: Sequence[Sequence[int]],
) -> Figure:
    """Mean ranks on a line, 1 (best) on the left; bars join what cannot be told apart
    (Demsar 2006, figure 1).
    """
    order = sorted(range(len(labels)), key=lambda i: ranks[i])
    count, left, right = len(labels), 120.0, CHART_WIDTH - 120.0
    half, line = (count + 1) // 2, 46.0
    below = line + 10 + 9 * len(groups)

    def at(rank: float) -> float:
        return left + (right - left) * (rank - 1) / max(count - 1, 1)

    said = ", ".join(f"{labels[i]} {ranks[i]:.2f}" for i in order)
    alt = f"Mean ranks: {said}; critical difference {difference:.2f}"
    figure, axes = _page(below + 20 * half + 16, alt)
    _bracket(axes, left, at(min(1 + difference, count)), difference)
    axes.plot([left, right], [line, line], color=CURRENT, linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([at(rank)] * 2, [line - 5, line], color=CURRENT, linewidth=1)
        _text(axes, at(rank), line - 9, str(rank), "center")
    for row, group in enumerate(groups):
        ends = [at(ranks[i]) for i in group]
        height = line + 9 + 9 * row
        span = [min(ends) - 3, max(ends) + 3]
        axes.plot(span, [height] * 2, color=PALETTE[0], linewidth=3)
    for place, i in enumerate(order):
        on_left = place < half
        y = below + 20 * (place if on_left else count - 1 - place) + 14
        edge = left if on_left else right
        x = at(ranks[i])
        path = ([x, x, edge], [line, y - 4, y - 4])
        axes.plot(*path, color=CURRENT, alpha=0.45, linewidth=1)
        align, beside = ("right", edge - 6) if on_left else ("left", edge + 6)
        mean = f"{ranks[i]:.2f}"
        room = left - 12 - width_of(mean, TEXT)
        name = f"{shortened(labels[i], room, TEXT)} {mean}"
        _text(axes, beside, y, name, align)
    return figure


def _bracket(axes: Axes, start: float, end: float, difference: float) -> None:
    for x in (start, end):
        axes.plot([x, x], [6, 14], color=CURRENT, linewidth=1)
    axes.plot([start, end], [10, 10], color=CURRENT, linewidth=1)
    _text(axes, end + 8, 14, f"critical difference {difference:.2f}")


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


def venn_figure(a: str, b: str, only_a: int, shared: int, only_b: int) -> Figure:
    """Two circles whose areas and overlap are as the counts are; the counts stand in
    the key.
    """
    r1, r2, apart = circles(only_a, shared, only_b)
    left = (CHART_WIDTH - r1 - r2 - apart) / 2 + r1
    middle = 10 + max(r1, r2)
    bottom = middle + max(r1, r2) + 18
    alt = (
        f"{a} has {only_a} concepts of its own, {b} has {only_b}, both have {shared}"
    )
    figure, axes = _page(bottom + 60, alt)
    for x, radius, colour in ((left, r1, A), (left + apart, r2, B)):
        disc = Circle((x, middle), radius, facecolor=f"{colour}73", edgecolor=colour)
        axes.add_patch(disc)
    own = [(A, _of_own(a, only_a, shared)), (B, _of_own(b, only_b, shared))]
    _key(axes, own, bottom)
    _text(axes, 18, bottom + 51, f"shared: {shared}")
    return figure


def _of_own(name: str, own: int, shared: int) -> str:
    return f"{name}: {own + shared}, of which {own} are its own"


# ---- bars


def bars_figure(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    title: str,
    digits: int = 0,
) -> Figure:
    """Grouped horizontal bars: a group a label, in it a bar for each of one or two
    series (name, values); NaN has no bar.
    """
    said = "; ".join(
        f"{name}: {_listed(labels, values, digits)}" for name, values in series
    )
    step = 17 * len(series) + 9
    alt = f"{title}. {said}"
    figure, axes = _plot(step * len(labels) + 20 * len(series) + 16, alt)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    wide = 0.8 / len(series)
    for row, ((name, values), colour) in enumerate(zip(series, (A, B), strict=False)):
        places = np.arange(len(labels)) + wide * (row - (len(series) - 1) / 2)
        lengths = np.nan_to_num(np.asarray(values, dtype=float))
        drawn = axes.barh(
            places,
            lengths,
            height=0.9 * wide,
            color=colour,
            label=shortened(name, CHART_WIDTH - 60, TEXT),
        )
        shown = [
            f"{value:.{digits}f}" if math.isfinite(value) else "–" for value in values
        ]
        axes.bar_label(
            drawn, shown, padding=4, fontsize=points(TEXT), color=CURRENT, family=FONT
        )
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    _name_rows(axes, labels)
    _legend(figure, "outside upper left", 1)
    return figure


def _listed(labels: Sequence[str], values: Sequence[float], digits: int) -> str:
    return ", ".join(
        f"{label} {value:.{digits}f}"
        for label, value in zip(labels, values, strict=True)
    )


# ---- heat map


def heat_figure(
    rows: Sequence[str],
    columns: Sequence[tuple[str, str]],
    values: Sequence[Sequence[int]],
    title: str,
) -> Figure:
    """Counts by row and (side, layer): a cell is the darker the larger, in its side's
    colour, with the number in it.
    """
    label_room = min(
        120.0, max((width_of(row, TEXT) for row in rows), default=0) + 12
    )
    sides = list(dict.fromkeys(side for side, _ in columns))
    colours = dict(zip(sides, (A, B), strict=False))
    cell = min(90.0, max(44.0, (CHART_WIDTH - label_room) / max(len(columns), 1)))
    width = max(CHART_WIDTH, label_room + cell * len(columns))
    top = 20 * len(sides) + 34
    largest = max((value for row in values for value in row), default=0) or 1
    figure, axes = _page(top + 24 * len(rows) + 4, title, width)
    _key(axes, [(colours[side], side) for side in sides], 0)
    for place, (_, layer) in enumerate(columns):
        middle = label_room + cell * (place + 0.5)
        _text(axes, middle, top - 8, shortened(layer, cell - 4, TEXT), "center")
    for y, (row, counts) in enumerate(zip(rows, values, strict=True)):
        height = top + 24 * y
        name = shortened(row, label_room - 8, TEXT)
        _text(axes, label_room - 8, height + 16, name, "right")
        for x, (count, (side, _)) in enumerate(zip(counts, columns, strict=True)):
            corner = (label_room + cell * x, height)
            _cell(axes, corner, cell, count, count / largest, colours[side])
    return figure


def _cell(
    axes: Axes,
    corner: tuple[float, float],
    width: float,
    count: int,
    share: float,
    colour: str,
) -> None:
    x, y = corner
    box = FancyBboxPatch(
        (x + 4, y + 4),
        width - 8,
        16,
        boxstyle="round,pad=3",
        facecolor=colour,
        alpha=0.06 if not count else 0.15 + 0.6 * share,
        linewidth=0,
    )
    axes.add_patch(box)
    _text(axes, x + width / 2, y + 16, str(count) if count else "·", "center")


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
    words: Sequence[tuple[str, float]], room: tuple[float, float] = (CHART_WIDTH, 420)
) -> list[Placed]:
    """Words (text, weight) placed without overlap, the heaviest in the middle, areas as
    the weights; what finds no room is left out. Nothing is drawn at random: the same
    words lie the same way.
    """
    placed: list[Placed] = []
    heaviest = max((weight for _, weight in words), default=1)
    for word, weight in sorted(words, key=lambda item: -item[1]):
        size = max(11.0, 34 * math.sqrt(weight / heaviest))
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


def cloud_figure(
    name: str,
    words: Sequence[tuple[str, float]],
    colour: str,
    room: tuple[float, float] = (CHART_WIDTH, 420),
) -> Figure:
    """Words sized by weight; how many found no room is said below."""
    placed = laid_out(words, room)
    top = min((spot.y for spot in placed), default=0.0)
    bottom = max((spot.y + spot.height for spot in placed), default=0.0) - top
    left = len(words) - len(placed)
    alt = f"concepts of {name}, the larger the more units"
    figure, axes = _page(max(bottom + (22 if left else 0), 1), alt, room[0])
    for spot in (replace(one, y=one.y - top) for one in placed):
        at = (spot.x + 3, spot.y + 0.82 * spot.height)
        said = shortened(spot.word, math.inf, TEXT)
        _text(axes, *at, said, size=spot.size, colour=colour)
    if left:
        _text(axes, 0, bottom + 16, f"{left} more found no room")
    return figure
