"""Two dissections on disk compared, as a folder of tables and one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from consilience.dissection import compare as comparing
from consilience.dissection.compare import ComparedSide, Comparison, Which
from consilience.files import json_ready, write_bytes
from consilience.runs.dissect import DissectionRun
from consilience.runs.folder import REPORT, RunFolder
from consilience.show import dissection_page as page
from consilience.types import ConsilienceError


@dataclass(frozen=True, eq=False)
class Chosen:
    """A run and the layers of it that are compared; none means all."""

    run: DissectionRun
    layers: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The model's name without its digest."""
        return str(self.run.manifest["model"]["id"]).partition("@")[0]


def choose(spec: str) -> Chosen:
    """``RUN`` or ``RUN:LAYER+LAYER``; raises `ConsilienceError` with what there is
    where it is not a finished dissection.
    """
    if Path(spec).is_dir() or ":" not in spec:
        return Chosen(DissectionRun(spec))
    folder, _, layers = spec.rpartition(":")
    return Chosen(
        DissectionRun(folder), tuple(part for part in layers.split("+") if part)
    )


def side_names(a: Chosen, b: Chosen) -> tuple[str, str]:
    """What the two are called: by their models, else by what tells them apart: layers,
    weights, folders.
    """
    ways: tuple[Callable[[Chosen], str], ...] = (
        lambda one: one.model,
        lambda one: (
            f"{one.model} {'+'.join(one.layers)}" if one.layers else one.model
        ),
        lambda one: (
            f"{one.model} ({(one.run.manifest['model'].get('facts') or {}).get('weights')})"
        ),
        lambda one: f"{one.model} ({one.run.folder.name})",
        lambda one: f"{one.model} ({one.run.folder.resolve()})",
    )
    found = next(((way(a), way(b)) for way in ways if way(a) != way(b)), None)
    if found is None:
        raise ConsilienceError(
            f"{a.run.folder} would be compared with itself; name two runs, or RUN:LAYER twice"
        )
    return found


def compare_chosen(
    a: Chosen, b: Chosen, which: Which = "detector", by_words: bool = False
) -> Comparison:
    """The comparison of two chosen sides, by concepts or by CLIP-Dissect's words."""
    first, second = side_names(a, b)
    sides = (_side(a, first, which, by_words), _side(b, second, which, by_words))
    return comparing.compare_sides(*sides)


def _side(chosen: Chosen, name: str, which: Which, by_words: bool) -> ComparedSide:
    run = chosen.run
    if not by_words:
        table = run.dissection.table()
        if which == "significant" and table["p"].isna().all():
            raise ConsilienceError(
                f"{run.folder} was dissected without a null: nothing in it is known to be "
                f"significant"
            )
        made = comparing.side(name, table, run.dissection.concept_table(), which)
    elif run.words is None:
        raise ConsilienceError(
            f"{run.folder} has no words; dissect with --words FILE"
        )
    else:
        made = comparing.side_of_words(name, run.words)
    return made.only(chosen.layers) if chosen.layers else made


def compare_runs(
    a: str,
    b: str,
    folder: str | Path,
    which: Which = "detector",
    by_words: bool = False,
    command: str = "",
) -> tuple[Comparison, Path]:
    """Compare two runs (`choose`) into ``folder``: tables as CSV, ``comparison.json``,
    and the page, which is returned last.
    """
    chosen = (choose(a), choose(b))
    compared = compare_chosen(*chosen, which, by_words)
    sides = [_content(one) for one in chosen]
    claimed = RunFolder(
        folder,
        "comparison",
        {
            "first": sides[0],
            "second": sides[1],
            "counted": which,
            "words": by_words,
            "version": version("consilience"),
        },
        {"command": command},
    )
    place = claimed.path
    tables = {
        "jaccard": compared.jaccard(),
        "concepts": compared.concepts(),
        "layers": compared.layers(),
        "categories": compared.categories(),
    }
    for name, table in tables.items():
        _write_csv(place / f"{name}.csv", table)
    about = _about(chosen, compared, which, by_words)
    text = page.comparison_page(
        compared,
        f"{compared.a.name} and {compared.b.name}",
        about,
        version("consilience"),
        command,
    )
    write_bytes(place / REPORT, text.encode())
    claimed.finish(as_dict(compared) | {"command": command, "about": dict(about)})
    return compared, place / REPORT


def _content(chosen: Chosen) -> dict[str, Any]:
    """A side as part of a job: the job of its dissection, and its layers."""
    return {
        "dissection digest": chosen.run.manifest["job"],
        "layers": list(chosen.layers),
    }


def as_dict(compared: Comparison) -> dict[str, object]:
    """A comparison as plain data."""
    said: dict[str, object] = {
        "a": compared.a.name,
        "b": compared.b.name,
        "headline": compared.headline(),
    }
    said["jaccard"] = json_ready(compared.jaccard().to_dict("records"))
    said["concepts"] = json_ready(compared.concepts().to_dict("records"))
    return said


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_bytes(path, table.to_csv(index=False).encode())


def _about(
    chosen: Sequence[Chosen], compared: Comparison, which: Which, by_words: bool
) -> list[tuple[str, str]]:
    """What was compared, as terms and words; sets of concepts that differ are said,
    since they alone make a difference.
    """
    about = []
    for one, name in zip(chosen, (compared.a.name, compared.b.name), strict=True):
        manifest = one.run.manifest
        layers = ", ".join(one.layers or manifest["layers"])
        about.append(
            (name, f"{manifest['model']['id']}, layers {layers}, in {one.run.folder}")
        )
    ids = [one.run.manifest["concepts"]["id"] for one in chosen]
    about.append(
        (
            "Concepts",
            ids[0] if ids[0] == ids[1] else f"not the same: {ids[0]} and {ids[1]}",
        )
    )
    counted = {
        "detector": "units over the threshold",
        "significant": "significant units",
    }[which]
    about.append(("Counted", "words of CLIP-Dissect" if by_words else counted))
    return about


__all__ = ["Chosen", "choose", "compare_chosen", "compare_runs"]
