"""The page of the planted suite: how well methods find evidence that is known, and
which metrics rank the true map first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from consilience.evaluation import planted
from consilience.registry import parse
from consilience.show import charts
from consilience.show.charts import GREY, PALETTE, Bar
from consilience.show.figures import figure_svg
from consilience.show.html import embed, environment, page_style
from consilience.show.tiles import Tile
from consilience.types import Array

AREA = "(area of the evidence)"
CONTROL_NAMES = ("random", "centre", "edges", "constant")
PlantedRow = Mapping[str, Any]


def planted_page(found: PlantedRow, version: str, command: str = "") -> str:
    """The suite's results as one HTML document that loads nothing from anywhere."""
    return (
        environment()
        .get_template("planted.html.j2")
        .render(planted_context(found, version, command))
    )


def planted_context(found: PlantedRow, version: str, command: str) -> dict[str, Any]:
    """Everything the template shows."""
    return {
        "version": version,
        "command": command,
        "style": Markup(page_style()),
        "images": found["images"],
        "worlds": found["worlds"],
        "tiles": [
            tile for name in found["worlds"] for tile in _tiles(name, found["seed"])
        ],
        "verified": found["verified"],
        "notes": found["notes"],
        "methods": found["methods"],
        "controls": (AREA, *CONTROL_NAMES),
        "metrics": found["metrics"],
        "forest": planted_forest(found["methods"]),
    }


def planted_forest(methods: Sequence[PlantedRow]) -> Markup:
    """Mean share on the evidence by method, with its interval; what knows nothing is
    grey and last.
    """
    rows = sorted(methods, key=_knows_nothing)
    numbers = [(row["method"], row["mean"], row["low"], row["high"]) for row in rows]
    bars = [
        Bar(*mine, _ink(at, row), _knows_nothing(row))
        for at, (mine, row) in enumerate(zip(numbers, rows, strict=True))
    ]
    made = charts.forest_figure(
        bars, "Share of the map on the planted evidence, mean and 95 % interval"
    )
    return Markup("") if made is None else figure_svg(made)


def _knows_nothing(row: PlantedRow) -> bool:
    return row["method"] == AREA or parse(row["method"]).name in CONTROL_NAMES


def _ink(place: int, row: PlantedRow) -> str:
    return GREY if _knows_nothing(row) else PALETTE[place % len(PALETTE)]


def _tiles(name: str, seed: int) -> list[Any]:
    """A world's first image, and the same with all but the evidence faded."""
    sample = planted.world_named(name).samples(1, seed)[0]
    faded = np.where(
        sample.masks["1"][..., None], sample.pixels, 255 - (255 - sample.pixels) // 5
    ).astype(np.uint8)
    return [
        _tile(sample.pixels, f"{name}: an image"),
        _tile(faded, f"{name}: its evidence"),
    ]


def _tile(pixels: Array, title: str) -> Any:
    large = pixels.repeat(3, axis=0).repeat(3, axis=1)
    return embed(Tile(large, title, title), {})
