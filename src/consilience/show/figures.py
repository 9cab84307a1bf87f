"""Matplotlib figures of explanations, for a notebook, a file or the report, and their
HTML for a notebook's cell.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from consilience import images
from consilience.images import Placement
from consilience.perturb.surrogate import settled
from consilience.show import panels, words
from consilience.types import Array, ConsilienceError, Explanation, Score

if TYPE_CHECKING:
    from consilience.agreement.overlap import Agreement
    from consilience.api import Scores
    from consilience.dissection.result import Dissection, LayerResult

INK, SOFT = "#1b1f24", "#57606a"
PANEL_INCHES = 3.2
TABLE_ROWS = 30
FIGURE_CONCEPTS = 40


def overlay_on_image(explanation: Explanation) -> Array:
    """`Explanation.overlay`: the scale is that of the map in the model's frame."""
    values = explanation.to_image()
    scale = panels.limits(explanation.values)
    painted = panels.overlay(explanation.sample.pixels, values, scale=scale)
    unseen = ~np.isfinite(values)
    painted[unseen] = explanation.sample.pixels[unseen]
    return painted


def shown_image(explanation: Explanation) -> Array:
    """The image in the model's frame, (h, w, 3) uint8."""
    place = Placement.from_dict(explanation.geometry.as_dict())
    seen: Array = images.place(explanation.sample.pixels, place, "bilinear")
    return np.clip(np.round(seen), 0, 255).astype(np.uint8)


def painted_map(explanation: Explanation) -> tuple[Array, panels.Scale]:
    """The map drawn over the image in the model's frame, and the scale of its colours."""
    image = shown_image(explanation)
    segments = explanation.extras.get("segments")
    weights = explanation.extras.get("weights")
    if segments is None or weights is None:
        scale = panels.limits(explanation.values)
        return panels.overlay(image, explanation.values, scale=scale), scale
    sure, top = settled(explanation.extras.get("p_top", np.full(1, np.nan)))
    unsure = np.setdiff1d(top, sure)
    drawn = panels.superpixels(image, segments, weights, sure=sure, unsure=unsure)
    return drawn, panels.limits(weights[segments], signed=True)


def explanation_figure(explanation: Explanation) -> Figure:
    """Image, map over the image, and the scale of the map's values."""
    painted, scale = painted_map(explanation)
    height, width = painted.shape[:2]
    tall = PANEL_INCHES * height / width
    figure = Figure(figsize=(2 * PANEL_INCHES + 0.9, tall + 0.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_image(left, shown_image(explanation), panels.visible(explanation.sample.name))
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
    return f"{panels.visible(method)}\nof {panels.visible(target)}"


def draw_scale(figure: Figure, axes: Axes, scale: panels.Scale) -> None:
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
    colours = panels.DIVERGING if scale.signed else panels.SEQUENTIAL
    mappable = ScalarMappable(Normalize(scale.low, scale.high), colours)
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


def figure_png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


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
            axes.plot(at, heights, color=panels.ABOVE)
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
        axes.barh([str(name) for name in counts.index], counts, color=panels.ABOVE)
        axes.invert_yaxis()
        axes.set_xlabel("units that detect it", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.suptitle(found.headline(layer.layer), fontsize=9, parse_math=False)
    return figure


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
        f"<p>{words.verdict_sentence(row, len(rows))}</p>" for row in rows[:TABLE_ROWS]
    ]
    shown = agreement.table()[AGREEMENT_COLUMNS]
    pair = f"{rows[0]['a']} and {rows[0]['b']}"
    alt = f"IoU of {pair} on each image against its chance level"
    return "".join(sentences) + table_html(shown) + figure_html(agreement.figure(), alt)


AGREEMENT_COLUMNS = [
    *("sample", "a", "b", "iou", "expected_iou", "excess", "p", "spearman", "mismatch")
]


def dissection_html(found: Dissection) -> str:
    """The headline of every layer, and the best units."""
    units = found.table().sort_values("iou", ascending=False, kind="stable")
    names = ["layer", "unit", "concept", "category", "iou", "expected_iou", "p", "q"]
    headlines = [found.headline(layer.layer) for layer in found.layers]
    return table_html(units[names], headlines)
