"""The page of a recommendation: what is left, every number beside the controls, and
every comparison.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from consilience.evaluation.recommendation import Recommendation, Standing
from consilience.show import recommend_words
from consilience.show.html import REPORT, environment, page_style
from consilience.show.words import format_number, format_seconds


def recommend_page(
    found: Recommendation,
    model: str,
    images: int,
    version: str,
    command: str = "",
) -> str:
    """One HTML document that loads nothing from anywhere."""
    return (
        environment()
        .get_template("recommend.html.j2")
        .render(
            version=version,
            command=command,
            style=Markup(page_style()),
            model=model,
            images=images,
            report=REPORT,
            headline=recommend_words.headline(found),
            lines=list(recommend_words.lines(found)),
            metrics=found.metrics,
            methods=[_method(one, found) for one in found.standings],
            contests=sorted(found.contests, key=lambda one: one.p_holm),
            labels={one["spec"]: one["label"] for one in found.metrics},
        )
    )


def _method(one: Standing, found: Recommendation) -> dict[str, Any]:
    return {
        "label": one.label,
        "spec": one.spec,
        "left": one.label in found.left,
        "passes": recommend_words.passes_words(one.cost.passes),
        "seconds": format_seconds(one.cost.seconds),
        "beaten_by": ", ".join(one.beaten_by),
        "numbers": [_number(one, str(metric["spec"])) for metric in found.metrics],
    }


def _number(one: Standing, spec: str) -> dict[str, Any]:
    cell = one.cells.get(spec, {})
    if not cell.get("n"):
        return {"mean": "–", "bounds": "", "above": False, "n": 0}
    return {
        "mean": format_number(cell["mean"]),
        "bounds": f"{format_number(cell['low'])} to {format_number(cell['high'])}",
        "above": spec in one.above,
        "n": cell["n"],
    }
