"""Groups among the explanations of a run, class by class, in a folder with a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from consilience import progress, registry
from consilience.diagnosis.clusters import FEWEST, MOST, NULLS, Clusters, clusters_of
from consilience.files import json_ready, spreadsheet_safe, write_bytes
from consilience.runs.folder import REPORT, Run, RunFolder
from consilience.types import ConsilienceError, Explanation

Key = tuple[str, str]
"""A column of the run and a class."""


def clusters(
    run: Any,
    column: str | None = None,
    class_name: str | None = None,
    most: int = MOST,
    nulls: int = NULLS,
    seed: int = 0,
) -> dict[Key, Clusters]:
    """Groups among the explanations of each class, by column and class.

    ``run`` is a finished run or its folder, or explanations (those of one method and
    class are one column, called by the method). Classes of fewer than eight images are
    left out; ``column`` and ``class_name`` ask for one. What is held in memory are the
    maps of one class. Raises `ConsilienceError` where nothing is left.
    """
    finished = Run(run) if isinstance(run, str | Path) else run
    asked = _asked(_keys(finished), column, class_name)
    found: dict[Key, Clusters] = {}
    with progress.task("looking for groups", len(asked)) as running:
        for key, places in asked.items():
            made = [finished[place] for place in places]
            found[key] = clusters_of(made, most, nulls, seed)
            running.advance()
    return found


def _keys(run: Any) -> dict[Key, list[Any]]:
    """By column and class, where their explanations are."""
    found: dict[Key, list[Any]] = {}
    if isinstance(run, Run):
        for row in run.table().to_dict("records"):
            key = (str(row["column"]), str(row["target_name"]))
            found.setdefault(key, []).append((row["sample"], row["column"]))
        return found
    for place, one in enumerate(run):
        found.setdefault((one.explainer, one.target.name), []).append(place)
    return found


def _asked(
    keys: dict[Key, list[Any]], column: str | None, class_name: str | None
) -> dict[Key, list[Any]]:
    for what, given, place in (("column", column, 0), ("class", class_name, 1)):
        there = list(dict.fromkeys(key[place] for key in keys))
        if given is not None and given not in there:
            raise ConsilienceError(registry.unknown(what, given, there, limit=12))
    wanted = {
        key: places
        for key, places in keys.items()
        if column in (None, key[0]) and class_name in (None, key[1])
    }
    enough = {key: places for key, places in wanted.items() if len(places) >= FEWEST}
    if not enough:
        most = max(map(len, wanted.values()), default=0)
        raise ConsilienceError(
            f"groups are looked for in classes of {FEWEST} images or more; the largest "
            f"has {most}. Explain more images of a class, or one class for all "
            f"(--target CLASS)"
        )
    return enough


def run_clusters(
    run: str | Path,
    folder: str | Path,
    column: str | None = None,
    class_name: str | None = None,
    most: int = MOST,
    seed: int = 0,
    command: str = "",
) -> tuple[dict[Key, Clusters], Path]:
    """`clusters` of a run into a folder: ``clusters.json``, who is where
    (``clusters.csv``), and a page to walk through, which is returned last.
    """
    from consilience.show.clusters_page import clusters_page

    finished = Run(run)
    place = RunFolder(
        folder,
        "clusters",
        {
            "run digest": finished.manifest["job"],
            "column": column,
            "class": class_name,
            "most": most,
            "seed": seed,
            "version": version("consilience"),
        },
        {"command": command},
    )
    with place.locked():
        found = clusters(finished, column, class_name, most, seed=seed)
        rows = [row for key, one in found.items() for row in _members(key, one)]
        text = spreadsheet_safe(pd.DataFrame(rows)).to_csv(index=False)
        write_bytes(place.path / "clusters.csv", text.encode())
        page = place.path / REPORT
        text = clusters_page(
            found, _shown(finished, found), version("consilience"), command
        )
        write_bytes(page, text.encode())
        place.finish({"command": command, **as_dict(found)})
    return found, page


def _members(key: Key, one: Clusters) -> Iterable[dict[str, Any]]:
    for name, label in zip(one.images, one.labels, strict=True):
        yield {"column": key[0], "class": key[1], "image": name, "cluster": label + 1}


def _shown(
    run: Run, found: dict[Key, Clusters]
) -> dict[Key, list[list[Explanation]]]:
    """By column and class, the typical explanations of each cluster."""
    return {
        key: [
            [run[(one.images[at], key[0])] for at in cluster.typical]
            for cluster in one.clusters
        ]
        for key, one in found.items()
    }


def as_dict(found: dict[Key, Clusters]) -> dict[str, Any]:
    """What was found as plain data, a row a class."""
    told: dict[str, Any] = json_ready(
        {
            "groups": [
                {
                    "column": column,
                    "class": name,
                    "said": one.sentence(),
                    "images": len(one.images),
                    "count": one.count,
                    "silhouette": one.silhouette,
                    "by_chance": one.by_chance,
                    "p_silhouette": one.p_silhouette,
                    "p_dip": one.p_dip,
                    "agreement": one.agreement,
                    "clusters": one.table().to_dict("records"),
                }
                for (column, name), one in found.items()
            ]
        }
    )
    return told


__all__: Sequence[str] = ("as_dict", "clusters", "run_clusters")
