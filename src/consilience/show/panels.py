"""Colours, overlays, panels and plots: the only module that rescales values, and only
for the eye.

Numbers are never read from anything made here. Signed maps are drawn with a diverging
map (Moreland's cool-warm: both arms have the same lightness, zero is a neutral grey,
and it survives red-green blindness), others with inferno, whose lightness rises evenly;
neither invents edges, as jet does. A map without contrast is drawn flat and said to be
flat.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries

from consilience import images
from consilience.perturb.surrogate import settled
from consilience.show import words
from consilience.types import Array, ConsilienceError

RGB = tuple[int, int, int]

PERCENTILE = 99.5
"""Limits ignore the outermost half per cent, so that one hot pixel does not turn the
rest dark.
"""

FLAT_RANGE = 1e-5
"""A map whose spread is below this share of its largest value is flat: what is left is
rounding of float32.
"""

DIVERGING, SEQUENTIAL = "coolwarm", "inferno"
_SHADES = 511  # odd, so that zero has a shade of its own
NEUTRAL: RGB = (221, 221, 221)
"""The colour of zero in a signed map, of a flat map, and of what is no number."""

ONLY_A: RGB = (0, 114, 178)
ONLY_B: RGB = (230, 159, 0)
SHARED: RGB = (255, 255, 255)
"""Two of Okabe and Ito's colours and white: three lightnesses, apart for every kind of
colour vision.
"""

CONTOUR: RGB = (255, 255, 255)
NONE = np.empty(0, dtype=np.int64)
_LUMA = np.array([0.299, 0.587, 0.114])


# ---- from values to colours


@dataclass(frozen=True)
class Scale:
    """The limits a map is drawn between; symmetric round zero where it is signed.

    Flat where nothing lies between.
    """

    low: float
    high: float
    signed: bool
    flat: bool = False

    @property
    def words(self) -> tuple[str, str]:
        """Both limits as they are written under a colour bar."""
        return _number(self.low), _number(self.high)

    def share(self, values: Array) -> Array:
        """Values as shares of the scale in [0, 1] (signed: zero at one half); NaN stays
        NaN.
        """
        if self.flat:
            return np.where(np.isfinite(values), 0.5, np.nan)
        return np.clip(
            (values.astype(np.float64) - self.low) / (self.high - self.low), 0.0, 1.0
        )

    def strength(self, values: Array) -> Array:
        """How loud a value is, in [0, 1]: its distance from zero in a signed map, from
        the lower limit in another.
        """
        if self.flat:
            return np.zeros(values.shape)
        share = self.share(values)
        return np.nan_to_num(np.abs(2 * share - 1) if self.signed else share)


def limits(values: Array, signed: bool | None = None) -> Scale:
    """Robust limits of a map (any shape): the 99.5th percentile of |values| both ways
    round zero where it is ``signed`` (None: where it has negative values beyond
    rounding), else the .5th and 99.5th percentile. Not finite is left out.
    """
    known = values[np.isfinite(values)].astype(np.float64)
    if known.size == 0:
        return Scale(0.0, 0.0, bool(signed), flat=True)
    loud = float(np.percentile(np.abs(known), PERCENTILE)) or float(np.abs(known).max())
    if signed is None:
        signed = bool(known.min() < -FLAT_RANGE * loud)
    if signed:
        return Scale(-loud, loud, True, flat=bool(np.ptp(known) <= FLAT_RANGE * loud))
    low, high = (
        float(edge) for edge in np.percentile(known, [100 - PERCENTILE, PERCENTILE])
    )
    if high - low <= FLAT_RANGE * loud:
        low, high = float(known.min()), float(known.max())
    return Scale(low, high, False, flat=high - low <= FLAT_RANGE * loud)


@cache
def _shades(signed: bool) -> Array:
    table = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL].resampled(_SHADES)
    return np.round(table(np.arange(_SHADES))[:, :3] * 255).astype(np.uint8)


def colour_stops(signed: bool, count: int = 9) -> tuple[str, ...]:
    """``count`` colours of a scale from its low to its high end as #rrggbb, for a
    legend.
    """
    picked = _shades(signed)[np.linspace(0, _SHADES - 1, count).round().astype(int)]
    return tuple(_hex(tuple(int(channel) for channel in colour)) for colour in picked)


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def map_colours(
    values: Array, signed: bool | None = None, scale: Scale | None = None
) -> Array:
    """A map (h, w) as colours (h, w, 3) uint8.

    Zero of a signed map, a flat map and what is not finite are `NEUTRAL`.
    """
    scale = scale or limits(values, signed)
    if scale.flat:
        return np.broadcast_to(np.array(NEUTRAL, np.uint8), (*values.shape, 3)).copy()
    share = scale.share(values)
    known = np.isfinite(share)
    index = np.round(np.where(known, share, 0) * (_SHADES - 1)).astype(int)
    painted: Array = _shades(scale.signed)[index]
    painted[~known] = NEUTRAL
    return painted


# ---- on the image


def overlay(
    image: Array, values: Array, alpha: float = 0.75, scale: Scale | None = None
) -> Array:
    """A map (h, w) over its image (h, w, 3) uint8, the more opaque (up to ``alpha``)
    the louder the value.

    Where the map says nothing the image is left as it is; a flat map leaves all of it.
    """
    _same_frame(image, values)
    scale = scale or limits(values)
    opacity = alpha * scale.strength(values)
    return _blend(image, map_colours(values, scale=scale), opacity[..., None])


def superpixels(
    image: Array,
    segments: Array,
    weights: Array,
    alpha: float = 0.65,
    sure: Array = NONE,
    unsure: Array = NONE,
) -> Array:
    """Signed ``weights`` (S,) of superpixels ``segments`` (h, w) int 0..S-1 over the
    image, with the borders drawn.

    Those in ``sure`` (indices) have a thick border, white on black; those in ``unsure``
    are hatched.
    """
    _same_frame(image, segments)
    if segments.min() < 0 or segments.max() >= len(weights):
        raise ConsilienceError(
            f"segments run from {segments.min()} to {segments.max()}; there are "
            f"{len(weights)} weights"
        )
    painted = overlay(
        image, weights[segments], alpha, limits(weights[segments], signed=True)
    )
    lines = find_boundaries(segments, mode="inner", background=-1)
    painted = _blend(painted, np.array(CONTOUR), 0.55 * lines[..., None])
    painted[np.isin(segments, unsure) & _hatch(segments.shape)] = CONTOUR
    return _outlined(painted, segments, sure)


def _hatch(shape: tuple[int, ...]) -> Array:
    """Thin diagonals, a ninth of the pixels of a frame of usual size: what is under
    them stays to be seen.
    """
    step = max(4, round(min(shape) / 25))
    y, x = np.indices(shape)
    hatch: Array = (x + y) % step == 0
    return hatch


def _outlined(painted: Array, segments: Array, sure: Array) -> Array:
    """A thick border just inside each of the superpixels ``sure``, so that it shows on
    any colour: white, lined with black.
    """
    width = max(2, round(min(segments.shape) / 110))
    for number in sure:
        depth = distance_transform_edt(np.pad(segments == number, 1))[1:-1, 1:-1]
        painted[(depth > 0) & (depth <= width + 1)] = (0, 0, 0)
        painted[(depth > 0) & (depth <= width)] = CONTOUR
    return painted


def mask(image: Array, on: Array) -> Array:
    """What a mask (h, w) bool keeps of the image: inside untouched, outside grey and
    dim, a contour just outside.
    """
    _same_frame(image, on)
    shown = np.where(on[..., None], image, _muted(image))
    shown[find_boundaries(on, mode="outer", background=0) & ~on] = CONTOUR
    return shown.astype(np.uint8)


def both(image: Array, a: Array, b: Array, alpha: float = 0.62) -> Array:
    """Two masks (h, w) bool over the image: `ONLY_A`, `ONLY_B` and `SHARED` where both
    are, the rest grey and dim.
    """
    _same_frame(image, a)
    _same_frame(image, b)
    shown = _muted(image)
    grey = np.repeat(_grey(image)[..., None], 3, axis=2)
    for part, colour in ((a & ~b, ONLY_A), (b & ~a, ONLY_B), (a & b, SHARED)):
        tinted = _blend(grey, np.array(colour), alpha)
        shown[part] = tinted[part]
    return shown


def _same_frame(image: Array, values: Array) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConsilienceError(
            f"an image to draw on is (h, w, 3) uint8; got {image.dtype} {image.shape}"
        )
    if image.shape[:2] != values.shape:
        raise ConsilienceError(
            f"the image's frame is {image.shape[:2]}; the map or mask is {values.shape}"
        )


def _blend(below: Array, above: Array, opacity: Array | float) -> Array:
    mixed = below * (1.0 - opacity) + above * opacity
    return np.round(mixed).astype(np.uint8)


def _grey(image: Array) -> Array:
    grey: Array = np.round(image @ _LUMA)
    return grey


def _muted(image: Array) -> Array:
    """The image without its colours and at a third of its light: there, but not what is
    looked at.
    """
    return np.repeat(np.round(0.38 * _grey(image))[..., None], 3, axis=2).astype(
        np.uint8
    )


# ---- the images of one sample


class DrawnExplanation(Protocol):
    """What is needed of an explanation to draw it; a run's items have it."""

    @property
    def column(self) -> str:
        """Its short label."""

    @property
    def values(self) -> Array:
        """Raw map (h, w)."""

    @property
    def mask(self) -> Array | None:
        """(h, w) bool, where one was cut."""

    @property
    def extras(self) -> Mapping[str, Array]:
        """LIME: segments and weights."""


class ShownSample(Protocol):
    """What is needed of a sample: its name, its image as the model saw it, its
    explanations.
    """

    @property
    def name(self) -> str:
        """For the heading."""

    @property
    def image(self) -> Array:
        """(h, w, 3) uint8."""

    @property
    def items(self) -> Sequence[DrawnExplanation]:
        """In the order of the columns."""


@dataclass(frozen=True, eq=False)
class Tile:
    """An image with its words: ``image`` (h, w, 3) uint8, a title, lines under it, a
    scale or a key to its colours.

    ``pair`` names the two columns whose masks it holds against each other, where it
    does.
    """

    image: Array
    title: str
    alt: str
    lines: tuple[str, ...] = ()
    scale: Scale | None = None
    key: tuple[tuple[str, str], ...] = ()
    pair: tuple[str, str] | None = None


def tiles(
    shown: ShownSample, pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[Tile, ...]:
    """The images of one sample: itself, every map, every mask, and the ``pairs`` of
    masks held against each other.

    ``pairs`` are of column labels; None means the first three pairs there are.
    """
    items = {item.column: item for item in shown.items}
    if pairs is None:
        pairs = list(combinations(items, 2))[:3]
    masked = [item for item in shown.items if item.mask is not None]
    wanted = [(items[a], items[b]) for a, b in pairs if a in items and b in items]
    drawn = [
        (a, b)
        for a, b in wanted
        if a.mask is not None and b.mask is not None and a.mask.shape == b.mask.shape
    ]
    return (
        Tile(shown.image, "image", f"{shown.name}, as the model saw it"),
        *(
            _with_doubt(map_tile(shown.image, item), item, shown.items[0])
            for item in shown.items
        ),
        *(mask_tile(shown.image, item) for item in masked),
        *(pair_tile(shown.image, a, b) for a, b in drawn),
    )


def _with_doubt(tile: Tile, item: DrawnExplanation, first: DrawnExplanation) -> Tile:
    """The image kept is the first column's view of it; a map that lies on another view
    is drawn on it and says so.
    """
    places = [getattr(one, "geometry", None) for one in (item, first)]
    return (
        tile
        if places[0] == places[1]
        else replace(tile, lines=(*tile.lines, "made from another view of the image"))
    )


def map_tile(base_image: Array, item: DrawnExplanation) -> Tile:
    """A map over its image; superpixels with their borders where the explanation has
    them.
    """
    base_image = _in_frame(base_image, item.values)
    segments, weights = item.extras.get("segments"), item.extras.get("weights")
    if segments is not None and weights is not None:
        sure, top = settled(item.extras.get("p_top", np.full(1, np.nan)))
        image = superpixels(
            base_image, segments, weights, sure=sure, unsure=np.setdiff1d(top, sure)
        )
        painted = limits(weights[segments], signed=True)
        what = f"weights of {len(weights)} superpixels"
    else:
        image, painted = overlay(base_image, item.values), limits(item.values)
        what = "values"
    if painted.flat:
        value = item.values.flat[0]
        return Tile(
            image,
            item.column,
            f"{item.column}: a flat map",
            (f"flat: every value is {value:.3g}",),
        )
    return Tile(
        image,
        item.column,
        f"{item.column}: {what} over the image",
        _certainty(item),
        scale=painted,
    )


def _certainty(item: DrawnExplanation) -> tuple[str, ...]:
    """How sure an explainer is of its top superpixels, and what marks them; nothing
    where it does not say.
    """
    verdict = getattr(item, "provenance", {}).get("verdict")
    lines = [words.stability_sentence(verdict)] if verdict else []
    sure, top = settled(item.extras.get("p_top", np.full(1, np.nan)))
    if len(top):
        lines.append(
            f"thick border: surely among the top {len(top)} ({len(sure)} of them)"
        )
    if len(top) > len(sure):
        lines.append(f"hatched: may not be among them ({len(top) - len(sure)})")
    return tuple(lines)


def mask_tile(base_image: Array, item: DrawnExplanation) -> Tile:
    """What the mask of an explanation keeps of the image, and how much that is."""
    assert item.mask is not None
    area = f"{100 * item.mask.mean():.3g} % of the frame"
    image = mask(_in_frame(base_image, item.mask), item.mask)
    return Tile(image, f"{item.column} mask", f"mask of {item.column}: {area}", (area,))


def pair_tile(base_image: Array, a: DrawnExplanation, b: DrawnExplanation) -> Tile:
    """Two masks over each other, with their IoU."""
    assert a.mask is not None
    assert b.mask is not None
    union = int((a.mask | b.mask).sum())
    shared = int((a.mask & b.mask).sum())
    line = f"IoU {shared / union:.3f}" if union else "IoU –: both masks are empty"
    key = (
        (_hex(ONLY_A), f"{a.column} only"),
        (_hex(ONLY_B), f"{b.column} only"),
        (_hex(SHARED), "both"),
    )
    image = both(_in_frame(base_image, a.mask), a.mask, b.mask)
    alt = f"masks of {a.column} and {b.column} over each other: {line}"
    return Tile(
        image,
        f"{a.column} & {b.column}",
        alt,
        (line,),
        key=key,
        pair=(a.column, b.column),
    )


def _in_frame(image: Array, values: Array) -> Array:
    """The image in a map's frame: columns of different models may have frames of
    different sizes.
    """
    height, width = values.shape
    return (
        image
        if image.shape[:2] == (height, width)
        else images.resize(image, (height, width))
    )


# ---- a panel of one sample

_INK, _SOFT, _PAPER = (27, 31, 36), (87, 96, 106), (255, 255, 255)
_MARGIN, _GAP, _BAR = 16, 14, 9


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: no font of the system is needed."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size
    )


def panel(
    shown: ShownSample,
    pairs: Sequence[tuple[str, str]] | None = None,
    heading: str | None = None,
) -> bytes:
    """PNG of one sample in one row: image, maps, masks, masks over each other, each
    with its words.
    """
    return row(tiles(shown, pairs), shown.name if heading is None else heading)


def row(parts: Sequence[Tile], heading: str = "", height: int = 300) -> bytes:
    """PNG of tiles in one row, all ``height`` pixels high whatever their frames, with
    titles, lines and keys.
    """
    if not parts:
        raise ConsilienceError("a panel needs at least one tile")
    images = [_to_height(part.image, height) for part in parts]
    widths = [image.shape[1] for image in images]
    canvas_width = 2 * _MARGIN + sum(widths) + _GAP * (len(parts) - 1)
    head = _wrap(heading, _font(20, bold=True), canvas_width - 2 * _MARGIN)
    titles = [
        _wrap(part.title, _font(16, bold=True), width)
        for part, width in zip(parts, widths, strict=True)
    ]
    top = _MARGIN + 28 * len(head) + (6 if head else 0)
    image_top = top + 22 * max(map(len, titles)) + 4
    feet = [
        _foot_height(part, width) for part, width in zip(parts, widths, strict=True)
    ]
    canvas = Image.new(
        "RGB", (canvas_width, image_top + height + max(feet) + _MARGIN), _PAPER
    )
    pen = ImageDraw.Draw(canvas)
    _write(pen, head, (_MARGIN, _MARGIN), _font(20, bold=True), 28, _INK)
    left = _MARGIN
    for part, image, title, width in zip(parts, images, titles, widths, strict=True):
        _write(
            pen,
            title,
            (left, image_top - 4 - 22 * len(title)),
            _font(16, bold=True),
            22,
            _INK,
        )
        canvas.paste(Image.fromarray(image), (left, image_top))
        _draw_foot(canvas, pen, part, (left, image_top + height + 6), width)
        left += width + _GAP
    return _png(canvas)


def _to_height(image: Array, height: int) -> Array:
    width = max(48, round(image.shape[1] * height / image.shape[0]))
    return (
        image
        if image.shape[:2] == (height, width)
        else images.resize(image, (height, width), "lanczos")
    )


def _foot_height(part: Tile, width: int) -> int:
    lines = sum(len(_wrap(line, _font(15), width)) for line in part.lines)
    keys = sum(len(_wrap(name, _font(15), width - 22)) for _, name in part.key)
    return 8 + (_BAR + 26 if part.scale else 0) + 20 * (lines + keys)


def _draw_foot(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    part: Tile,
    at: tuple[int, int],
    width: int,
) -> None:
    left, top = at
    if part.scale is not None:
        top = _draw_scale(canvas, pen, part.scale, at, width)
    for line in part.lines:
        top = _write(
            pen, _wrap(line, _font(15), width), (left, top), _font(15), 20, _INK
        )
    for colour, name in part.key:
        pen.rectangle((left, top + 3, left + 14, top + 16), fill=colour, outline=_SOFT)
        top = _write(
            pen,
            _wrap(name, _font(15), width - 22),
            (left + 22, top),
            _font(15),
            20,
            _INK,
        )


def _draw_scale(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    scale: Scale,
    at: tuple[int, int],
    width: int,
) -> int:
    left, top = at
    ramp = _shades(scale.signed)[np.linspace(0, _SHADES - 1, width).round().astype(int)]
    canvas.paste(Image.fromarray(np.repeat(ramp[None], _BAR, axis=0)), at)
    top += _BAR + 2
    font = _font(14)
    low, high = scale.words
    pen.text((left, top), low, font=font, fill=_SOFT)
    pen.text((left + width - font.getlength(high), top), high, font=font, fill=_SOFT)
    if scale.signed:
        pen.text(
            (left + (width - font.getlength("0")) / 2, top), "0", font=font, fill=_SOFT
        )
    return top + 24


def _number(value: float) -> str:
    return f"{value:.2g}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    step: int,
    colour: RGB,
) -> int:
    left, top = at
    for line in lines:
        pen.text((left, top), line, font=font, fill=colour)
        top += step
    return top


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit; a word that is too long alone is broken."""
    lines: list[str] = []
    for word in visible(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        pieces = _pieces(word, font, width)
        lines += pieces
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def visible(text: str) -> str:
    """The text with what cannot be printed (line breaks, control characters) replaced;
    names of files may hold anything.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\xa0" else "\ufffd"
        for letter in text
    )


def _png(canvas: Image.Image) -> bytes:
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


# ---- the plot of agreement

_CURRENT = "#010203"  # stands for the colour of the text round the plot, so that it follows a light or dark page
ABOVE, BELOW = "#2f80c2", "#d9640c"
_NAMED = 40
"""Up to so many images the plot names each; beyond, it is a curve of thin rows."""


def agreement_plot(
    agreement: pd.DataFrame, summary: pd.DataFrame, pair: tuple[str, str] | None = None
) -> str:
    """`agreement_figure` as SVG; the ink is ``currentColor``."""
    return _svg(agreement_figure(agreement, summary, pair))


def agreement_figure(
    agreement: pd.DataFrame, summary: pd.DataFrame, pair: tuple[str, str] | None = None
) -> Figure:
    """One pair: IoU of every image (sorted) against the chance level of its masks, and
    the mean with its interval.

    ``agreement`` and ``summary`` are a run's tables; ``pair`` is of column labels, None
    the first. Published values are a third mark where ``agreement`` has
    ``published_iou``. Raises `ConsilienceError` where the tables do not have the pair.
    """
    if pair is None:
        if summary.empty:
            raise ConsilienceError("there is no pair of explainers to plot")
        pair = (str(summary["a"].iloc[0]), str(summary["b"].iloc[0]))
    rows = _of_pair(agreement, pair)
    means = _of_pair(summary, pair)
    if rows.empty or means.empty:
        raise ConsilienceError(f"the tables have no pair {pair[0]!r}, {pair[1]!r}")
    numbers = [
        "iou",
        "expected_iou",
        *(["published_iou"] if "published_iou" in rows else []),
    ]
    rows = rows.assign(
        **{name: pd.to_numeric(rows[name], errors="coerce") for name in numbers}
    )
    known = (
        rows[rows["iou"].notna()]
        .sort_values("iou", kind="stable")
        .dropna(axis="columns", how="all")
    )
    return _figure(known, means.iloc[0].to_dict(), left_out=len(rows) - len(known))


def _of_pair(table: pd.DataFrame, pair: tuple[str, str]) -> pd.DataFrame:
    if table.empty:
        return table
    return table[(table["a"] == pair[0]) & (table["b"] == pair[1])]


def _figure(rows: pd.DataFrame, mean: Mapping[Any, Any], left_out: int) -> Figure:
    named = len(rows) <= _NAMED
    step = 0.235 if named else 6.0 / len(rows)
    figure = Figure(
        figsize=(4.6, 1.55 + step * len(rows) + (0.2 if left_out else 0)),
        layout="constrained",
    )
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    heights = np.arange(len(rows)) + _first_row(len(rows))
    _draw_images(axes, rows, heights, named)
    _draw_mean(axes, mean)
    _label_rows(axes, rows, heights, named)
    _dress(axes, rows, mean, float(heights[-1]) if len(rows) else 0.0, left_out)
    return figure


def _first_row(count: int) -> float:
    """How far the images stand above the mean, which is at 0, in rows."""
    return 1.6 if count <= _NAMED else 0.08 * count


def _draw_images(axes: Axes, rows: pd.DataFrame, heights: Array, named: bool) -> None:
    iou, chance = rows["iou"].to_numpy(float), rows["expected_iou"].to_numpy(float)
    below = iou < chance
    size = 34 if named else 7
    for part, colour, side in ((~below, ABOVE, "above"), (below, BELOW, "below")):
        if part.any():
            axes.hlines(
                heights[part],
                chance[part],
                iou[part],
                colors=colour,
                linewidths=2.2 if named else 0.6,
                alpha=0.45,
            )
            axes.scatter(
                iou[part],
                heights[part],
                s=size,
                color=colour,
                label=f"IoU, {side} chance",
                zorder=3,
                linewidths=0,
                gid=f"iou-{side}",
            )
    axes.scatter(
        chance,
        heights,
        s=70 if named else 12,
        marker="|",
        color=_CURRENT,
        label="chance",
        zorder=2,
        linewidths=1.4,
        gid="chance",
    )
    if "published_iou" in rows:
        axes.scatter(
            rows["published_iou"].to_numpy(float),
            heights,
            s=30,
            marker="D",
            facecolors="none",
            edgecolors=_CURRENT,
            linewidths=1.1,
            label="as published",
            zorder=4,
            gid="published",
        )


def _draw_mean(axes: Axes, mean: Mapping[Any, Any]) -> None:
    centre, low, high, chance = (
        _float(mean.get(name))
        for name in ("iou_mean", "iou_low", "iou_high", "expected_mean")
    )
    if np.isfinite([low, high]).all():
        axes.plot(
            [low, high], [0, 0], color=_CURRENT, linewidth=1.6, solid_capstyle="butt"
        )
        axes.scatter(
            [low, high], [0, 0], s=40, marker="|", color=_CURRENT, linewidths=1.6
        )
    axes.scatter(
        [centre], [0], s=52, color=_CURRENT, zorder=3, linewidths=0, gid="mean"
    )
    axes.scatter(
        [chance], [0], s=150, marker="|", color=_CURRENT, linewidths=1.4, zorder=2
    )


def _label_rows(axes: Axes, rows: pd.DataFrame, heights: Array, named: bool) -> None:
    interval = "mean, 95 %" if len(rows) > 1 else "mean"
    if named:
        labels = [interval, *(_short(str(name)) for name in rows["sample"])]
        axes.set_yticks([0, *heights])
    else:
        labels = [interval, f"{len(rows)} images"]
        axes.set_yticks([0, float(heights.mean())])
    axes.set_yticklabels(labels, parse_math=False, fontsize=9.5)
    axes.get_yticklabels()[0].set_fontweight("bold")


def _dress(
    axes: Axes, rows: pd.DataFrame, mean: Mapping[Any, Any], top: float, left_out: int
) -> None:
    shown = [
        rows[name].to_numpy(float)
        for name in ("iou", "expected_iou", "published_iou")
        if name in rows
    ]
    ends = [
        _float(mean.get(name)) for name in ("iou_high", "iou_mean", "expected_mean")
    ]
    largest = np.nanmax(
        [0.1, *np.concatenate(shown), *(end for end in ends if np.isfinite(end))]
    )
    axes.set_xlim(-0.01, min(1.02, largest * 1.06))
    first = _first_row(len(rows))
    axes.set_ylim(-0.55 * first, top + max(0.6, 0.01 * top))
    span = blended_transform_factory(axes.transAxes, axes.transData)
    axes.plot(
        [0, 1],
        [first / 2, first / 2],
        transform=span,
        color=_CURRENT,
        linewidth=0.6,
        alpha=0.35,
    )
    note = f"\n{left_out} without a number left out" if left_out else ""
    axes.set_xlabel(f"intersection over union{note}", fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9.5)
    axes.grid(axis="x", color=_CURRENT, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.figure.legend(
        loc="outside upper left",
        ncols=2,
        fontsize=9.5,
        frameon=False,
        handletextpad=0.3,
        columnspacing=1.4,
    )
    _recolour(axes)


def _recolour(axes: Axes) -> None:
    """Text and spines in the ink of the page; set on the objects, so that no global
    setting is touched.
    """
    axes.set_facecolor("none")
    axes.tick_params(colors=_CURRENT)
    axes.spines["bottom"].set_color(_CURRENT)
    axes.xaxis.label.set_color(_CURRENT)
    legend = axes.figure.legends[0]
    for text in [
        *axes.get_xticklabels(),
        *axes.get_yticklabels(),
        *legend.get_texts(),
        axes.xaxis.label,
    ]:
        text.set_color(_CURRENT)
        text.set_fontfamily("DejaVu Sans")


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _short(name: str, longest: int = 26) -> str:
    """A name that fits; the middle goes, since files often share their beginning and
    differ at the end.
    """
    name = visible(name)
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[-(longest - longest // 2 - 1) :]}"


def _svg(figure: Figure) -> str:
    """The figure as SVG that is the same for the same figure: no date, no random ids,
    no metadata.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    text = buffer.getvalue().replace(_CURRENT, "currentColor")
    return _stable_ids(text[text.index("<svg") :])


def _stable_ids(text: str) -> str:
    """Matplotlib salts its ids at random; number them instead, under a prefix that
    keeps two plots on a page apart.
    """
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', text))
    numbered = {name: f"n{number}" for number, name in enumerate(names)}
    pattern = re.compile(r"\b(" + "|".join(numbered) + r")\b") if numbered else None
    plain = (
        pattern.sub(lambda match: numbered[match.group(1)], text) if pattern else text
    )
    prefix = "p" + blake2b(plain.encode(), digest_size=4).hexdigest()
    plain = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', plain)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}-", plain)
