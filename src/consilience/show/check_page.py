"""The page of a check: every number against its margin, and the worst images with the
maps of both networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from consilience.diagnosis.change import Change, Criterion
from consilience.show import charts
from consilience.show.change_words import (
    classes_sentence,
    criterion_sentence,
    likeness,
    verdict_sentence,
)
from consilience.show.charts import GREY, PALETTE, Bar
from consilience.show.figures import figure_svg, painted_map, shown_image
from consilience.show.html import embed, environment, page_style
from consilience.show.tiles import Tile
from consilience.types import Explanation

COLOURS = {"within": PALETTE[2], "beyond": PALETTE[1], "not shown": GREY}
MOST_CLASSES, MOST_IMAGES = 50, 50

Pair = tuple[Explanation, Explanation]


def check_page(
    found: Change,
    worst: Sequence[Pair],
    version: str,
    command: str = "",
) -> str:
    """One HTML document that loads nothing from anywhere; ``worst`` are maps of the old
    and of the new network of the images that changed most.
    """
    return (
        environment()
        .get_template("check.html.j2")
        .render(
            version=version,
            command=command,
            style=Markup(page_style()),
            found=found,
            headline=verdict_sentence(found),
            said=[
                *(criterion_sentence(one) for one in found.criteria),
                classes_sentence(found),
            ],
            forest=_forest(found.criteria),
            likeness=likeness,
            classes=found.by_class.head(MOST_CLASSES).to_dict("records"),
            all_classes=len(found.by_class),
            rows=found.images.head(MOST_IMAGES).to_dict("records"),
            marks=found.marks.to_dict("records"),
            floors=found.floors.to_dict("records"),
            pictures=[_picture(pair) for pair in worst],
        )
    )


def _forest(criteria: Sequence[Criterion]) -> Markup:
    """Every number with its bounds as a share of its margin."""
    bars = [
        Bar(
            one.name,
            one.value / one.margin,
            one.low / one.margin,
            one.high / one.margin,
            COLOURS[one.answer],
            one.answer == "not shown",
        )
        for one in criteria
        if math.isfinite(one.value)
    ]
    made = charts.forest_figure(bars, "Each number as a share of its margin", at=1.0)
    return Markup("") if made is None else figure_svg(made)


def _picture(pair: Pair) -> dict[str, Any]:
    old, new = pair
    name = old.sample.name
    shown = [
        (shown_image(old), "the image", name),
        (painted_map(old)[0], "the old network", f"{name}: map of the old network"),
        (painted_map(new)[0], "the new network", f"{name}: map of the new network"),
    ]
    return {
        "name": name,
        "method": old.explainer,
        "target": old.target.name or str(old.target.index),
        "tiles": [
            embed(Tile(pixels, title, alt), {}) for pixels, title, alt in shown
        ],
    }
