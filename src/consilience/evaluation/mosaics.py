"""The grid pointing game of a run: mosaics of its own images, explained anew in every
column; no annotation is needed.

Its unit is the mosaic. Mosaics have rows, files and numbers of their own and are never
counted among the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from consilience import api
from consilience.evaluation.columns import (
    Entry,
    TableColumn,
    another_class,
    first_of,
    once,
)
from consilience.files import file_stem, write_atomically
from consilience.metrics.mosaic import GridPointing, mosaics
from consilience.types import Explanation, Model, Sample, ViewMode

MOSAICS = "mosaics"
"""Where a run keeps its mosaics, a PNG each."""
TARGET = "true"
VIEW: ViewMode = "squash"
"""What is explained of a mosaic: the class of the cell that was drawn, and all of its
cells are shown.
"""


def mosaics_of(
    metric: GridPointing,
    models: Sequence[Model],
    samples: Iterable[Sample],
    seed: int,
) -> Iterator[Sample]:
    """Mosaics as the metric's options say, of images that every one of ``models`` is
    sure of, each with a name of its own.

    Raises `ConsilienceError` where there are too few such images.
    """
    first, *others = models
    known = (
        (sample for sample in samples if _agreed(first, others, sample, metric.sure))
        if others
        else samples
    )
    for number, made in enumerate(
        mosaics(first, known, metric.cells, seed, metric.sure, metric.count)
    ):
        yield replace(
            made, name=f"mosaic-{metric.cells}-{number:03d}-{made.digest[:6]}"
        )


def _agreed(
    first: Model, others: Sequence[Model], sample: Sample, sure: float
) -> bool:
    """Whether all models name the same class, the others with enough probability (the
    first is asked by `mosaics`).
    """
    said = [
        api.predict(model, api.raw_outputs(model, model.view(sample)))
        for model in (first, *others)
    ]
    return all(
        one.index == said[0].index and one.probability >= sure for one in said[1:]
    )


def write_mosaic(folder: Path, sample: Sample) -> None:
    """Keep a mosaic's image for the report."""
    path = folder / MOSAICS / f"{file_stem(sample.name)}.png"
    if not path.is_file():
        write_atomically(
            path, lambda file: Image.fromarray(sample.rgb).save(file, "PNG")
        )


def mosaic_entries(
    columns: Sequence[TableColumn],
    models: Mapping[str, Model],
    sample: Sample,
    seed: int,
) -> list[Entry]:
    """The columns of one mosaic; ``models`` are those of the run's own columns by
    label. Maps are made when asked for.

    Controls that the run lacks are shown to the model of the first method, as for its
    images.
    """
    first = first_of(columns, models)
    specs = {column.label: column.spec for column in columns}
    made = {
        label: once(_explained(models[label], sample, specs[label]))
        for label in models
    }
    return [
        _entry(column, column.of or first, models, made, sample, seed)
        for column in columns
    ]


def _entry(
    column: TableColumn,
    base: str,
    models: Mapping[str, Model],
    made: Mapping[str, Callable[[], Explanation]],
    sample: Sample,
    seed: int,
) -> Entry:
    model = models.get(column.label, models[base])
    key = mosaic_key(column, model, sample, seed)
    if column.label in made:
        return Entry(column, key, model, made[column.label])
    if column.kind == "other":
        return Entry(
            column, key, model, once(lambda: another_class(model, made[base](), seed))
        )
    return Entry(column, key, model, once(_explained(model, sample, column.spec)))


def _explained(model: Model, sample: Sample, spec: str) -> Callable[[], Explanation]:
    return partial(api.explain, model, sample, spec, TARGET, VIEW)


def mosaic_key(column: TableColumn, model: Model, sample: Sample, seed: int) -> str:
    """All that a map of a mosaic depends on, known before it is made."""
    ran = [str(model.facts.get(name)) for name in ("engine", "precision")]
    other = f"other {seed}" if column.kind == "other" else "own"
    return " ".join(
        [
            api.explainer_spelling(column.spec),
            model.id,
            *ran,
            sample.digest,
            str(sample.label),
            VIEW,
            other,
        ]
    )
