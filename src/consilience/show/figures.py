"""Matplotlib figures of explanations, for a notebook, a file or the report, and their
HTML for a notebook's cell.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory
from PIL import Image, ImageFont

from consilience import images
from consilience.images import Placement
from consilience.progress import printable
from consilience.show import colours, words
from consilience.show.colours import Scale
from consilience.show.tiles import ShownSample, Tile, certainty, tiles
from consilience.types import Array, ConsilienceError, Explanation, Score

if TYPE_CHECKING:
    from consilience.agreement.overlap import Agreement
    from consilience.api import Scores
    from consilience.dissection.result import Dissection, LayerResult

INK, SOFT = "#1b1f24", "#57606a"
CURRENT = "#010203"
"""Stands for the colour of the text round a plot, so that it follows a light or dark
page.
"""
DPI = 100
HINTED = 1.04
"""Letters on whole pixels are up to so much wider than measured."""
LEAST_SCALE, MOST_SCALE = 0.925, 1.25
"""How far a figure is scaled on a page: its letters of 13 pixels are never below 12."""
FONT = "DejaVu Sans"
PANEL_INCHES = 3.2
TABLE_ROWS = 30
FIGURE_CONCEPTS = 40


# ---- text and output


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and which it draws with: to measure
    words.
    """
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size
    )


def width_of(text: str, size: float, bold: bool = False) -> float:
    """Width of a text in pixels, at a size in pixels."""
    return float(font(100, bold).getlength(printable(text))) * size / 100


def shortened(text: str, room: float, size: float) -> str:
    """The text, or its beginning with an ellipsis, so that it is no wider than
    ``room``.
    """
    text = printable(text)
    if width_of(text, size) <= room:
        return text
    while text and width_of(f"{text}…", size) > room:
        text = text[:-1]
    return f"{text}…"


def wrapped(text: str, size: float, width: float, bold: bool = False) -> list[str]:
    """Lines that fit; a word that is too long alone is broken."""
    width /= HINTED
    lines: list[str] = []
    for word in printable(text).split():
        if lines and width_of(f"{lines[-1]} {word}", size, bold) <= width:
            lines[-1] += f" {word}"
            continue
        lines += _pieces(word, size, width, bold)
    return lines


def _pieces(word: str, size: float, width: float, bold: bool) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and width_of(pieces[-1] + letter, size, bold) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def points(pixels: float) -> float:
    """A size in pixels of a figure as points."""
    return 72 * pixels / DPI


def figure_png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as PNG, without transparency."""
    canvas, before = FigureCanvasAgg(figure), figure.dpi
    figure.set_dpi(dpi)
    try:
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    finally:
        figure.set_dpi(before)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def figure_svg(figure: Figure) -> Markup:
    """A figure as SVG that is the same for the same figure: no date, no random ids, no
    metadata. Its label is its alternative text; `CURRENT` becomes ``currentColor``. It
    follows the page's width as far as its letters stay readable.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    text = buffer.getvalue().replace(CURRENT, "currentColor")
    text = text.replace(f"'{FONT}'", f"'{FONT}', system-ui, sans-serif")
    text = _stable_ids(text[text.index("<svg") :])
    text = re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
    width = figure.get_figwidth() * DPI
    kept = (
        f"min-width:{LEAST_SCALE * width:.0f}px;max-width:{MOST_SCALE * width:.0f}px"
    )
    text = text.replace("<svg ", f'<svg style="{kept}" ', 1)
    label = escape(printable(str(figure.get_label())))
    if label:
        text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Markup(text)


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


# ---- an explanation


def overlay_on_image(explanation: Explanation) -> Array:
    """`Explanation.overlay`: the scale is that of the map in the model's frame."""
    values = explanation.to_image()
    scale = colours.limits(explanation.values)
    painted = colours.overlay(explanation.sample.rgb, values, scale=scale)
    unseen = ~np.isfinite(values)
    painted[unseen] = explanation.sample.rgb[unseen]
    return painted


def shown_image(explanation: Explanation) -> Array:
    """The image in the model's frame, (h, w, 3) uint8."""
    place = Placement.from_dict(explanation.geometry.as_dict())
    seen: Array = images.place(explanation.sample.rgb, place, "bilinear")
    return np.clip(np.round(seen), 0, 255).astype(np.uint8)


def painted_map(explanation: Explanation) -> tuple[Array, Scale]:
    """The map drawn over the image in the model's frame, and the scale of its colours."""
    image = shown_image(explanation)
    segments = explanation.extras.get("segments")
    weights = explanation.extras.get("weights")
    if segments is None or weights is None:
        scale = colours.limits(explanation.values)
        return colours.overlay(image, explanation.values, scale=scale), scale
    drawn = colours.superpixels(
        image, segments, weights, *certainty(explanation.extras)
    )
    return drawn, colours.limits(weights[segments], signed=True)


def explanation_figure(explanation: Explanation) -> Figure:
    """Image, map over the image, and the scale of the map's values."""
    painted, scale = painted_map(explanation)
    height, width = painted.shape[:2]
    tall = PANEL_INCHES * height / width
    figure = Figure(
        figsize=(2 * PANEL_INCHES + 0.9, tall + 0.7), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    _draw_image(left, shown_image(explanation), printable(explanation.sample.name))
    _draw_image(right, painted, explanation_title(explanation))
    draw_scale(figure, right, scale)
    return figure


def _draw_image(axes: Axes, pixels: Array, title: str) -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    axes.set_axis_off()


def explanation_title(explanation: Explanation) -> str:
    """The method and what it explains, on two lines."""
    method, target = explanation.explainer, explanation.target.name
    return f"{printable(method)}\nof {printable(target)}"


def draw_scale(figure: Figure, axes: Axes, scale: Scale) -> None:
    """The scale beside a map, or a line that says the map is flat."""
    if scale.flat:
        axes.text(
            0.5,
            -0.04,
            "flat: every value is equal",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color=SOFT,
        )
        return
    ramp = colours.DIVERGING if scale.signed else colours.SEQUENTIAL
    mappable = ScalarMappable(Normalize(scale.low, scale.high), ramp)
    bar = figure.colorbar(mappable, ax=axes, shrink=0.9, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    bar.outline.set_visible(False)


def show_figure(figure: Figure) -> None:
    """Display a figure: in a notebook below the cell, else in the image viewer."""
    notebook = sys.modules.get("IPython")
    if notebook is not None and notebook.get_ipython() is not None:
        notebook.display.display(figure)
        return
    Image.open(io.BytesIO(figure_png(figure))).show()


# ---- for a notebook's cell


def figure_html(figure: Figure, alt: str) -> str:
    """A figure as an HTML image that loads nothing."""
    data = base64.b64encode(figure_png(figure)).decode()
    return (
        f'<img alt="{escape(alt)}" style="max-width:100%" '
        f'src="data:image/png;base64,{data}">'
    )


def curves_figure(scores: Scores) -> Figure:
    """The curves of scores, a panel a metric; `ConsilienceError` where none has one."""
    curves = {
        name: np.atleast_2d(score.curve)
        for name, score in scores.items()
        if isinstance(score, Score) and score.curve is not None
    }
    if not curves:
        raise ConsilienceError(f"no curve behind {', '.join(scores) or 'no metric'}")
    figure = Figure(figsize=(PANEL_INCHES * len(curves), 2.6), layout="constrained")
    panes = np.ravel(figure.subplots(1, len(curves), squeeze=False))
    for axes, (name, curve) in zip(panes, curves.items(), strict=True):
        at = np.arange(curve.shape[1]) if len(curve) == 1 else curve[0]
        for heights in curve if len(curve) == 1 else curve[1:]:
            axes.plot(at, heights, color=ABOVE)
        axes.set_title(name, fontsize=10, color=INK, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
    return figure


def dissection_figure(found: Dissection, layer: LayerResult) -> Figure:
    """Detectors of a layer counted by concept, most frequent first."""
    rows = found.detectors(layer.layer)
    counts = rows["concept"].value_counts().head(FIGURE_CONCEPTS)
    figure = Figure(
        figsize=(5.5, 0.9 + 0.22 * max(len(counts), 3)), layout="constrained"
    )
    axes = figure.add_subplot()
    if counts.empty:
        axes.text(0.5, 0.5, "no unit detects a concept", ha="center", color=SOFT)
        axes.set_axis_off()
    else:
        axes.barh([str(name) for name in counts.index], counts, color=ABOVE)
        axes.invert_yaxis()
        axes.set_xlabel("units that detect it", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.suptitle(found.headline(layer.layer), fontsize=9, parse_math=False)
    return figure


def explanations_figure(made: Sequence[Explanation], columns: int = 4) -> Figure:
    """Maps over their images in a grid, named by image, or by layer and method where
    they are of one.
    """
    if not made:
        raise ConsilienceError("no explanations to draw")
    across = min(columns, len(made))
    down = -(-len(made) // across)
    figure = Figure(figsize=(2.6 * across, 2.8 * down), layout="constrained")
    panes = np.ravel(figure.subplots(down, across, squeeze=False))
    same = len({one.sample.name for one in made}) == 1
    for axes, one in zip(panes, made, strict=False):
        axes.imshow(painted_map(one)[0])
        title = str(one.provenance.get("layer") or one.explainer)
        axes.set_title(
            title if same and len(made) > 1 else one.sample.name,
            fontsize=9,
            color=INK,
            parse_math=False,
        )
    for axes in panes:
        axes.set_axis_off()
    methods = ", ".join(dict.fromkeys(one.name for one in made))
    heading = f"{methods} of {made[0].sample.name}" if same else methods
    figure.suptitle(heading, fontsize=10, color=INK, parse_math=False)
    return figure


def explanations_html(made: Sequence[Explanation], failures: Sequence[str]) -> str:
    """The first maps in a grid, how many there are, and what failed."""
    shown = made[:GRID_IMAGES]
    more = (
        f"<p>the first {len(shown)} of {len(made)}</p>"
        if len(made) > len(shown)
        else ""
    )
    failed = "".join(f"<p>failed: {escape(reason)}</p>" for reason in failures[:5])
    return figure_html(explanations_figure(shown), "maps") + more + failed


GRID_IMAGES = 12


def explanation_html(explanation: Explanation) -> str:
    """The figure with a line under it; without the image, the line alone."""
    made = explanation.provenance
    facts = [
        f"score {made['score']:.4g}" if "score" in made else "",
        f"{int(made['passes']):,} passes" if made.get("passes") else "",
        words.format_seconds(made.get("seconds")) if "seconds" in made else "",
        explanation.model_id,
    ]
    line = f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p>"
    alt = f"{explanation.explainer} of {explanation.target.name}"
    try:
        return figure_html(explanation.figure(), alt) + line
    except ConsilienceError as error:
        return f"<p>{escape(alt)}: {escape(str(error))}</p>{line}"


def table_html(
    table: pd.DataFrame, sentences: Sequence[str] = (), rows: int = TABLE_ROWS
) -> str:
    """Sentences and the first rows of a table; says how many rows there are."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    shown = table.head(rows).to_html(
        index=False, border=0, float_format=words.format_number
    )
    more = f"<p>{len(table):,} rows</p>" if len(table) > rows else ""
    return said + shown + more


def scores_html(scores: Scores) -> str:
    """The table of scores, and their curves where there are some."""
    try:
        curves = figure_html(curves_figure(scores), "curves of the metrics")
    except ConsilienceError:
        curves = ""
    return table_html(scores.table()) + curves


def agreement_html(agreement: Agreement) -> str:
    """Each pair in a sentence, the first pairs of the table, and the first pair's plot."""
    summary = agreement.summary()
    if summary.empty:
        return "<p>no pair of explanations</p>"
    rows = summary.to_dict("records")
    sentences = [
        f"<p>{words.verdict_sentence(row, len(rows))}</p>"
        for row in rows[:TABLE_ROWS]
    ]
    shown = agreement.table()[AGREEMENT_COLUMNS]
    pair = f"{rows[0]['a']} and {rows[0]['b']}"
    alt = f"IoU of {pair} on each image against its chance level"
    return (
        "".join(sentences) + table_html(shown) + figure_html(agreement.figure(), alt)
    )


AGREEMENT_COLUMNS = [
    *(
        "sample",
        "a",
        "b",
        "iou",
        "expected_iou",
        "excess",
        "p",
        "spearman",
        "mismatch",
    )
]


def dissection_html(found: Dissection) -> str:
    """The headline of every layer, and the best units."""
    units = found.table().sort_values("iou", ascending=False, kind="stable")
    names = ["layer", "unit", "concept", "category", "iou", "expected_iou", "p", "q"]
    headlines = [found.headline(layer.layer) for layer in found.layers]
    return table_html(units[names], headlines)


# ---- a panel of one sample

MARGIN, GAP, BAR = 16, 14, 9
"""Pixels round a panel, between its tiles, and the height of a scale."""


def panel(
    shown: ShownSample,
    pairs: Sequence[tuple[str, str]] | None = None,
    heading: str | None = None,
) -> bytes:
    """PNG of one sample in one row: image, maps, masks, masks over each other, each
    with its words.
    """
    heading = shown.name if heading is None else heading
    return figure_png(tiles_figure(tiles(shown, pairs), heading))


def tiles_figure(
    parts: Sequence[Tile], heading: str = "", height: int = 300
) -> Figure:
    """Tiles in one row, all ``height`` pixels high whatever their frames, with titles,
    lines and keys. An image of that height is drawn pixel by pixel.
    """
    if not parts:
        raise ConsilienceError("a panel needs at least one tile")
    shown = [_to_height(part.image, height) for part in parts]
    widths = [image.shape[1] for image in shown]
    whole = 2 * MARGIN + sum(widths) + GAP * (len(parts) - 1)
    head = wrapped(heading, 20, whole - 2 * MARGIN, bold=True)
    titles = [
        wrapped(part.title, 16, width, bold=True)
        for part, width in zip(parts, widths, strict=True)
    ]
    top = MARGIN + 28 * len(head) + (6 if head else 0)
    image_top = top + 22 * max(map(len, titles)) + 4
    feet = [
        _foot_height(part, width) for part, width in zip(parts, widths, strict=True)
    ]
    page = _Page(whole, image_top + height + max(feet) + MARGIN)
    page.write(head, (MARGIN, MARGIN), 20, 28, INK, bold=True)
    left = MARGIN
    for part, image, title, width in zip(parts, shown, titles, widths, strict=True):
        above = image_top - 4 - 22 * len(title)
        page.write(title, (left, above), 16, 22, INK, bold=True)
        page.draw(image, (left, image_top))
        _draw_foot(page, part, (left, image_top + height + 6), width)
        left += width + GAP
    return page.figure


class _Page:
    """A figure in pixels, from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        # half a pixel more, since matplotlib cuts fractions off
        size = ((width + 0.5) / DPI, (height + 0.5) / DPI)
        self.figure = Figure(figsize=size, dpi=DPI, facecolor="white")

    def draw(self, pixels: Array, at: tuple[int, int]) -> None:
        """An image, pixel by pixel."""
        below = self.height - at[1] - pixels.shape[0]
        self.figure.figimage(pixels, at[0], below, origin="upper")

    def box(self, at: tuple[int, int], size: tuple[int, int], colour: str) -> None:
        """A filled rectangle with a thin edge."""
        corner = (at[0], self.height - at[1] - size[1])
        made = Rectangle(
            corner, *size, facecolor=colour, edgecolor=SOFT, linewidth=0.6
        )
        made.set_transform(None)
        self.figure.add_artist(made)

    def write(
        self,
        lines: Sequence[str],
        at: tuple[float, int],
        size: int,
        step: int,
        colour: str,
        bold: bool = False,
        align: str = "left",
    ) -> int:
        """Lines of text; returns where the next would stand."""
        left, top = at
        for line in lines:
            self.figure.text(
                left,
                self.height - top - size,
                line,
                transform=None,
                fontsize=points(size),
                color=colour,
                weight="bold" if bold else "normal",
                ha=align,
                va="baseline",
                family=FONT,
                parse_math=False,
            )
            top += step
        return top


def _to_height(image: Array, height: int) -> Array:
    width = max(48, round(image.shape[1] * height / image.shape[0]))
    return (
        image
        if image.shape[:2] == (height, width)
        else images.resize(image, (height, width), "lanczos")
    )


def _foot_height(part: Tile, width: int) -> int:
    lines = sum(len(wrapped(line, 15, width)) for line in part.lines)
    keys = sum(len(wrapped(name, 15, width - 22)) for _, name in part.key)
    return 8 + (BAR + 26 if part.scale else 0) + 20 * (lines + keys)


def _draw_foot(page: _Page, part: Tile, at: tuple[int, int], width: int) -> None:
    left, top = at
    if part.scale is not None:
        top = _draw_ramp(page, part.scale, at, width)
    for line in part.lines:
        top = page.write(wrapped(line, 15, width), (left, top), 15, 20, INK)
    for colour, name in part.key:
        page.box((left, top + 3), (14, 13), colour)
        top = page.write(wrapped(name, 15, width - 22), (left + 22, top), 15, 20, INK)


def _draw_ramp(page: _Page, scale: Scale, at: tuple[int, int], width: int) -> int:
    left, top = at
    ramp = colours.shades_of(scale.signed)
    shades = ramp[np.linspace(0, len(ramp) - 1, width).round().astype(int)]
    page.draw(np.repeat(shades[None], BAR, axis=0), at)
    low, high = scale.words
    top += BAR + 2
    page.write([low], (left, top), 14, 0, SOFT)
    page.write([high], (left + width, top), 14, 0, SOFT, align="right")
    if scale.signed:
        page.write(["0"], (left + width / 2, top), 14, 0, SOFT, align="center")
    return top + 24


# ---- the plot of agreement

ABOVE, BELOW = "#2f80c2", "#d9640c"
_NAMED = 40
"""Up to so many images the plot names each; beyond, it is a curve of thin rows."""


def agreement_plot(
    agreement: pd.DataFrame,
    summary: pd.DataFrame,
    pair: tuple[str, str] | None = None,
) -> Markup:
    """`agreement_figure` as SVG; the ink is ``currentColor``."""
    return figure_svg(agreement_figure(agreement, summary, pair))


def agreement_figure(
    agreement: pd.DataFrame,
    summary: pd.DataFrame,
    pair: tuple[str, str] | None = None,
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
        figsize=(3.6, 1.75 + step * len(rows) + (0.2 if left_out else 0)),
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
        color=CURRENT,
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
            edgecolors=CURRENT,
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
            [low, high], [0, 0], color=CURRENT, linewidth=1.6, solid_capstyle="butt"
        )
        axes.scatter(
            [low, high], [0, 0], s=40, marker="|", color=CURRENT, linewidths=1.6
        )
    axes.scatter(
        [centre], [0], s=52, color=CURRENT, zorder=3, linewidths=0, gid="mean"
    )
    axes.scatter(
        [chance], [0], s=150, marker="|", color=CURRENT, linewidths=1.4, zorder=2
    )


def _label_rows(axes: Axes, rows: pd.DataFrame, heights: Array, named: bool) -> None:
    interval = "mean, 95 %" if len(rows) > 1 else "mean"
    if named:
        labels = [interval, *short_names([str(name) for name in rows["sample"]])]
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
        color=CURRENT,
        linewidth=0.6,
        alpha=0.35,
    )
    note = f"\n{left_out} without a number left out" if left_out else ""
    axes.set_xlabel(f"intersection over union{note}", fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9.5)
    axes.grid(axis="x", color=CURRENT, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.figure.legend(
        loc="outside upper left",
        ncols=1,
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
    axes.tick_params(colors=CURRENT)
    axes.spines["bottom"].set_color(CURRENT)
    axes.xaxis.label.set_color(CURRENT)
    legend = axes.figure.legends[0]
    for text in [
        *axes.get_xticklabels(),
        *axes.get_yticklabels(),
        *legend.get_texts(),
        axes.xaxis.label,
    ]:
        text.set_color(CURRENT)
        text.set_fontfamily("DejaVu Sans")


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def short_names(names: Sequence[str], longest: int = 20) -> list[str]:
    """Names that fit, no two alike: the middle goes, since files often share their
    beginning and differ at the end; where that leaves two alike, their number is added.
    """
    shown = [_short(printable(name), longest) for name in names]
    return [
        name if shown.count(name) == 1 else f"{_short(name, longest - 4)} #{place}"
        for place, name in enumerate(shown, 1)
    ]


def _short(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[-(longest - longest // 2 - 1) :]}"
