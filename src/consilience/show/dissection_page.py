"""From a dissection, or two, to a page: what the templates are given.

One file that loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from markupsafe import Markup

from consilience.files import file_stem, write_atomically
from consilience.progress import printable
from consilience.show import charts, words
from consilience.show.figures import figure_svg
from consilience.show.html import REPORT, environment, page_style, part

MAX_ROWS = 4000
"""So many units are in the table of all units; the files beside the page hold every
one.
"""
MAX_HURT = 40
MAX_CONCEPTS = 2000
CLOUD = 60
HEAT = 20

UnitRow = Mapping[Any, Any]


class Tables(Protocol):
    """What is read of a dissection: its tables."""

    def summary(self) -> pd.DataFrame:
        """A row a layer."""

    def concept_table(self) -> pd.DataFrame:
        """A row a concept."""


class Dissected(Protocol):
    """What is read of a dissection's run."""

    @property
    def folder(self) -> Path:
        """Where the page goes, and where ``tiles`` are."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What was asked and what ran."""

    @property
    def dissection(self) -> Any:
        """The dissection: `Tables`, ``facts``, ``threshold``, ``level``, ``random``."""

    @property
    def units(self) -> pd.DataFrame:
        """A row a unit, with its word where it has one."""

    @property
    def knockout(self) -> pd.DataFrame | None:
        """What knocking units out costs."""

    @property
    def hurt(self) -> pd.DataFrame | None:
        """Classes that lose most."""


def write_dissection_report(run: Dissected) -> Path:
    """Write ``report.html`` into the dissection's folder, whole or not at all; returns
    its path.
    """
    path = run.folder / REPORT
    text = dissection_page(run).encode("utf-8")
    write_atomically(path, lambda file: file.write(text))
    return path


def dissection_page(run: Dissected) -> str:
    """A dissection as one HTML document."""
    return (
        environment()
        .get_template("dissection.html.j2")
        .render(dissection_context(run))
    )


# ---- a dissection


def dissection_context(run: Dissected) -> dict[str, Any]:
    """Everything the template shows, in the order of the page."""
    rows = run.units.to_dict("records")
    lost = (
        {} if run.knockout is None or run.knockout.empty else _by_unit(run.knockout)
    )
    summary = run.dissection.summary().to_dict("records")
    found = run.dissection
    has_null = any(not words.missing(row["p"]) for row in rows)
    return {
        "manifest": run.manifest,
        **_style_and_script(),
        "asked": dissection_terms(run),
        "leads": [
            words.dissection_headline(run.manifest["counts"][name])
            for name in run.manifest["layers"]
        ],
        "notes": notes(run),
        "tone": _tone(summary, has_null),
        "has_null": has_null,
        "summary": summary,
        "categories": [str(name) for name in getattr(found, "categories", ())],
        "plot": _by_category(summary, getattr(found, "categories", ())),
        "cards": cards(run, rows, lost),
        "shown": run.manifest["tiles"],
        "layers": run.manifest["layers"],
        "card_categories": sorted(
            {str(row["category"]) for row in rows if row["category"]}
        ),
        "rows": sorted(rows, key=lambda row: -_number(row["iou"]))[:MAX_ROWS],
        "row_count": len(rows),
        "has_words": "word" in run.units,
        "concepts": found.concept_table().to_dict("records")[:MAX_CONCEPTS],
        "knockout": knockouts(run),
        "random": None
        if getattr(found, "random", None) is None
        else found.random.summary().to_dict("records"),
        "threshold": found.threshold,
        "level": found.level,
    }


def _tone(summary: Sequence[UnitRow], has_null: bool) -> str:
    """Of the verdict: whether any unit is significant, where there is a null that could
    tell.
    """
    return (
        "open"
        if not has_null
        else "better"
        if any(row["significant"] for row in summary)
        else "even"
    )


def _style_and_script() -> dict[str, Any]:
    script = part("report.js") + part("dissection.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = page_style() + part("viewer.css") + part("dissection.css")
    return {"style": Markup(style), "script": Markup(script), "script_digest": digest}


def _by_unit(table: pd.DataFrame) -> dict[tuple[str, int], UnitRow]:
    return {
        (str(row["layer"]), int(row["unit"])): row for row in table.to_dict("records")
    }


def _number(value: Any) -> float:
    return 0.0 if words.missing(value) else float(value)


def dissection_terms(run: Dissected) -> list[tuple[str, str]]:
    """What was asked, as terms and words."""
    manifest, facts = run.manifest, dict(run.dissection.facts)
    model, concepts = manifest["model"], manifest["concepts"]
    named, knocked = manifest.get("words"), manifest.get("knockout")
    terms = [
        (
            "Model",
            f"{model['spec'] or model['id']} ({model['classes_count']:,} classes)",
        ),
        (
            "Weights",
            f"{(model.get('facts') or {}).get('weights') or 'not recorded'}, {model['id']}",
        ),
        (
            "Concepts",
            f"{concepts['spec']}: {words.count_of(concepts['images'], 'image')}",
        ),
        ("Layers", ", ".join(manifest["layers"])),
        ("View", words.view_words(facts.get("view"))),
        ("Unit masks", _masks_said(facts)),
        ("Union", str(facts.get("union", ""))),
        (
            "Null",
            f"{facts['permutations']:,} permutations of the images' labels"
            if facts.get("permutations")
            else "none",
        ),
        (
            "Words",
            f"{named['words']:,} by {named['similarity']}, "
            f"{named['encoder'] or 'an unnamed encoder'}"
            if named
            else "",
        ),
        (
            "Knocked out",
            f"{knocked['units']:,} units over {words.count_of(knocked['images'], 'image')}"
            if knocked
            else "",
        ),
        (
            "Made",
            f"{words.format_date(manifest.get('created', ''))}, in "
            f"{words.format_seconds(manifest.get('seconds'))}",
        ),
        ("Library", f"consilience {manifest.get('version', '')}"),
    ]
    return [(term, printable(said)) for term, said in terms if said]


def _masks_said(facts: Mapping[str, Any]) -> str:
    quantile = facts.get("quantile")
    return (
        f"above the {quantile:g} quantile of each unit, {facts.get('upsample', '')}"
        if quantile
        else ""
    )


def notes(run: Dissected) -> list[str]:
    """What a reader should know before believing the numbers."""
    said = []
    table = run.dissection.concept_table()
    unable = table[table["why"].astype(str) != ""]
    if len(unable):
        said.append(
            f"{len(unable)} of {len(table)} concepts were not tried or can never be detected; "
            f"the table of concepts says why."
        )
    if (run.manifest.get("words") or {}).get("unnamed"):
        said.append(
            f"{run.manifest['words']['unnamed']} units say the same of every probe image and "
            f"have no word."
        )
    left = (run.manifest.get("knockout") or {}).get("left_out")
    if left:
        said.append(f"{left} units of lower IoU were not knocked out.")
    return said


def _by_category(
    summary: Sequence[UnitRow], categories: Sequence[str]
) -> Markup | None:
    """Detectors by category, a bar for each of the first two layers; more layers are in
    the table.
    """
    if not summary or not categories:
        return None
    series = [
        (
            f"detectors in {row['layer']}",
            [float(row.get(name, 0)) for name in categories],
        )
        for row in summary[:2]
    ]
    return figure_svg(
        charts.bars_figure(
            [str(name) for name in categories], series, "detectors by category"
        )
    )


@dataclass(frozen=True, eq=False)
class Card:
    """A unit as it is shown in the grid."""

    row: UnitRow
    uri: str
    alt: str
    status: str
    text: str
    others: str
    lost: UnitRow | None


def cards(
    run: Dissected, rows: Sequence[UnitRow], lost: Mapping[tuple[str, int], UnitRow]
) -> Iterator[Card]:
    """The units that have a strip of images, the highest IoU first; one at a time."""
    for row in sorted(rows, key=lambda row: -_number(row["iou"])):
        path = (
            run.folder
            / "tiles"
            / file_stem(str(row["layer"]))
            / f"{row['unit']}.webp"
        )
        if path.is_file():
            yield _card(row, path, lost.get((str(row["layer"]), int(row["unit"]))))


def _card(row: UnitRow, path: Path, lost: UnitRow | None) -> Card:
    uri = "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
    named = [
        row.get(key) for key in ("concept", "category", "word", "runner_up", "layer")
    ]
    text = " ".join(
        [str(part) for part in named if isinstance(part, str)]
        + [f"unit {row['unit']}"]
    ).lower()
    status = " ".join(name for name in ("detector", "significant") if bool(row[name]))
    others = [
        name
        for name in str(row.get("alternatives") or "").split("; ")
        if name not in ("", row["concept"])
    ]
    alt = f"the images on which unit {row['unit']} of {row['layer']} is highest, cut by its mask"
    return Card(row, uri, alt, status or "neither", text, "; ".join(others), lost)


def knockouts(run: Dissected) -> dict[str, Any] | None:
    """Units by what knocking them out costs, with the classes that lose most; verdicts
    of those whose concept has classes.
    """
    if run.knockout is None or run.knockout.empty:
        return None
    table = run.knockout.sort_values("lost", ascending=False, kind="stable")
    hurt: dict[tuple[str, int], list[UnitRow]] = {}
    for row in run.hurt.to_dict("records") if run.hurt is not None else []:
        hurt.setdefault((str(row["layer"]), int(row["unit"])), []).append(row)
    rows = [
        {**row, "hurt": hurt.get((str(row["layer"]), int(row["unit"])), [])}
        for row in table.to_dict("records")
    ]
    tested = [row for row in rows if row["classes"]]
    sure = [
        row
        for row in tested
        if not words.missing(row["p_holm"]) and row["p_holm"] <= 0.05
    ]
    return {
        "rows": rows[:MAX_HURT],
        "count": len(rows),
        "tested": len(tested),
        "sure": sure,
        "matched": _matched(tested),
    }


def _matched(rows: Sequence[UnitRow]) -> list[str]:
    return list(dict.fromkeys(str(row["matched"]) for row in rows))


# ---- a comparison


class Compared(Protocol):
    """What is read of a comparison."""

    a: Any
    b: Any

    def jaccard(self) -> pd.DataFrame:
        """A row a pair of layers."""

    def headline(self) -> str:
        """The comparison in a sentence."""


def comparison_page(
    compared: Any,
    title: str,
    about: Sequence[tuple[str, str]],
    version: str,
    command: str = "",
) -> str:
    """Two dissections compared as one HTML document."""
    given = comparison_context(compared, title, about, version, command)
    return environment().get_template("comparison.html.j2").render(given)


def comparison_context(
    compared: Any,
    title: str,
    about: Sequence[tuple[str, str]],
    version: str,
    command: str,
) -> dict[str, Any]:
    """Everything the comparison's template shows."""
    concepts = compared.concepts()
    return {
        "title": title,
        "version": version,
        "command": command,
        **_style_and_script(),
        "asked": [(term, printable(said)) for term, said in about],
        "a": compared.a.name,
        "b": compared.b.name,
        "headline": compared.headline(),
        "jaccard": compared.jaccard().to_dict("records"),
        "plots": list(plots(compared)),
        "layers": compared.layers().to_dict("records"),
        "concepts": concepts.to_dict("records")[:MAX_CONCEPTS],
        "concept_count": len(concepts),
    }


def plots(compared: Any) -> Iterator[tuple[str, Markup]]:
    """Headings and plots, each labelled from the tables it shows."""
    a, b = compared.a.name, compared.b.name
    concepts = compared.concepts()
    where = concepts["where"].value_counts()
    counts = [int(where.get(key, 0)) for key in ("a", "both", "b")]
    yield "Shared and own concepts", figure_svg(charts.venn_figure(a, b, *counts))
    yield from _bars_of(compared, a, b)
    heat = compared.by_layer(HEAT)
    if len(heat):
        columns = [(str(side), str(layer)) for side, layer in heat.columns]
        title = f"units that detect each of the {len(heat)} most frequent concepts, by model and layer"
        plot = figure_svg(
            charts.heat_figure(
                list(heat.index), columns, heat.to_numpy().tolist(), title
            )
        )
        yield f"The {len(heat)} most frequent concepts by layer (units)", plot
    for name, key, colour in ((a, "units_a", charts.A), (b, "units_b", charts.B)):
        weights = [
            (str(row["concept"]), float(row[key]))
            for row in concepts.to_dict("records")
            if row[key]
        ][:CLOUD]
        if weights:
            yield (
                f"Concepts of {name}, the larger the more units",
                figure_svg(charts.cloud_figure(name, weights, colour)),
            )


def _in_doubling_bins(
    often: pd.DataFrame,
) -> tuple[list[str], tuple[list[float], list[float]]]:
    """Numbers of units as 1, 2, 3-4, 5-8, ...

    with the concepts of each side in them.
    """
    bins = [math.ceil(math.log2(number)) for number in often["units"]]
    labels = [_bin_label(place) for place in range(max(bins) + 1)]
    counts: tuple[list[float], list[float]] = (
        [0.0] * len(labels),
        [0.0] * len(labels),
    )
    for place, a, b in zip(
        bins, often["concepts_a"], often["concepts_b"], strict=True
    ):
        counts[0][place] += a
        counts[1][place] += b
    return labels, counts


def _bin_label(place: int) -> str:
    low, high = 2 ** (place - 1) + 1 if place > 1 else place + 1, 2**place
    return (
        f"{high} unit{'' if high == 1 else 's'}"
        if low == high
        else f"{low}–{high} units"
    )


def _bars_of(compared: Any, a: str, b: str) -> Iterator[tuple[str, Markup]]:
    """Bars: units by category, how many units a concept has, labelled share and mean
    score by layer.
    """
    categories = compared.categories()
    if len(categories):
        series = [(a, list(categories["units_a"])), (b, list(categories["units_b"]))]
        yield (
            "Units by category",
            figure_svg(
                charts.bars_figure(
                    list(categories["category"]), series, "units by category"
                )
            ),
        )
    often = compared.frequencies()
    if len(often):
        labels, counts = _in_doubling_bins(often)
        series = list(zip((a, b), counts, strict=True))
        yield (
            "How many units a concept has (number of concepts)",
            figure_svg(
                charts.bars_figure(labels, series, "concepts by number of units")
            ),
        )
    rows = compared.layers().to_dict("records")
    labels = list(dict.fromkeys(row["layer"] for row in rows))
    shown = (
        ("Unique concepts by layer", "unique", 0),
        ("Mean score of labelled units by layer", "mean_score", 3),
    )
    for heading, key, digits in shown:
        known = {(row["side"], row["layer"]): float(row[key]) for row in rows}
        series = [
            (name, [known.get((name, label), math.nan) for label in labels])
            for name in (a, b)
        ]
        yield heading, figure_svg(charts.bars_figure(labels, series, heading, digits))
