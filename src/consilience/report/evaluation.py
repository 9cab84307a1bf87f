"""What the report says of an evaluation: the table of methods by metrics, plots, and the numbers of every picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from consilience.report import plots, words
from consilience.report.plots import GREY, PALETTE, Bar, Line

SUMMARY, TABLE = "evaluation.json", "metrics.parquet"
Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Section:
    """One metric as it is shown: what it is, its plots, what is marked and why, and a row of values a picture."""

    anchor: str
    metric: Row
    cells: Mapping[str, Row]
    forest: Markup
    curves: Markup
    ranks: Markup
    order: Row | None
    marks: tuple[str, ...]
    reasons: tuple[str, ...]
    against: tuple[Row, ...]
    between: tuple[Row, ...]
    values: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]


def context(folder: Path, anchors: Mapping[str, str]) -> dict[str, Any] | None:
    """What the template is given of a run's evaluation; None where there is none. ``anchors`` are of pictures on the page."""
    if not (folder / SUMMARY).is_file() or not (folder / TABLE).is_file():
        return None
    said = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    table = pd.read_parquet(folder / TABLE)
    sections = [_section(number, metric, said, table, anchors) for number, metric in enumerate(said["metrics"], 1)]
    shown = [column for column in said["columns"] if _has_values(said, column["label"])]
    return {
        "pictures": said["pictures"],
        "suite": said.get("suite"),
        "methods": [column for column in shown if column["kind"] == "method"],
        "controls": [column for column in shown if column["kind"] != "method"],
        "columns": said["columns"],
        "sections": sections,
        "correlations": [row for row in said["correlations"] if row["mean"] is not None],
        "command": said.get("command", ""),
    }


def _has_values(said: Row, label: str) -> bool:
    return any(cell["n"] for cell in said["cells"] if cell["column"] == label)


def number(value: Any) -> str:
    """Three significant digits below .1, else three decimals; a dash where there is none."""
    if words.missing(value):
        return words.DASH
    text = f"{value:.3g}" if 0 < abs(value) < 0.0995 or abs(value) >= 1000 else f"{value:.3f}"
    return text.replace("-", "−")


def colours(columns: Sequence[Row]) -> dict[str, str]:
    """A colour for each method, grey for controls."""
    methods = [column["label"] for column in columns if column["kind"] == "method"]
    given = {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(methods)}
    return {column["label"]: given.get(column["label"], GREY) for column in columns}


def _section(place: int, metric: Row, said: Row, table: pd.DataFrame, anchors: Mapping[str, str]) -> Section:
    spec = metric["spec"]
    cells = {cell["column"]: cell for cell in said["cells"] if cell["metric"] == spec}
    order = next((row for row in said["orders"] if row["metric"] == spec), None)
    return Section(
        f"metric-{place}",
        metric,
        cells,
        _forest(metric, cells, said["columns"]),
        _curves(metric, said),
        _ranks(order),
        order,
        tuple(_marks(cells)),
        tuple(_reasons(cells)),
        tuple(row for row in said["against_controls"] if row["metric"] == spec),
        tuple(row for row in said["between"] if row["metric"] == spec),
        tuple(_values(table[table["metric"] == spec], said["columns"], anchors)),
    )


def _forest(metric: Row, cells: Mapping[str, Row], columns: Sequence[Row]) -> Markup:
    ink = colours(columns)
    bars = []
    for column in sorted(columns, key=lambda column: column["kind"] != "method"):
        label = column["label"]
        mean, low, high = (_float(cells[label][key]) for key in ("mean", "low", "high"))
        bars.append(Bar(label, mean, low, high, ink[label], column["kind"] != "method"))
    return plots.forest(bars, f"{metric['label']}, mean and 95 % interval")


def _curves(metric: Row, said: Row) -> Markup:
    kinds = {column["label"]: column["kind"] for column in said["columns"]}
    ink = colours(said["columns"])
    lines = [
        Line(row["column"], row["x"], row["mean"], row["half"], ink[row["column"]], kinds[row["column"]] != "method")
        for row in said.get("curves") or []
        if row["metric"] == metric["spec"] and kinds[row["column"]] != "other"
    ]
    return plots.curves(lines, f"{metric['label']}, mean curves") if lines else Markup("")


def _ranks(order: Row | None) -> Markup:
    if order is None or len(order["columns"]) < 3:
        return Markup("")
    return plots.critical_difference(order["columns"], order["mean_ranks"], order["critical_difference"], order["groups"])


def _marks(cells: Mapping[str, Row]) -> list[str]:
    found = []
    for label, cell in cells.items():
        if cell.get("above") is False:
            few = "" if cell["reachable"] else ". So few pictures could not have shown it, whatever the numbers"
            found.append(f"{label} is not shown to be above {', '.join(cell['not_above'])}{few}.")
    return found


def _reasons(cells: Mapping[str, Row]) -> list[str]:
    found: dict[str, list[str]] = {}
    for label, cell in cells.items():
        for row in cell["reasons"]:
            found.setdefault(row["reason"], []).append(f"{label} {row['pictures']}")
    return [f"{reason} ({', '.join(some)})" for reason, some in found.items()]


def _values(
    rows: pd.DataFrame, columns: Sequence[Row], anchors: Mapping[str, str]
) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """By picture its name, its place on the page, and (text, reason) for each column."""
    found = []
    for name, part in rows.groupby("sample", sort=False):
        mine = {row["column"]: row for row in part.to_dict("records")}
        shown = tuple(_value(mine.get(column["label"])) for column in columns)
        found.append((str(name), anchors.get(str(name), ""), shown))
    return found


def _value(row: Mapping[Any, Any] | None) -> tuple[str, str]:
    return (words.DASH, "not evaluated") if row is None else (number(float(row["value"])), str(row["reason"]))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
