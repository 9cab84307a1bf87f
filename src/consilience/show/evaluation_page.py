"""What the report says of an evaluation: the table of methods by metrics, plots, and
the numbers of every image.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from consilience.files import file_stem
from consilience.registry import unknown
from consilience.show import charts, words
from consilience.show.charts import GREY, PALETTE, Bar, CurveLine
from consilience.show.figures import figure_html, figure_svg, table_html
from consilience.types import ConsilienceError

SUMMARY, TABLE, MOSAICS = "evaluation.json", "metrics.parquet", "mosaics"
MOSAIC_TILE = 112
MetricRow = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class MetricSection:
    """One metric as it is shown: what it is, its plots, what is marked and why, and a
    row of values an image.
    """

    anchor: str
    metric: MetricRow
    cells: Mapping[str, MetricRow]
    forest: Markup
    curves: Markup
    ranks: Markup
    order: MetricRow | None
    marks: tuple[str, ...]
    reasons: tuple[str, ...]
    against: tuple[MetricRow, ...]
    between: tuple[MetricRow, ...]
    values: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    unit: str
    gathered: Mapping[str, MetricRow]
    tiles: Mapping[str, str]


def evaluation_context(
    folder: Path, anchors: Mapping[str, str]
) -> dict[str, Any] | None:
    """What the template is given of a run's evaluation; None where there is none.

    ``anchors`` are of images on the page.
    """
    if not (folder / SUMMARY).is_file() or not (folder / TABLE).is_file():
        return None
    said = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    table = pd.read_parquet(folder / TABLE)
    known = [metric for metric in said["metrics"] if not words.is_empty(said, metric)]
    sections = [
        _section(number, metric, said, table, anchors, folder)
        for number, metric in enumerate(known, 1)
    ]
    shown = [
        column for column in said["columns"] if _has_values(said, column["label"])
    ]
    return {
        "images": said["images"],
        "suite": said.get("suite"),
        "methods": [column for column in shown if column["kind"] == "method"],
        "controls": [column for column in shown if column["kind"] != "method"],
        "columns": said["columns"],
        "sections": sections,
        "silent": words.silent(said),
        "twins": {
            label
            for label, count in Counter(metric["label"] for metric in known).items()
            if count > 1
        },
        "correlations": [
            row for row in said["correlations"] if row["mean"] is not None
        ],
        "command": said.get("command", ""),
    }


def _has_values(said: MetricRow, label: str) -> bool:
    return any(cell["n"] for cell in said["cells"] if cell["column"] == label)


def method_colours(columns: Sequence[MetricRow]) -> dict[str, str]:
    """A colour for each method, grey for controls."""
    methods = [column["label"] for column in columns if column["kind"] == "method"]
    given = {
        label: PALETTE[place % len(PALETTE)] for place, label in enumerate(methods)
    }
    return {column["label"]: given.get(column["label"], GREY) for column in columns}


def _section(
    place: int,
    metric: MetricRow,
    said: MetricRow,
    table: pd.DataFrame,
    anchors: Mapping[str, str],
    folder: Path,
) -> MetricSection:
    spec = metric["spec"]
    mine = table[table["metric"] == spec]
    cells = {cell["column"]: cell for cell in said["cells"] if cell["metric"] == spec}
    against = tuple(row for row in said["against_controls"] if row["metric"] == spec)
    order = next((row for row in said["orders"] if row["metric"] == spec), None)
    return MetricSection(
        f"metric-{place}",
        metric,
        cells,
        _forest(metric, cells, said["columns"]),
        _curves(metric, said),
        _ranks(order),
        order,
        tuple(words.marks(metric, cells, against)),
        tuple(words.reasons(metric, cells)),
        against,
        tuple(row for row in said["between"] if row["metric"] == spec),
        tuple(_values(mine, said["columns"], anchors)),
        words.metric_unit(metric),
        gathered(said, spec),
        {}
        if words.metric_unit(metric) == "image"
        else _tiles(folder, list(dict.fromkeys(mine["sample"]))),
    )


def _tiles(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Mosaics as they lie in the run's folder, to be shown beside their numbers."""
    files = {name: folder / MOSAICS / f"{file_stem(name)}.png" for name in names}
    encoded = {
        name: base64.b64encode(_small(path)).decode()
        for name, path in files.items()
        if path.is_file()
    }
    return {name: f"data:image/webp;base64,{text}" for name, text in encoded.items()}


def _small(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((MOSAIC_TILE, MOSAIC_TILE))
        image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _forest(
    metric: MetricRow, cells: Mapping[str, MetricRow], columns: Sequence[MetricRow]
) -> Markup:
    made = forest_of(metric, cells, columns)
    return Markup("") if made is None else figure_svg(made)


def forest_of(
    metric: MetricRow, cells: Mapping[str, MetricRow], columns: Sequence[MetricRow]
) -> Figure | None:
    """The forest plot of one metric; None where it has no number."""
    ink = method_colours(columns)
    bars = []
    for column in sorted(columns, key=lambda column: column["kind"] != "method"):
        label = column["label"]
        mean, low, high = (
            _float(cells[label][key]) for key in ("mean", "low", "high")
        )
        bars.append(
            Bar(label, mean, low, high, ink[label], column["kind"] != "method")
        )
    return charts.forest_figure(bars, f"{metric['label']}, mean and 95 % interval")


def metric_figure(said: MetricRow, spec: str | None = None) -> Figure:
    """The forest plot of a metric by its spelling, the first with a number unless given;
    `ConsilienceError` where there is none.
    """
    known = {
        row["spec"]: row for row in said["metrics"] if not words.is_empty(said, row)
    }
    if spec is None and not known:
        raise ConsilienceError("no metric has a number")
    wanted = next(iter(known)) if spec is None else spec
    if wanted not in known:
        raise ConsilienceError(unknown("metric with a number", wanted, known))
    cells = {row["column"]: row for row in said["cells"] if row["metric"] == wanted}
    made = forest_of(known[wanted], cells, said["columns"])
    assert made is not None
    made.suptitle(
        f"{known[wanted]['label']} ({wanted})", fontsize=10, parse_math=False
    )
    return made


def evaluation_html(said: MetricRow) -> str:
    """Means of every metric and map, and the first metric's plot, for a notebook."""
    rows = [
        {"metric": cell["metric"], "map": cell["column"]}
        | {key: _float(cell[key]) for key in ("mean", "low", "high")}
        | {"n": cell["n"], "no number": cell["not_applicable"]}
        for cell in said["cells"]
    ]
    table = table_html(pd.DataFrame(rows), rows=100)
    if all(words.is_empty(said, metric) for metric in said["metrics"]):
        return table
    return table + figure_html(metric_figure(said), "means with 95 % intervals")


def _curves(metric: MetricRow, said: MetricRow) -> Markup:
    kinds = {column["label"]: column["kind"] for column in said["columns"]}
    ink = method_colours(said["columns"])
    lines = [
        CurveLine(
            row["column"],
            row["x"],
            row["mean"],
            row["half"],
            ink[row["column"]],
            kinds[row["column"]] != "method",
        )
        for row in said.get("curves") or []
        if row["metric"] == metric["spec"] and kinds[row["column"]] != "other"
    ]
    return (
        figure_svg(charts.curves_with_bands(lines, f"{metric['label']}, mean curves"))
        if lines
        else Markup("")
    )


def _ranks(order: MetricRow | None) -> Markup:
    if order is None or len(order["columns"]) < 3:
        return Markup("")
    return figure_svg(
        charts.critical_difference_figure(
            order["columns"],
            order["mean_ranks"],
            order["critical_difference"],
            order["groups"],
        )
    )


def gathered(said: MetricRow, spec: str) -> dict[str, MetricRow]:
    """By map what a metric makes of all images together, where it does: one threshold
    for the whole data set.
    """
    return {
        row["column"]: row
        for row in said.get("gathered") or []
        if row["metric"] == spec
    }


def _values(
    rows: pd.DataFrame, columns: Sequence[MetricRow], anchors: Mapping[str, str]
) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """By image its name, its place on the page, and (text, reason) for each column."""
    found = []
    for name, part in rows.groupby("sample", sort=False):
        mine = {row["column"]: row for row in part.to_dict("records")}
        shown = tuple(_value(mine.get(column["label"])) for column in columns)
        found.append((str(name), anchors.get(str(name), ""), shown))
    return found


def _value(row: Mapping[Any, Any] | None) -> tuple[str, str]:
    return (
        (words.DASH, "not evaluated")
        if row is None
        else (words.format_number(float(row["value"])), str(row["reason"]))
    )


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
