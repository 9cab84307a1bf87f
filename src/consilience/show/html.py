"""From a run to its page: what the template is given, and how images are put into it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from consilience import images
from consilience.ahead import ahead
from consilience.files import write_atomically
from consilience.progress import printable
from consilience.show import citations, colours, levels, words
from consilience.show.tiles import Tile, certainty, tiles
from consilience.types import Array

REPORT = "report.html"
MAX_IMAGES = 200
"""So many images are shown; the tables hold all."""
MAX_MAPS = 320
"""Maps in all, of 1 to 130 kB each with their drawing: runs of many columns show fewer
images.
"""
MAX_PLOTS = 6
MAX_PAIR_TILES = 6
MOST_WRONG = 50
MOST_CONFUSIONS = 25
DRAWERS = 2
"""Threads that draw images for the page."""
TILE = 320
QUALITY = 85

PairMapping = Mapping[Any, Any]


class Reported(Protocol):
    """What is read of a run."""

    @property
    def folder(self) -> Path:
        """Where the report goes."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What was asked, what ran, what failed."""

    @property
    def samples(self) -> list[str]:
        """Names of the images, in order."""

    @property
    def predictions(self) -> dict[str, dict[str, Any]]:
        """By image ``label``, ``probability``, ``true`` and ``right``."""

    @property
    def explanations(self) -> pd.DataFrame:
        """A row an explanation."""

    @property
    def agreement(self) -> pd.DataFrame:
        """A row a pair and image."""

    @property
    def summary(self) -> pd.DataFrame:
        """A row a pair."""

    @property
    def audit(self) -> Sequence[Any]:
        """Findings: ``code``, ``severity``, ``message``, ``where``."""

    def load(self, name: str, /) -> Any:
        """The image and the explanations of a sample, as `render.Shown`."""


def write_report(run: Reported) -> Path:
    """Write ``report.html`` into the run's folder, whole or not at all; returns its
    path.
    """
    path = run.folder / REPORT
    text = report_page(run).encode("utf-8")
    write_atomically(path, lambda file: file.write(text))
    return path


def report_page(run: Reported) -> str:
    """The report as one HTML document that loads nothing from anywhere."""
    return environment().get_template("report.html.j2").render(report_context(run))


@cache
def environment() -> Environment:
    """The templates of every page, with the filters they use."""
    environment = Environment(
        loader=ChoiceLoader(
            [
                PackageLoader("consilience", "show/templates"),
                PackageLoader("consilience", "web/templates"),
            ]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "iou": words.format_share,
        "percent": words.format_percent,
        "p_value": words.format_p,
        "seconds": words.format_seconds,
        "date": words.format_date,
        "count": words.count_of,
    }
    environment.filters.update(filters)
    environment.filters["reason"] = lambda row: words.reason_sentence(
        row["code"], row["facts"]
    )
    environment.filters["measured"] = words.format_number
    environment.filters["visible"] = lambda text: printable(str(text))
    environment.filters["breakable"] = breakable
    environment.filters["loss"] = words.loss_clause
    return environment


def breakable(text: Any) -> Markup:
    """A name that a narrow page may break after its ``_``, ``-``, ``/`` and ``.``, and
    nowhere else while it fits.
    """
    return Markup(
        re.sub(r"([_/.-])(?=\w)", r"\1<wbr>", str(escape(printable(str(text)))))
    )


# ---- what the template is given


def report_context(run: Reported) -> dict[str, Any]:
    """Everything the template shows, in the order of the page."""
    rows = run.agreement.to_dict("records")
    summary = run.summary.to_dict("records")
    script = part("report.js") + part("viewer.js") + part("gallery.js")
    names = [str(column["name"]) for column in run.manifest["columns"]]
    return {
        "manifest": run.manifest,
        "style": Markup(page_style() + part("viewer.css") + ramp_styles()),
        "ramps": ramps(),
        "viewer": viewer(run, names),
        "script": Markup(script),
        "script_digest": digest_of(script),
        "asked": run_terms(run),
        "random_weights": random_weights(run.manifest),
        "evaluation": _evaluation(run),
        "answer": words.prediction_sentence(run.predictions)
        if run.predictions
        else "",
        "wrong": wrong(run),
        "most_wrong": MOST_WRONG,
        "confusion": words.confusion_rows(run.predictions)[:MOST_CONFUSIONS],
        "verdicts": verdicts(run, summary),
        "matrix": matrix(names, summary),
        "findings": by_kind(run.audit),
        "errors": sum(one.severity == "error" for one in run.audit),
        "failures": run.manifest.get("failures") or [],
        "drawn": (run.folder / "panels").is_dir(),
        "images": shown_images(run, rows),
        "image_count": len(run.samples),
        "shown_count": len(shown(run)),
        "columns": columns(run),
        "numbers": _wanted(rows[0]) if rows else TABLE_NUMBERS,
        "table": table(run, rows),
        "several": len(summary) > 1,
        "methods": methods(run, len(rows) > 0),
        "versions": sorted((run.manifest.get("versions") or {}).items()),
    }


def part(name: str) -> str:
    """A style sheet or script of the pages."""
    return (files("consilience") / "show" / "templates" / name).read_text(
        encoding="utf-8"
    )


def page_style() -> str:
    """The styles that every page has, with those of tiles."""
    return part("report.css") + part("tiles.css")


def digest_of(script: str) -> str:
    """A script's digest, as a page's policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def ramp_styles() -> str:
    """The two colour scales as CSS backgrounds, so that legends show what the maps are
    drawn with.
    """
    rule = ".ramp.{}{{background:linear-gradient(to right,{})}}"
    return (
        "\n".join(
            rule.format(name, ",".join(colours.colour_stops(name == "signed")))
            for name in ("plain", "signed")
        )
        + "\n"
    )


def ramps() -> Markup:
    """The two colour scales as JSON, for what is drawn in the browser."""
    return Markup(
        json.dumps(
            {
                "plain": colours.colour_stops(signed=False, count=65),
                "signed": colours.colour_stops(signed=True, count=65),
            }
        )
    )


def viewer(run: Reported, names: Sequence[str]) -> dict[str, Any]:
    """What the viewer of maps offers: the columns, the numbers to order images by,
    whether there are several and whether their true classes are known.
    """
    pairs = ORDERED_BY if len(run.agreement) else ()
    return {
        "columns": names,
        "numbers": [
            ("probability", "probability"),
            *((one.key, one.heading) for one in pairs),
        ],
        "many": len(run.samples) > 1,
        "truth": any(
            said.get("right") is not None for said in run.predictions.values()
        ),
    }


def run_terms(run: Reported) -> list[tuple[str, str]]:
    """What was asked, as terms and words: model, weights, images, target, view, engine,
    date, version.
    """
    manifest = run.manifest
    models = manifest.get("models") or [manifest["model"]]
    views = (
        [manifest["view"]]
        if "view" in manifest
        else list(dict.fromkeys(c.get("view") for c in manifest["columns"]))
    )
    terms = [
        (
            "Model",
            "; ".join(
                f"{one['spec'] or one['id']} ({one['classes_count']:,} classes)"
                for one in models
            ),
        ),
        (
            "Weights",
            "; ".join(
                f"{(one.get('facts') or {}).get('weights') or 'not recorded'}, {one['id']}"
                for one in models
            ),
        ),
        ("Explainers", ", ".join(column["name"] for column in manifest["columns"])),
        ("Explained", words.target_words(manifest.get("target", "predicted"))),
        ("View", "; ".join(words.view_words(mode) for mode in views)),
        ("Images", _how_many(run)),
        ("Engine", _engine(models[0].get("facts") or {})),
        ("Preset", manifest.get("preset") or ""),
        (
            "Made",
            f"{words.format_date(manifest.get('created', ''))}, in "
            f"{words.format_seconds(manifest.get('seconds'))}",
        ),
        ("Library", f"consilience {manifest.get('version', '')}"),
    ]
    return [(term, printable(said)) for term, said in terms if said]


def random_weights(manifest: Mapping[str, Any]) -> str:
    """The models of a run whose weights are random; nothing where none is."""
    models = manifest.get("models") or [manifest["model"]]
    return " and ".join(
        str(one["spec"] or one["id"])
        for one in models
        if str((one.get("facts") or {}).get("weights") or "").startswith("random")
    )


def _engine(facts: Mapping[str, Any]) -> str:
    """What ran, and what had to be decided or assumed."""
    said = ", ".join(
        str(facts[key]) for key in ("engine", "precision", "device") if facts.get(key)
    )
    notes = [str(facts[key]) for key in ("note", "assumed") if facts.get(key)]
    return f"{said} ({'; '.join(notes)})" if notes else said


def _how_many(run: Reported) -> str:
    failed = len(run.manifest.get("failures") or [])
    return words.count_of(len(run.samples), "image") + (
        f"; {failed:,} more failed" if failed else ""
    )


@dataclass(frozen=True, eq=False)
class Verdict:
    """One pair of explainers over all images, as it is shown."""

    row: PairMapping
    tone: str
    badge: str
    sentence: Markup
    why: str
    mismatch: str
    plot: Markup | None
    alt: str


def verdicts(run: Reported, summary: Sequence[PairMapping]) -> list[Verdict]:
    """A verdict a pair, in the order of the summary; the first pairs have their plot."""
    return [
        _verdict(run, row, len(summary), with_plot=number < MAX_PLOTS)
        for number, row in enumerate(summary)
    ]


def _verdict(run: Reported, row: PairMapping, pairs: int, with_plot: bool) -> Verdict:
    which = row["verdict"]
    pair = (str(row["a"]), str(row["b"]))
    plot = _plot(run, pair) if with_plot and row["n"] else None
    alt = f"IoU of {pair[0]} and {pair[1]} on each image against its chance level; the numbers are in the table of all pairs"
    why = "" if which == "untestable" else words.verdict_reason(row)
    return Verdict(
        row,
        tone(which, pair, run.audit),
        words.verdict_badge(which),
        words.verdict_sentence(row, pairs),
        why,
        str(row.get("mismatch") or ""),
        plot,
        alt,
    )


def _evaluation(run: Reported) -> dict[str, Any] | None:
    """What the template is given of an evaluation, which alone loads what draws it."""
    if not (run.folder / "evaluation.json").is_file():
        return None
    from consilience.show import evaluation_page

    return evaluation_page.evaluation_context(run.folder, anchors(run))


def methods(run: Reported, compared: bool) -> dict[str, str]:
    """The paragraph of a paper's methods, and its works as BibTeX."""
    explained = [
        str(column.get("full") or column["explainer"])
        for column in run.manifest["columns"]
    ]
    path = run.folder / "evaluation.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measured = [str(metric["spec"]) for metric in told.get("metrics", ())]
    version = str(run.manifest.get("version", ""))
    keys = citations.keys_of([*explained, *measured])
    return {
        "paragraph": citations.methods_paragraph(
            explained, measured, compared, version
        ),
        "bibtex": citations.bibtex([*keys, *(["holm1979"] if compared else [])]),
    }


def _plot(run: Reported, pair: tuple[str, str]) -> Markup:
    from consilience.show import figures  # draws, which takes a second to load

    return Markup(figures.agreement_plot(run.agreement, run.summary, pair))


def by_kind(findings: Sequence[Any]) -> list[list[Any]]:
    """Findings, the gravest first, those of one code together."""
    graded = sorted(
        findings, key=lambda one: ("error", "warning", "note").index(one.severity)
    )
    kinds: dict[tuple[str, str], list[Any]] = {}
    for one in graded:
        kinds.setdefault((one.severity, one.code), []).append(one)
    return list(kinds.values())


TONES = {
    "shown": "better",
    "not-shown": "even",
    "below": "worse",
    "untestable": "open",
}


def tone(which: str, pair: tuple[str, str], findings: Sequence[Any]) -> str:
    """Colour and icon of a verdict: no better than the heaviest finding on the two."""
    heaviest = {one.severity for one in findings if _is_about(one.where, pair)}
    if "error" in heaviest:
        return "worse"
    own = TONES[which]
    return "even" if own == "better" and "warning" in heaviest else own


def _is_about(where: str, pair: tuple[str, str]) -> bool:
    """Whether a finding is on the run as a whole, on one of the two, or on both."""
    named = where.split(" | ")
    return not where or where in pair or set(pair) <= set(named)


@dataclass(frozen=True)
class PairCell:
    """A cell of the matrix of explainers: what it is of, its number, and the pair it
    belongs to.
    """

    what: str
    value: Any
    mismatch: bool = False
    pair: str = ""


def matrix(
    names: Sequence[str], summary: Sequence[PairMapping]
) -> list[tuple[str, list[PairCell | None]]]:
    """Explainers against each other: mean IoU above the diagonal, mean excess below.

    Empty for fewer than three.
    """
    if len(names) < 3:
        return []
    known = {(row["a"], row["b"]): row for row in summary}
    return [
        (across, [_cell(known, names, i, j) for j in range(len(names))])
        for i, across in enumerate(names)
    ]


def _cell(
    known: Mapping[tuple[Any, Any], PairMapping], names: Sequence[str], i: int, j: int
) -> PairCell | None:
    row = known.get((names[i], names[j])) or known.get((names[j], names[i]))
    if i == j or row is None:
        return None
    key, what = ("iou_mean", "mean IoU") if i < j else ("excess_mean", "mean excess")
    pair = f"{min(i, j)}-{max(i, j)}"
    return PairCell(what, row.get(key), bool(row.get("mismatch")), pair)


# ---- numbers of a pair on an image


NUMBER_STYLES = {
    "iou": words.format_share,
    "percent": words.format_percent,
    "p_value": words.format_p,
    "seconds": words.format_seconds,
}
"""How a column of the table of pairs is written."""


@dataclass(frozen=True)
class Number:
    """A column of the table of pairs: its key, its heading, how it is written."""

    key: str
    heading: str
    style: str


TABLE_NUMBERS = (
    Number("iou", "IoU", "iou"),
    Number("expected_iou", "chance", "iou"),
    Number("excess", "excess", "iou"),
    Number("excess_of_possible", "of possible", "iou"),
    Number("p", "p", "p_value"),
    Number("spearman", "Spearman", "iou"),
    Number("iou_at_10", f"IoU at 10{words.NBSP}%", "iou"),
    Number("iou_at_20", f"at 20{words.NBSP}%", "iou"),
    Number("iou_at_30", f"at 30{words.NBSP}%", "iou"),
    Number("area_a", "area of first", "percent"),
    Number("area_b", "area of second", "percent"),
)
ORDERED_BY = TABLE_NUMBERS[:9]
"""Those that images are ordered and filtered by: all but the areas."""
PUBLISHED_COLUMN = Number("published_iou", "published IoU", "iou")


@dataclass(frozen=True)
class ShownNumber:
    """A number as it is shown: its text, the value to sort by, and where there is none
    the reason.
    """

    heading: str
    text: str
    value: float | None
    why: str = ""


@dataclass(frozen=True)
class PairRow:
    """A pair on an image: where it is on the page, its numbers, and why they should not
    be compared.
    """

    sample: str
    anchor: str
    a: str
    b: str
    numbers: tuple[ShownNumber, ...]
    mismatch: str


def table(run: Reported, rows: Sequence[PairMapping]) -> list[PairRow]:
    """All pairs of all images."""
    known = anchors(run)
    return [line(row, known.get(row["sample"], "")) for row in rows]


def anchors(run: Reported) -> dict[str, str]:
    """Where each image that is shown stands on the page."""
    return {name: f"image-{number}" for number, name in enumerate(shown(run), 1)}


def line(row: PairMapping, anchor: str) -> PairRow:
    """One row of the agreement as it is shown; the published value where the table has
    them.
    """
    numbers = tuple(_shown(row, number) for number in _wanted(row))
    return PairRow(
        str(row["sample"]),
        anchor,
        str(row["a"]),
        str(row["b"]),
        numbers,
        str(row.get("mismatch") or ""),
    )


def _wanted(row: PairMapping) -> tuple[Number, ...]:
    return (
        (*TABLE_NUMBERS, PUBLISHED_COLUMN)
        if PUBLISHED_COLUMN.key in row
        else TABLE_NUMBERS
    )


def _shown(row: PairMapping, number: Number) -> ShownNumber:
    value = row.get(number.key)
    heading = {"area_a": f"area {row['a']}", "area_b": f"area {row['b']}"}.get(
        number.key, number.heading
    )
    if words.missing(value):
        why = (
            "not published"
            if number is PUBLISHED_COLUMN
            else words.why_missing(row, number.key)
        )
        return ShownNumber(heading, words.DASH, None, why)
    return ShownNumber(heading, NUMBER_STYLES[number.style](value), float(str(value)))


# ---- images


@dataclass(frozen=True, eq=False)
class Embedded:
    """A tile with its image as a data URI, and why the numbers under it should not be
    compared; of a map also the place of its column and what a browser draws it from.
    """

    tile: Tile
    uri: str
    width: int
    height: int
    mismatch: str = ""
    column: int | None = None
    data: Markup | None = None


@dataclass(frozen=True, eq=False)
class ShownImage:
    """A sample as it is shown."""

    name: str
    anchor: str
    said: PairMapping
    right: bool | None
    tiles: tuple[Embedded, ...]
    lines: tuple[PairRow, ...]
    notes: tuple[str, ...]
    numbers: str
    """What images are ordered by, as JSON."""


def shown(run: Reported) -> list[str]:
    """The images that are drawn on the page: those that were called wrong, then the
    first of the others.
    """
    columns = len(run.manifest["columns"])
    said = run.predictions
    wrong_first = sorted(
        run.samples, key=lambda name: said.get(name, {}).get("right") is not False
    )
    return wrong_first[: min(MAX_IMAGES, max(1, MAX_MAPS // columns))]


def wrong(run: Reported) -> list[dict[str, Any]]:
    """The images called wrong, surest first, with where each stands on the page; at most
    `MOST_WRONG`.
    """
    known = anchors(run)
    rows = [
        {"name": name, "anchor": known.get(name, ""), **said}
        for name, said in run.predictions.items()
        if said.get("right") is False
    ]
    rows.sort(
        key=lambda row: words.missing(row["probability"]) or -row["probability"]
    )
    return rows[:MOST_WRONG]


def shown_images(run: Reported, rows: Sequence[PairMapping]) -> Iterator[ShownImage]:
    """The samples one by one, those that are `shown`; a few are in memory at a time."""
    of_sample: dict[str, list[PairMapping]] = {}
    for row in rows:
        of_sample.setdefault(row["sample"], []).append(row)
    _ = run.predictions  # read once, not by each thread

    def image(of: tuple[int, str, Any]) -> ShownImage:
        number, name, stored = of
        return _image(run, name, stored, f"image-{number}", of_sample.get(name, []))

    # a folder is read by one thread, whoever takes the images
    loaded = (
        (number, name, run.load(name)) for number, name in enumerate(shown(run), 1)
    )
    return ahead(image, loaded, DRAWERS, 2 * DRAWERS)


def _image(
    run: Reported, name: str, stored: Any, anchor: str, rows: Sequence[PairMapping]
) -> ShownImage:
    said = run.predictions.get(name) or {}
    names = [item.column for item in stored.items]
    pairs = [(row["a"], row["b"]) for row in rows] or list(combinations(names, 2))
    doubts = {(row["a"], row["b"]): str(row.get("mismatch") or "") for row in rows}
    order = [str(column["name"]) for column in run.manifest["columns"]]
    embedded = tuple(
        _embedded(tile, doubts, stored, order)
        for tile in tiles(stored, pairs[:MAX_PAIR_TILES])
        if tile.kind != "mask"  # cut in the browser from the map
    )
    lines = tuple(line(row, anchor) for row in rows)
    return ShownImage(
        name,
        anchor,
        said,
        said.get("right"),
        embedded,
        lines,
        tuple(getattr(stored, "notes", ())),
        _sortable(said, rows, order),
    )


def _sortable(
    said: PairMapping, rows: Sequence[PairMapping], order: Sequence[str]
) -> str:
    """The numbers of an image that it can be ordered by, as JSON; pairs by the places of
    their columns.
    """
    pairs = {}
    for row in rows:
        if row["a"] in order and row["b"] in order:
            places = sorted((order.index(row["a"]), order.index(row["b"])))
            pairs["{}-{}".format(*places)] = {
                one.key: float(row[one.key])
                for one in ORDERED_BY
                if not words.missing(row.get(one.key))
            }
    facts: dict[str, Any] = {"pairs": pairs}
    if not words.missing(said.get("probability")):
        facts["probability"] = float(said["probability"])
    if said.get("right") is not None:
        facts["right"] = int(said["right"])
    return json.dumps(facts)


def _embedded(
    tile: Tile,
    doubts: Mapping[tuple[str, str], str],
    stored: Any,
    order: Sequence[str],
) -> Embedded:
    made = embed(tile, doubts)
    if tile.kind != "map":
        return made
    item = next(one for one in stored.items if one.column == tile.column)
    column = order.index(tile.column) if tile.column in order else 0
    return replace(made, column=column, data=viewer_data(item))


def viewer_data(item: Any) -> Markup:
    """What a browser draws and cuts a map from, as JSON that holds no markup: its
    levels, its scale, the mask that was cut and, for superpixels, their weights. See
    `levels` for the coding.
    """
    values = item.values
    superpixels = None
    segments, weights = item.extras.get("segments"), item.extras.get("weights")
    scale = colours.limits(values)
    if segments is not None and weights is not None:
        scale = colours.limits(weights[segments], signed=True)
        drawn = colours.superpixel_marks(segments, *certainty(item.extras))
        stderr = item.extras.get("stderr")
        superpixels = {
            "segments": levels.packed(segments.astype(np.uint16)),
            "weights": levels.floats(weights),
            "stderr": None if stderr is None else levels.floats(stderr),
            "marks": levels.packed_bytes(drawn),
        }
    coded = levels.levels_of(values)
    data = {
        "h": values.shape[0],
        "w": values.shape[1],
        "levels": levels.packed(coded.levels),
        "knots": levels.floats(coded.knots),
        "signed": scale.signed,
        "flat": scale.flat,
        "low": scale.low,
        "high": scale.high,
        "mask": None if item.mask is None else levels.packed_mask(item.mask),
        "superpixels": superpixels,
    }
    return Markup(json.dumps(data))  # base64 and numbers: nothing to escape


def embed(tile: Tile, doubts: Mapping[tuple[str, str], str]) -> Embedded:
    """A tile as WebP in a data URI, at most 320 pixels on its longer side; ``doubts``
    are the mismatches of pairs.
    """
    pixels = _at_most(tile.image, TILE)
    return Embedded(
        tile,
        _as_uri(pixels),
        pixels.shape[1],
        pixels.shape[0],
        doubts.get(tile.pair, "") if tile.pair else "",
    )


def picture_uri(pixels: Array, longest: int) -> str:
    """An image (h, w, 3) uint8 as WebP in a data URI, at most so many pixels long."""
    return _as_uri(_at_most(pixels, longest))


def _as_uri(pixels: Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def tile_html(item: Embedded) -> str:
    """One tile as the report shows it."""
    module = environment().get_template("tile.html.j2").module
    return str(module.tile(item))  # type: ignore[attr-defined]


def _at_most(pixels: Array, longest: int) -> Array:
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    return images.resize(
        pixels,
        (max(1, round(height * scale)), max(1, round(width * scale))),
        "lanczos",
    )


# ---- how it was made


def columns(run: Reported) -> list[dict[str, Any]]:
    """The columns of the run with their full spelling and what they cost an image on
    average.
    """
    table = run.explanations
    return [
        _made(column, table[table["column"] == column["name"]])
        for column in run.manifest["columns"]
    ]


def _made(column: Mapping[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    costs = {
        key: float(rows[key].mean()) if key in rows and len(rows) else None
        for key in ("seconds", "passes")
    }
    rules = list(dict.fromkeys(rows["mask_rule"])) if "mask_rule" in rows else []
    layers = (
        [name for name in dict.fromkeys(rows["layer"]) if name]
        if "layer" in rows
        else []
    )
    return {
        "name": column["name"],
        "spec": column.get("full") or column["explainer"],
        "model": column.get("model") or "",
        "view": column.get("view") or "the model's own",
        "mask": ", ".join(map(str, rules)) or column.get("mask") or "",
        "layer": ", ".join(map(str, layers)),
        "unseeded": bool(column.get("unseeded")),
        **costs,
    }
