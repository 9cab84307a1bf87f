"""The page of a search for shortcuts: what was found, how it looks, how much of it is enough."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from consilience.diagnosis.shortcuts import Shortcuts
from consilience.show import charts
from consilience.show.charts import GREY, PALETTE, Bar
from consilience.show.figures import figure_svg
from consilience.show.html import embed, environment, page_style
from consilience.show.tiles import Tile
from consilience.show.words import count_of, format_number, format_percent
from consilience.types import Array

MOST_SAID, MOST_CLASSES = 12, 3


def shortcuts_page(
    found: Shortcuts, examples: Mapping[str, Any], version: str, command: str = ""
) -> str:
    """One HTML document that loads nothing from anywhere."""
    context = shortcuts_context(found, examples, version, command)
    return environment().get_template("shortcuts.html.j2").render(context)


def shortcuts_context(
    found: Shortcuts, examples: Mapping[str, Any], version: str, command: str
) -> dict[str, Any]:
    """Everything the template shows."""
    return {
        "version": version,
        "command": command,
        "style": Markup(page_style()),
        "model": found.model_id.partition("@")[0],
        "images": len(found.images),
        "failures": found.failures,
        "score": found.score,
        "least": _sizes(
            found,
            [one.spec for one in found.marks],
            "the class's score over these images",
        ),
        "headline": headline(found),
        "said": sentences(found),
        "marks": _mark_rows(found),
        "forest": _forest(found),
        "doses": _dose_charts(found.doses),
        "maps": found.maps.to_dict("records"),
        "carriers": found.carriers.to_dict("records"),
        "tiles": _tiles(examples),
        "example": examples.get("image", ""),
    }


# ---- in words


def headline(found: Shortcuts) -> str:
    """What was shown, in one sentence; what would have been, where nothing was."""
    rows = found.found()
    images = f"over {count_of(len(found.images), 'image')}"
    tried = count_of(len(found.marks), "mark")
    if len(rows):
        marks = rows["mark"].nunique()
        pushes = "pushes" if marks == 1 else "push"
        return (
            f"{marks} of {tried} {pushes} a class by at least "
            f"{_sizes(found, set(rows['mark']), 'its score')}, beyond every control, "
            f"{images}."
        )
    return f"No shortcut was found by {tried} {images}. {detectable_clause(found)}"


def _sizes(found: Shortcuts, marks: Container[str], of: str) -> str:
    """The size that counts of some marks, or of those at a place and of the others."""
    sizes = sorted({found.least_of(one) for one in found.marks if one.spec in marks})
    said = f"{sizes[0]:g} standard deviations of {of}"
    if len(sizes) == 1:
        return said
    return f"{said} ({sizes[1]:g} where a mark changes the whole image)"


def detectable_clause(found: Shortcuts) -> str:
    """How large a shortcut would have been found."""
    table = found.table()["detectable"].dropna()
    if not len(table):
        return "Nothing could have been: no score varies over these images."
    unit = _units(found.score)
    return (
        f"One of {format_number(float(table.median()))} {unit} (median over marks and "
        f"classes; {format_number(float(table.max()))} at most) would have been found "
        f"four times in five."
    )


def _units(score: str) -> str:
    return {"logit": "logits", "probability": "(probability)"}.get(
        score, "units of the score"
    )


def sentences(found: Shortcuts) -> list[str]:
    """The largest findings, a sentence each: one class a mark, then how many more."""
    rows, largest = found.found(), found.largest().set_index("mark")
    said = []
    for mark, group in rows.groupby("mark", sort=False):
        following = group.iloc[1:]
        others = "".join(
            f"; {row['class']} {row['shift']:+.2f}"
            for row in following.head(MOST_CLASSES).to_dict("records")
        )
        more = len(following) - MOST_CLASSES
        others += f"; {more:,} more" if more > 0 else ""
        most = largest.loc[mark]
        if most["verdict"] != "found":
            others += (
                f". It moves {most['class']} most, by {most['shift']:+.2f} (rank "
                f"{most['rank']}), which was not shown to reach that size"
            )
        said.append(f"{mark}: {finding_clause(group.iloc[0], found)}{others}.")
    left = len(said) - MOST_SAID
    return said[:MOST_SAID] + (
        [f"{count_of(left, 'more mark')}."] if left > 0 else []
    )


def finding_clause(row: Any, found: Shortcuts) -> str:
    """One mark and class."""
    unit = _units(found.score)
    against = (
        ""
        if row["nearest"] == "plain"
        else f", {row['excess']:+.2f} beyond {row['nearest']}"
    )
    return (
        f"{row['class']} {row['shift']:+.2f} {unit} (rank {row['rank']} of "
        f"{len(found.marks[0].became):,}{against}; 95 % from {row['low']:+.2f} to "
        f"{row['high']:+.2f}; {row['size']:.1f} SD); "
        f"{format_percent(row['became'])} of the images become it"
    )


# ---- tables and pictures


def _mark_rows(found: Shortcuts) -> list[dict[Any, Any]]:
    """The class that each mark moves most, and how many first classes change."""
    marks = {one.spec: one for one in found.marks}
    rows: list[dict[Any, Any]] = []
    for row in found.largest().to_dict("records"):
        shares = dict(marks[row["mark"]].changed)
        changed = shares.pop("marked")
        held = max(shares.values(), default=math.nan)
        rows.append({**row, "changed": changed, "changed_by_control": held})
    return rows


def _forest(found: Shortcuts, most: int = 20) -> Markup:
    rows = found.largest()
    rows = rows[rows["verdict"] != "not shown"].head(most)
    bars = [
        Bar(
            f"{row['mark']}: {row['class']}",
            row["excess"],
            row["low"],
            row["high"],
            PALETTE[0] if row["verdict"] == "found" else GREY,
            row["verdict"] != "found",
        )
        for row in rows.to_dict("records")
    ]
    made = charts.forest_figure(
        bars, "Shift beyond the nearest control, with simultaneous 95 % bounds"
    )
    return Markup("") if made is None else figure_svg(made)


def _dose(value: str) -> str:
    """A dose as it is spelled, a number to three digits."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def _dose_charts(doses: pd.DataFrame) -> list[dict[str, Any]]:
    """A chart a finding and option; shifts by dose beside those beyond the control."""
    if not len(doses):
        return []
    made = []
    for (mark, name, option), rows in doses.groupby(
        ["mark", "class", "option"], sort=False
    ):
        bars = [
            Bar(
                _dose(row["value"]),
                row["shift"],
                row["shift_low"],
                row["shift_high"],
                PALETTE[0],
            )
            for row in rows.to_dict("records")
        ]
        figure = charts.forest_figure(bars, f"{mark}: shift of {name} by {option}")
        if figure is not None:
            made.append(
                {
                    "mark": mark,
                    "class": name,
                    "option": option,
                    "svg": figure_svg(figure),
                    "rows": rows.to_dict("records"),
                }
            )
    return made


def _tiles(examples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By mark, the first image with it and with its controls."""
    if not examples:
        return []
    return [
        {
            "mark": mark,
            "tiles": [
                _tile(pixels, f"{mark}: {name}") for name, pixels in shown.items()
            ],
        }
        for mark, shown in examples["marks"].items()
    ]


def _tile(pixels: Any, title: str) -> Any:
    array: Array = pixels[0].detach().cpu().numpy().transpose(1, 2, 0)
    eight = np.rint(array * 255).astype(np.uint8)
    shown = eight if eight.shape[2] == 3 else eight[:, :, :1].repeat(3, axis=2)
    return embed(Tile(shown, title.partition(": ")[2] or title, title), {})
