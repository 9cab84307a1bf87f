"""Plots of an evaluation as SVG, drawn here: forest plot, critical-difference plot,
curves with bands.

Text and axes are in the ink of the page; methods have colours, controls are grey and
dashed. Plots have their numbers as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from consilience.show.drawings import DRAWING_WIDTH, _svg, _text, shortened, width_of

PALETTE = ("#2f80c2", "#d9640c", "#1a936f", "#b5489b", "#b58900", "#6a5acd")
GREY = "#8a939d"


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


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``wanted`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [
        round(number * step, 12)
        for number in range(first, math.floor(high / step + 1e-9) + 1)
    ]


def _axis(
    x0: float, x1: float, y: float, low: float, high: float, top: float
) -> list[str]:
    parts = [
        f'<line x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}" stroke="currentColor" '
        f'stroke-opacity=".5"/>'
    ]
    for value in ticks(low, high):
        x = x0 + (x1 - x0) * (value - low) / (high - low or 1)
        grid = f'x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {grid} stroke="currentColor" stroke-opacity=".13"/>')
        parts.append(_text(x, y + 17, f"{value:g}".replace("-", "−"), "middle"))
    return parts


def plot_forest(bars: Sequence[Bar], title: str) -> Markup:
    """Means with their 95 % intervals, a row each; controls are grey, with open marks."""
    known = [bar for bar in bars if math.isfinite(bar.mean)]
    if not known:
        return Markup("")
    ends = [
        end
        for bar in known
        for end in (bar.mean, bar.low, bar.high)
        if math.isfinite(end)
    ]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 0.5
    low, high = low - pad, high + pad
    room = min(230.0, max(width_of(bar.label) for bar in known) + 12)
    parts = _axis(room, DRAWING_WIDTH - 10, 24 * len(known) + 6, low, high, 0)
    for row, bar in enumerate(known):
        parts += _interval(bar, 24 * row + 13, room, low, high)
    said = "; ".join(f"{bar.label} {bar.mean:.3f}" for bar in known)
    return _svg(DRAWING_WIDTH, 24 * len(known) + 30, parts, f"{title}. {said}")


def _interval(bar: Bar, y: float, room: float, low: float, high: float) -> list[str]:
    def at(value: float) -> float:
        return room + (DRAWING_WIDTH - 10 - room) * (value - low) / (high - low)

    parts = [_text(room - 8, y + 4, shortened(bar.label, room - 8), "end")]
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        ends = (
            f'x1="{at(bar.low):.1f}" y1="{y:.1f}" x2="{at(bar.high):.1f}" y2="{y:.1f}"'
        )
        parts.append(
            f'<line {ends} stroke="{bar.colour}" stroke-width="3" stroke-opacity=".65"/>'
        )
    fill = "none" if bar.control else bar.colour
    mark = f'cx="{at(bar.mean):.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{bar.colour}" stroke-width="2"'
    return [*parts, f"<circle {mark}/>"]


def plot_critical_difference(
    labels: Sequence[str],
    ranks: Sequence[float],
    difference: float,
    groups: Sequence[Sequence[int]],
) -> Markup:
    """Mean ranks on a line, 1 (best) on the left; bars join what cannot be told apart
    (Demsar 2006, figure 1).
    """
    order = sorted(range(len(labels)), key=lambda i: ranks[i])
    count, left, right = len(labels), 190.0, DRAWING_WIDTH - 190.0

    def at(rank: float) -> float:
        return left + (right - left) * (rank - 1) / max(count - 1, 1)

    parts = _bracket(left, at(min(1 + difference, count)) - left, difference)
    line = 46.0
    parts.append(
        f'<line x1="{left:.1f}" y1="{line}" x2="{right:.1f}" y2="{line}" '
        f'stroke="currentColor"/>'
    )
    for rank in range(1, count + 1):
        tick = f'x1="{at(rank):.1f}" y1="{line - 5}" x2="{at(rank):.1f}" y2="{line}"'
        parts += [
            f'<line {tick} stroke="currentColor"/>',
            _text(at(rank), line - 9, str(rank), "middle"),
        ]
    below = line + 10 + 9 * len(groups)
    for row, group in enumerate(groups):
        ends = [at(ranks[i]) for i in group]
        height = line + 9 + 9 * row
        bar = f'x1="{min(ends) - 3:.1f}" y1="{height}" x2="{max(ends) + 3:.1f}" y2="{height}"'
        parts.append(f'<line {bar} stroke="{PALETTE[0]}" stroke-width="4"/>')
    half = (count + 1) // 2
    for place, i in enumerate(order):
        on_left = place < half
        y = below + 20 * (place if on_left else count - 1 - place) + 14
        parts += _ranked(
            at(ranks[i]),
            line,
            y,
            left if on_left else right,
            f"{labels[i]} {ranks[i]:.2f}",
            on_left,
        )
    said = ", ".join(f"{labels[i]} {ranks[i]:.2f}" for i in order)
    return _svg(
        DRAWING_WIDTH,
        below + 20 * half + 16,
        parts,
        f"Mean ranks: {said}; critical difference {difference:.2f}",
    )


def _bracket(x: float, width: float, difference: float) -> list[str]:
    path = f"M{x:.1f} 6v8M{x:.1f} 10h{width:.1f}M{x + width:.1f} 6v8"
    words = _text(x + width + 8, 14, f"critical difference {difference:.2f}")
    return [f'<path d="{path}" stroke="currentColor" fill="none"/>', words]


def _ranked(
    x: float, line: float, y: float, edge: float, words: str, on_left: bool
) -> list[str]:
    path = f"M{x:.1f} {line}V{y - 4:.1f}H{edge:.1f}"
    anchor, place = ("end", edge - 6) if on_left else ("start", edge + 6)
    text = _text(place, y, shortened(words, 180), anchor)
    return [
        f'<path d="{path}" stroke="currentColor" stroke-opacity=".45" fill="none"/>',
        text,
    ]


def plot_curves(lines: Sequence[CurveLine], title: str, height: float = 240) -> Markup:
    """Mean curves with their 95 % bands; controls are thin and dashed, without bands."""
    left, right = 44.0, DRAWING_WIDTH - 10.0
    bounds = [value for line in lines for value in _reach(line)]
    low, high = min(bounds), max(bounds)
    first, last = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)

    def point(x: float, y: float) -> str:
        across = left + (right - left) * (x - first) / (last - first or 1)
        return (
            f"{across:.1f},{height - (height - 8) * (y - low) / (high - low or 1):.1f}"
        )

    parts = _axis(left, right, height, first, last, 8)
    for value in ticks(low, high):
        y = height - (height - 8) * (value - low) / (high - low or 1)
        parts.append(
            f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity=".13"/>'
        )
        parts.append(_text(left - 6, y + 4, f"{value:g}".replace("-", "−"), "end"))
    for line in sorted(lines, key=lambda one: not one.control):
        parts += _curve(line, point)
    parts += _legend(lines, height + 32)
    return _svg(
        DRAWING_WIDTH, height + 36 + 20 * math.ceil(len(lines) / 2), parts, title
    )


def _reach(line: CurveLine) -> list[float]:
    halves = [0.0 if half is None or line.control else half for half in line.half]
    return [
        m + sign * h for m, h in zip(line.mean, halves, strict=True) for sign in (-1, 1)
    ]


def _curve(line: CurveLine, point: object) -> list[str]:
    at = point
    assert callable(at)
    parts = []
    if not line.control and all(half is not None for half in line.half):
        pairs = list(zip(line.x, line.mean, line.half, strict=True))
        over = [at(x, m + (h or 0)) for x, m, h in pairs]
        under = [at(x, m - (h or 0)) for x, m, h in reversed(pairs)]
        parts.append(
            f'<polygon points="{" ".join([*over, *under])}" fill="{line.colour}" '
            f'fill-opacity=".16"/>'
        )
    points = " ".join(at(x, m) for x, m in zip(line.x, line.mean, strict=True))
    style = (
        'stroke-width="1.3" stroke-dasharray="4 3"'
        if line.control
        else 'stroke-width="2.4"'
    )
    return [
        *parts,
        f'<polyline points="{points}" fill="none" stroke="{line.colour}" {style}/>',
    ]


def _legend(lines: Sequence[CurveLine], y: float) -> list[str]:
    parts = []
    for number, line in enumerate(lines):
        x, top = (DRAWING_WIDTH / 2) * (number % 2), y + 20 * (number // 2)
        style = (
            'stroke-width="1.3" stroke-dasharray="4 3"'
            if line.control
            else 'stroke-width="3"'
        )
        parts.append(
            f'<line x1="{x}" y1="{top}" x2="{x + 24}" y2="{top}" stroke="{line.colour}" '
            f"{style}/>"
        )
        parts.append(
            _text(x + 30, top + 4, shortened(line.label, DRAWING_WIDTH / 2 - 40))
        )
    return parts
