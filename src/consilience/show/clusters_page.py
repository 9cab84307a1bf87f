"""The page of groups among explanations: one class after the other, a group a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from consilience.diagnosis.clusters import (
    NO_CONCEPT,
    Cluster,
    Clusters,
    accuracy_interval,
)
from consilience.show.colours import overlay
from consilience.show.figures import shown_image
from consilience.show.html import embed, environment, page_style
from consilience.show.tiles import Tile
from consilience.show.words import format_percent
from consilience.types import Array, ConsilienceError, Explanation

Key = tuple[str, str]
CELL = 12
MOST_CONCEPTS = 8


def clusters_page(
    found: Mapping[Key, Clusters],
    typical: Mapping[Key, Sequence[Sequence[Explanation]]],
    version: str,
    command: str = "",
) -> str:
    """One HTML document that loads nothing from anywhere."""
    classes = [
        {
            "anchor": f"class-{place}",
            "column": key[0],
            "name": key[1],
            "said": one.sentence(),
            "count": one.count,
            "groups": [
                _group(number, cluster, typical[key][number - 1])
                for number, cluster in enumerate(one.clusters, start=1)
            ],
        }
        for place, (key, one) in enumerate(found.items())
    ]
    classes.sort(key=lambda one: -int(str(one["count"])))
    return (
        environment()
        .get_template("clusters.html.j2")
        .render(
            version=version,
            command=command,
            style=Markup(page_style()),
            classes=classes,
            several=sum(one.count > 1 for one in found.values()),
        )
    )


def _group(
    number: int, one: Cluster, typical: Sequence[Explanation]
) -> dict[str, Any]:
    tiles = [_map_tile(one.mean, "mean map")]
    if one.shown.any():
        tiles.append(
            _map_tile(np.where(one.shown, one.apart, 0), "what sets it apart")
        )
    tiles += [_typical_tile(item) for item in typical]
    share = accuracy_interval(one)
    return {
        "number": number,
        "images": len(one.members),
        "stability": one.stability,
        "dissected": bool(one.concepts),
        "accuracy": share.mean,
        "low": share.low,
        "high": share.high,
        "known": one.known,
        "tiles": tiles,
        "concepts": _concepts(one),
    }


def _concepts(one: Cluster) -> list[str]:
    """What carries the maps of a group, in words: what sets it apart, or without other
    groups the largest shares.
    """
    alone = all(math.isnan(share.elsewhere) for share in one.concepts)
    if alone:
        return [
            f"{share.concept or NO_CONCEPT} {format_percent(share.here)}"
            for share in one.concepts[:MOST_CONCEPTS]
        ]
    return [
        f"{share.concept or NO_CONCEPT} {format_percent(share.here)} (others "
        f"{format_percent(share.elsewhere)})"
        for share in one.apart_by()[:MOST_CONCEPTS]
    ]


def _typical_tile(item: Explanation) -> Any:
    """An image with its map; the map alone where the run did not keep the image."""
    name = item.sample.name
    try:
        under = shown_image(item)
    except ConsilienceError:
        return _map_tile(item.values, f"{name} (image not kept)", 1)
    drawn = overlay(under, item.values)
    return embed(Tile(drawn, name, f"{name}: the map over the image"), {})


def _map_tile(values: Array, title: str, cell: int = CELL) -> Any:
    """A map of cells in the colours of maps, on white."""
    large = values.repeat(cell, axis=0).repeat(cell, axis=1)
    white = np.full((*large.shape, 3), 255, np.uint8)
    return embed(Tile(overlay(white, large), title, title), {})
