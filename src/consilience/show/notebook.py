"""Explanations in a notebook: a page of their own that can be cut, laid over each other and
read, and a widget whose slider Python can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from consilience.agreement.masks import Mask, build_cutter
from consilience.agreement.overlap import excess, expected_iou, iou
from consilience.explanations import KeptExplanation
from consilience.registry import explainers
from consilience.show import figures, html
from consilience.show.tiles import Tile, map_tile
from consilience.types import ConsilienceError, Explanation, NotApplicable

MOST = 60
"""So many maps are shown at most: a notebook keeps what it shows."""
HEIGHT = 900


class Shown:
    """What `show` makes: a notebook displays it; ``html`` is the page as text."""

    def __init__(self, made: Sequence[Explanation]) -> None:
        self._made = tuple(made)

    @property
    def html(self) -> str:
        """One HTML document that loads nothing from anywhere."""
        return page_of(self._made)

    def _repr_html_(self) -> str:
        inside = escape(self.html)
        return (
            f'<iframe srcdoc="{inside}" title="explanations" '
            f'style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"<{len(self._made)} explanations; a notebook shows them>"


def show(*made: Any) -> Shown:
    """Explanations side by side, to be cut, laid over each other and read in a notebook.

    ``made`` are `Explanation`s, or sequences of them (`Explanations`, a `Run`, a list);
    those of one image stand in one row. Raises `ConsilienceError` for anything else and
    for more than 60 maps.
    """
    return Shown(_flat(made))


def slider(*made: Any) -> Any:
    """A widget with the maps of one image and a slider for the cut (extra ``notebook``).

    Its traits are read and set from Python: ``level`` (per cent of the frame), ``cut``
    (``run``, ``area`` or ``share``), ``a`` and ``b`` (places of the two that are
    compared), ``iou``, ``expected`` and ``excess`` of these two masks. Raises
    `ConsilienceError` where anywidget is not installed, and for maps of several images.
    """
    flat = _flat(made)
    if len({one.sample.digest for one in flat}) > 1:
        raise ConsilienceError("the slider is of one image; show takes several")
    try:
        import anywidget  # noqa: F401
    except ImportError:
        raise ConsilienceError(
            "the slider needs anywidget; install it with: pip install 'consilience[notebook]'"
        ) from None
    from consilience.show.widget import Slider

    return Slider(tiles=_tiles(flat))


def _flat(made: Iterable[Any]) -> list[Explanation]:
    flat: list[Explanation] = []
    for one in made:
        if isinstance(one, Explanation):
            flat.append(one)
        elif isinstance(one, Iterable) and not isinstance(one, str | bytes):
            flat += _flat(one)
        else:
            raise ConsilienceError(
                f"show takes explanations; got {type(one).__name__}"
            )
        if len(flat) > MOST:
            raise ConsilienceError(
                f"show takes up to {MOST} maps; a run of more has a report"
            )
    if not flat:
        raise ConsilienceError("there is no explanation to show")
    return flat


def _labels(made: Sequence[Explanation]) -> list[str]:
    """Titles that tell the maps of an image apart: the method's name where that does, else
    as it was spelled, with the class where that differs.
    """
    names = [_title(one) for one in made]
    if len(set(names)) < len(names):
        names = [one.explainer for one in made]
    if len(set(names)) < len(names):
        names = [
            f"{name}, {one.target.name}"
            for name, one in zip(names, made, strict=True)
        ]
    return [
        name if names.count(name) == 1 else f"{name} #{place}"
        for place, name in enumerate(names, 1)
    ]


def _title(made: Explanation) -> str:
    try:
        cls = explainers.get(made.name)
    except ConsilienceError:  # a map that was made elsewhere
        return made.name
    return str(getattr(cls, "label", made.name))


def _item(label: str, made: Explanation) -> KeptExplanation:
    try:
        cut = build_cutter(None, made).cut(made)
    except NotApplicable as reason:
        cut = Mask(np.zeros(made.values.shape, bool), "none", note=str(reason))
    return KeptExplanation(label, made, cut)


def _tiles(made: Sequence[Explanation], labels: Sequence[str] = ()) -> str:
    base = figures.shown_image(made[0])
    shown = Tile(base, "image", f"{made[0].sample.name}, as the model saw it")
    tiles = [html.tile_html(html.embed(shown, {}))]
    own = _labels(made)
    for place, (label, one) in enumerate(zip(own, made, strict=True)):
        item = _item(label, one)
        column = list(labels).index(label) if labels else place
        tile = replace(
            html.embed(map_tile(base, item), {}),
            column=column,
            data=html.viewer_data(item),
        )
        tiles.append(html.tile_html(tile))
    return "".join(tiles)


def page_of(made: Sequence[Explanation]) -> str:
    """Explanations as one HTML document, those of an image in one row."""
    images: dict[str, list[Explanation]] = {}
    for one in made:
        images.setdefault(f"{one.sample.name}\0{one.sample.digest}", []).append(one)
    columns = list(
        dict.fromkeys(label for of in images.values() for label in _labels(of))
    )
    shown = [
        {
            "name": of[0].sample.name,
            "said": of[0].provenance.get("prediction") or {},
            "tiles": Markup(_tiles(of, columns)),
            "numbers": json.dumps(_numbers(of, columns)),
        }
        for of in images.values()
    ]
    viewer = {
        "columns": columns,
        "numbers": [
            ("probability", "probability"),
            ("iou", "IoU"),
            ("excess", "excess"),
        ],
        "many": len(shown) > 1,
        "truth": False,
    }
    script = html.part("viewer.js") + html.part("gallery.js")
    return (
        html.environment()
        .get_template("notebook.html.j2")
        .render(
            images=shown,
            viewer=viewer,
            style=_style(),
            ramps=html.ramps(),
            script=Markup(script),
            script_digest=html.digest_of(script),
        )
    )


def _style() -> Markup:
    return Markup(html.page_style() + html.part("viewer.css") + html.ramp_styles())


def _numbers(made: Sequence[Explanation], columns: Sequence[str]) -> dict[str, Any]:
    """What images are ordered by: the probability, and IoU and excess of every pair."""
    items = [
        _item(label, one) for label, one in zip(_labels(made), made, strict=True)
    ]
    pairs = {}
    for a, b in combinations(items, 2):
        if a.mask.shape != b.mask.shape:
            continue
        places = sorted((columns.index(a.column), columns.index(b.column)))
        found = iou(a.mask, b.mask)
        chance = expected_iou(a.mask.size, int(a.mask.sum()), int(b.mask.sum()))
        if found == found and chance < 1:
            pairs["{}-{}".format(*places)] = {
                "iou": found,
                "excess": excess(found, chance),
            }
    said = (made[0].provenance.get("prediction") or {}).get("probability")
    facts: dict[str, Any] = {"pairs": pairs}
    if said is not None and said == said:
        facts["probability"] = said
    return facts
