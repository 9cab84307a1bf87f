"""Shortcuts in a folder: scores image by image, what they show, and a page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from consilience import api, data, inputs, progress, registry
from consilience.diagnosis import closer as looks
from consilience.diagnosis import shortcuts as search
from consilience.diagnosis.shortcuts import Kept, Shortcuts
from consilience.files import (
    json_ready,
    read_json_data,
    spreadsheet_safe,
    write_atomically,
    write_bytes,
    write_json,
    write_table,
)
from consilience.models.gathering import held
from consilience.models.load import as_model
from consilience.runs.folder import REPORT, RunFolder
from consilience.runs.sources import Source, read_ahead, source_of
from consilience.targets.classes import numbered_or_named
from consilience.types import ConsilienceError, Model, View

METHOD = "gradcam"
BLOCK = 32
"""Images that are painted and scored at a time; they alone are in memory."""

CLOSER_IMAGES, MAP_IMAGES = 60, 20
"""Images that doses, and maps, are looked at on: the first ones."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a network.

    ``marks`` are spellings, ``by`` explainers whose maps are held against the mark,
    ``least`` the size of a shift, in standard deviations of the class's score, that
    counts as a shortcut (None: .5 for marks at a place, .75 for those that change the
    whole image); ``classes`` narrows the family to some classes (names or
    numbers); so many of the largest findings are looked at ``closer``.
    """

    marks: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    classes: tuple[str | int, ...] = ()
    least: float | None = None
    level: float = 0.95
    seed: int = 0
    closer: int = 3


def shortcuts(
    model: Any,
    images: Any,
    marks: Sequence[Any] = (),
    by: Sequence[str] = (),
    classes: Sequence[str | int] = (),
    least: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    closer: int = 3,
    folder: str | Path | None = None,
) -> Shortcuts:
    """Which marks a network takes for a class: marks are planted in images, and every
    class's score is held against the plain image's and that of area-matched controls.

    ``model`` and ``images`` are those of `explain`; ``marks`` are spellings
    (``"stamp:opacity=0.5"``, ``"png:logo.png"``) or marks, every drawn one unless told.
    ``by`` are explainers whose maps of the largest ``closer`` findings are looked at,
    with a dose curve and the images that carry the mark; ``classes`` narrows what is
    tested. ``folder`` keeps the scores, the tables and a page, and goes on where it
    stopped. Raises `ConsilienceError` for fewer than six images: they could show
    nothing.
    """
    built = [registry.marks.build(one) for one in marks]
    asked = Asked(
        tuple(registry.spell(one) for one in built),
        tuple(by),
        tuple(classes),
        least,
        level,
        seed,
        closer,
    )
    network = as_model(model)
    shown = inputs.Shown.of(network)
    source = source_of(
        (), None, shown.classes, shown.channels, inputs.Again.of(images, shown)
    )
    with ExitStack() as kept:
        if folder is None:
            place = Path(kept.enter_context(tempfile.TemporaryDirectory()))
            return _found(asked, network, source, place / "run", "", page=False)[0]
        return _found(asked, network, source, Path(folder), "")[0]


def run_shortcuts(
    asked: Asked,
    model: Model,
    paths: Sequence[str | Path],
    folder: str | Path,
    command: str = "",
) -> tuple[Shortcuts, Path]:
    """`shortcuts` of files into a folder; returns what was found and the page."""
    shown = inputs.Shown.of(model)
    source = source_of(paths, None, shown.classes, shown.channels)
    return _found(asked, model, source, Path(folder), command)


FEWEST = 6


def _found(
    asked: Asked,
    model: Model,
    source: Source,
    folder: Path,
    command: str,
    page: bool = True,
) -> tuple[Shortcuts, Path]:
    """What was found, and the page's path; without ``page`` nothing is written but the
    scores.
    """
    from consilience.show.shortcuts_page import shortcuts_page

    asked = replace(asked, marks=asked.marks or search.battery())
    built = search.build_marks(asked.marks)
    marks, specs = list(built.values()), list(built)
    chosen = [_class_index(model, one) for one in asked.classes] or None
    asked = replace(asked, by=_methods(model, asked.by))
    if len(source.names) < FEWEST:
        raise ConsilienceError(
            f"shortcuts are shown over images; {FEWEST} are the fewest that can show "
            f"anything, got {len(source.names)}"
        )
    place = RunFolder(
        folder,
        "shortcuts",
        {
            "model": {"id": model.id},
            "images": source.parts(),
            "marks": [registry.spell(one, full=True) for one in marks],
            "plug-in digest": registry.source_digest(marks),
            "seed": asked.seed,
            "version": version("consilience"),
        },
        {"command": command},
    )
    with place.locked(), held(model):
        kept, names, failures = _scored(place.path, model, source, marks, asked.seed)
        result = search.judge(
            model, kept, specs, names, asked.least, asked.level, asked.seed, chosen
        )
        result = replace(result, failures=tuple(failures))
        result = _looked_closer(result, asked, model, source, built)
        if page:
            _write(place.path, result)
            examples = _examples(model, source, built, result, asked.seed)
            text = shortcuts_page(result, examples, version("consilience"), command)
            write_bytes(place.path / REPORT, text.encode())
            place.finish({"command": command, **as_dict(result)})
    return result, place.path / REPORT


def _methods(model: Model, by: Sequence[str]) -> tuple[str, ...]:
    """Explainers that were asked for, refused where the network cannot do what they need;
    unless told Grad-CAM where it can, else none, which is said.
    """
    if not by and not registry.explainers.build(METHOD).needs <= model.can:
        progress.say(f"no maps: {METHOD} needs gradients, {model.id} has scores only")
        return ()
    for spec in by:
        api.resolve_explainer(model, spec)
    return tuple(by) or (METHOD,)


def _class_index(model: Model, given: str | int) -> int:
    return given if isinstance(given, int) else numbered_or_named(model, given)


# ---- what the network says


def _scored(
    folder: Path, model: Model, source: Source, marks: Sequence[Any], seed: int
) -> tuple[Kept, list[str], list[tuple[str, str]]]:
    """Scores of every image by block, those that are there already among them."""
    blocks: list[Path] = []
    names: list[str] = []
    failures: list[tuple[str, str]] = []
    store = folder / "scores"
    store.mkdir(exist_ok=True)
    starts = range(0, len(source.names), BLOCK)
    missing = [start for start in starts if not _is_whole(store, start)]
    with _showing(model, source, marks, missing) as running:
        for start in missing:
            part = range(start, min(start + BLOCK, len(source.names)))
            _score_block(store, model, source, marks, seed, part, running)
    for start in starts:
        file, about = _files(store, start)
        said = read_json_data(about)
        failures += [(name, why) for name, why in said["failures"]]
        if said["names"]:
            blocks.append(file)
            names += said["names"]
    if len(names) < FEWEST:
        raise ConsilienceError(
            f"{FEWEST} images are the fewest that can show anything; {len(names)} of "
            f"{len(source.names)} could be read"
            + (f" ({failures[0][0]}: {failures[0][1]})" if failures else "")
        )
    return Kept(blocks), names, failures


@contextmanager
def _showing(
    model: Model, source: Source, marks: Sequence[Any], missing: Sequence[int]
) -> Iterator[progress.Task]:
    """Progress over images times variants, which the first image tells."""
    first = _first_views(model, source, 1) if missing else []
    each = 1
    if first:
        each = len(search.variants_of(marks, first[0][1].pixels.shape[1:]))
    images = sum(min(BLOCK, len(source.names) - start) for start in missing)
    with progress.task("showing marks to the network", each * images) as running:
        yield running


def _score_block(
    store: Path,
    model: Model,
    source: Source,
    marks: Sequence[Any],
    seed: int,
    part: Sequence[int],
    running: progress.Task,
) -> None:
    file, about = _files(store, part[0])
    views, failed = _views(model, source, part)
    scores: dict[str, Any] = {}
    if views:
        pixels = torch.cat([view.pixels for _, view in views])
        scores = search.scored_images(model, pixels, marks, seed, running.advance)
    write_atomically(file, lambda out: np.savez(out, **scores))
    write_json(about, {"names": [name for name, _ in views], "failures": failed})


def _files(store: Path, start: int) -> tuple[Path, Path]:
    return store / f"{start:07d}.npz", store / f"{start:07d}.json"


def _is_whole(store: Path, start: int) -> bool:
    """The second file is written last."""
    return all(file.is_file() for file in _files(store, start))


def _views(
    model: Model, source: Source, places: Sequence[int]
) -> tuple[list[tuple[str, View]], list[tuple[str, str]]]:
    views, failed = [], []
    for place, sample in read_ahead(source, places, depth=2 * BLOCK, threads=2):
        if isinstance(sample, data.Failure):
            failed.append((sample.name, sample.reason))
            continue
        try:
            views.append((source.names[place], model.view(sample)))
        except ConsilienceError as error:
            failed.append((source.names[place], str(error)))
    return views, failed


def _first_views(model: Model, source: Source, most: int) -> list[tuple[str, View]]:
    """Views of the first images that can be read."""
    found: list[tuple[str, View]] = []
    for start in range(0, len(source.names), BLOCK):
        part = list(range(start, min(len(source.names), start + BLOCK)))
        found += _views(model, source, part)[0]
        if len(found) >= most:
            break
    return found[:most]


# ---- a closer look


def _looked_closer(
    result: Shortcuts,
    asked: Asked,
    model: Model,
    source: Source,
    marks: dict[str, Any],
) -> Shortcuts:
    """Doses, maps and carriers of the marks that move a class most, and of that class."""
    rows = result.largest()
    rows = rows[(rows["shift"] > 0) & (rows["verdict"] != "not shown")]
    rows = rows.head(asked.closer)
    if not len(rows):
        return result
    views = _first_views(model, source, CLOSER_IMAGES)
    shown = [view for _, view in views]
    said = dict(zip(result.images, result.predicted.tolist(), strict=True))
    doses: list[pd.DataFrame] = []
    maps: list[pd.DataFrame] = []
    carriers: list[pd.DataFrame] = []
    for row in rows.to_dict("records"):
        mark, index = marks[row["mark"]], int(row["class_index"])
        named = {"mark": row["mark"], "class_index": index, "class": row["class"]}
        parts = (
            (doses, looks.doses_of(model, shown, mark, index, asked.seed)),
            (maps, _maps(model, shown, mark, index, asked)),
            (carriers, _carriers(model, source, mark, index, said)),
        )
        for table, part in parts:
            if len(part):
                table.append(part.assign(**named))
    joined = [
        pd.concat(table, ignore_index=True) if table else pd.DataFrame()
        for table in (doses, maps, carriers)
    ]
    return replace(result, doses=joined[0], maps=joined[1], carriers=joined[2])


def _maps(
    model: Model, views: Sequence[View], mark: Any, index: int, asked: Asked
) -> pd.DataFrame:
    return looks.maps_on_mark(
        model, views[:MAP_IMAGES], mark, index, asked.by, asked.seed
    )


def _carriers(
    model: Model, source: Source, mark: Any, index: int, said: Mapping[str, int]
) -> pd.DataFrame:
    """Images of the class (labelled, or else ``said`` by the network) that look like
    they carry the mark.
    """

    def of_class() -> Iterator[tuple[str, View]]:
        for place, name in enumerate(source.names):
            sample = source.read(place)
            if isinstance(sample, data.Failure) or name not in said:
                continue
            label = said[name] if sample.label is None else sample.label
            if label == index:
                yield name, model.view(sample)

    return looks.carriers_of(of_class(), mark)


def _examples(
    model: Model,
    source: Source,
    marks: dict[str, Any],
    result: Shortcuts,
    seed: int,
) -> dict[str, Any]:
    """By mark, the first image as it was shown: plain, marked and with each control."""
    views = _first_views(model, source, 1)
    if not views:
        return {}
    pixels = views[0][1].pixels
    found = {}
    for one in result.marks:
        painted = marks[one.spec].paint(pixels, seed)
        found[one.spec] = {"marked": painted.marked, **painted.controls}
    return {"image": views[0][0], "plain": pixels, "marks": found}


# ---- what is kept


def _write(folder: Path, result: Shortcuts) -> None:
    write_table(folder / "shifts.parquet", result.table())
    top = result.table().groupby("mark", sort=False).head(10)
    tables = {
        "shortcuts": top,
        "doses": result.doses,
        "maps": result.maps,
        "carriers": result.carriers,
    }
    for name, table in tables.items():
        if len(table):
            text = spreadsheet_safe(table).to_csv(index=False)
            write_bytes(folder / f"{name}.csv", text.encode())


def as_dict(result: Shortcuts, most: int = 5) -> dict[str, Any]:
    """What was found as plain data: all that counts as a shortcut, and the ``most``
    largest of every mark.
    """
    table = result.table()
    found: dict[str, Any] = json_ready(
        {
            "model": {"id": result.model_id},
            "images": len(result.images),
            "score": result.score,
            "least": result.least,
            "level": result.level,
            "marks": [
                {
                    "mark": one.spec,
                    "least": result.least_of(one),
                    "changed": dict(one.changed),
                    "largest": table[table["mark"] == one.spec]
                    .head(most)
                    .to_dict("records"),
                }
                for one in result.marks
            ],
            "found": result.found().to_dict("records"),
            "doses": result.doses.to_dict("records"),
            "maps": result.maps.to_dict("records"),
            "carriers": result.carriers.to_dict("records"),
            "failures": [list(one) for one in result.failures],
        }
    )
    return found
