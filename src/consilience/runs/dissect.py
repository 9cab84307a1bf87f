"""A dissection as a run's folder: measured, named, tried by knocking out, drawn; each
stage kept, the manifest last.

``job.json`` says what was asked and is there from the start; another job's folder is
refused. A stage that is done is read from its file when the same command is given
again, so that a killed run goes on where it was. ``run.json`` is written last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from consilience import data, progress, registry
from consilience.dissection import knockout, words
from consilience.dissection.class_groups import read_groups
from consilience.dissection.concepts import ConceptSet, load_concepts
from consilience.dissection.encoders import Encoder, load_encoder
from consilience.dissection.measure import Share, dissect
from consilience.dissection.result import Dissection
from consilience.files import (
    digest_of_data,
    place,
    read_json,
    read_table,
    write_json,
    write_table,
)
from consilience.models.load import load_model
from consilience.runs.explain import How
from consilience.runs.folder import (
    RunFolder,
    file_content,
    files_content,
    read_manifest,
    run_kind,
)
from consilience.runs.pieces import PIECES, Shared
from consilience.runs.worker import check_shared
from consilience.show import dissection_page as page
from consilience.show.unit_tiles import draw_tiles
from consilience.types import ConsilienceError, Model, Network, Sample

WORDS, KNOCKOUT, HURT, STATE = (
    "words.parquet",
    "knockout.parquet",
    "hurt.parquet",
    "state.npz",
)
DISSECTED = "dissection.json"
HURT_CLASSES = 5


@dataclass(frozen=True)
class WordsJob:
    """What CLIP-Dissect is asked: the list, the encoder, the similarity, and probe
    images (None: the concept set's).
    """

    file: str
    encoder: str = "open_clip:ViT-B-16,pretrained=openai"
    similarity: str = "soft-wpmi"
    prompt: str = "{}"
    probe: str | None = None


@dataclass(frozen=True)
class KnockoutJob:
    """How units are knocked out: over how many images of the concept set (or those of a
    folder), with what groups of classes.

    ``units`` are those that detect a concept, the ``most`` best ones of each layer.
    """

    images: int = 100
    folder: str | None = None
    truth: str | None = None
    groups: str | None = None
    most: int = 200


@dataclass(frozen=True)
class DissectionJob:
    """What is asked of a model and a concept set.

    ``options`` go to `dissect` as they are.
    """

    concepts: str
    model: str
    layers: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    words: WordsJob | None = None
    knockout: KnockoutJob | None = None


# ---- running


def run_dissection(
    job: DissectionJob,
    folder: str | Path,
    model_options: Mapping[str, Any] | None = None,
    command: str = "",
    how: How | None = None,
) -> DissectionRun:
    """Do a job, or what an earlier try left of it; writes the report; returns the
    finished run. The passes over the images are shared out as ``how`` says; one process,
    several and a cluster end in the same numbers.
    """
    start = time.perf_counter()
    model = load_model(job.model, **dict(model_options or {}))
    if not isinstance(model, Network):
        raise ConsilienceError(
            f"a dissection opens the network; {model.id} offers scores only"
        )
    concepts = load_concepts(job.concepts)
    layers = job.layers or (model.target_layer(),)
    _check_layers(model, layers)
    encoder = load_encoder(job.words.encoder) if job.words else None
    parts = describe_dissection(job, model, concepts, layers, encoder)
    claimed = RunFolder(folder, "dissection", parts, {"command": command})
    where = claimed.path
    share = None
    if how is not None and how.several:
        check_shared(model, where)
        loading = dict(model_options or {})
        share = Shared(job.model, loading, job.concepts, where / PIECES, how)
    with claimed.locked():
        try:
            found = _dissected(job, model, layers, concepts, where, share)
        finally:
            if share is not None:
                share.close()
        concepts = concepts.only(found.images)  # without what could not be read
        named = _named(job, model, layers, concepts, encoder, where)
        hurt = _knocked_out(job, model, found, concepts, where)
        shown = draw_tiles(model, found, concepts, where)
        manifest = {
            "version": version("consilience"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "title": f"What the units of {model.id.partition('@')[0]} detect",
            "model": {
                "spec": model.spec,
                "id": model.id,
                "facts": model.facts,
                "classes_count": len(model.classes),
            },
            "concepts": {
                "spec": job.concepts,
                "id": concepts.id,
                "images": len(concepts),
            },
            "layers": list(layers),
            "counts": {name: found.counts(name) for name in layers},
            "left_out": [
                note
                for note in found.facts.get("notes", ())
                if note.startswith("left out")
            ],
            "words": named,
            "knockout": hurt,
            "tiles": shown,
            "seconds": time.perf_counter() - start,
        }
        claimed.finish(manifest)
        finished = DissectionRun(where)
        page.write_dissection_report(finished)
        return finished


def describe_dissection(
    job: DissectionJob,
    model: Model,
    concepts: ConceptSet,
    layers: Sequence[str],
    encoder: Encoder | None,
) -> dict[str, Any]:
    """What makes this job this job and no other: contents, not names, where a file is
    meant.
    """
    asked: dict[str, Any] = {
        "model": model.id,
        "concepts": concepts.id,
        "images and labels digest": concepts.content(),
        "layers": list(layers),
        "options": dict(job.options),
        "version": version("consilience"),
    }
    if job.words is not None and encoder is not None:
        vocabulary = digest_of_data(words.read_words(job.words.file))
        asked["words"] = {
            **{key: part for key, part in asdict(job.words).items() if key != "file"},
            "list": {"file": Path(job.words.file).name, "digest": vocabulary},
            "encoder": encoder.id or job.words.encoder,
            "probe": folder_content(job.words.probe),
        }
    if job.knockout is not None:
        asked["knockout"] = {
            **asdict(job.knockout),
            "class names digest": digest_of_data(model.classes),
            "folder": folder_content(job.knockout.folder),
            "truth": file_content(job.knockout.truth),
            "groups": file_content(job.knockout.groups),
        }
    return asked


def folder_content(folder: str | None) -> dict[str, str] | None:
    """A folder of images as part of a job: the content of all its files."""
    if folder is None:
        return None
    files = data.find_images([folder])
    digests = files_content(files, data.names_of(files))
    return {"file": Path(folder).name, "digest": digest_of_data(digests)}


def _check_layers(model: Network, layers: Sequence[str]) -> None:
    known = [layer.name for layer in model.layers()]
    for name in layers:
        if name not in known:
            raise ConsilienceError(
                registry.unknown(f"layer in {model.id}", name, known, limit=20)
            )


# ---- the stages


def _dissected(
    job: DissectionJob,
    model: Network,
    layers: Sequence[str],
    concepts: ConceptSet,
    folder: Path,
    share: Share | None,
) -> Dissection:
    if (folder / DISSECTED).is_file():
        return Dissection.read(folder)
    found = dissect(
        model,
        list(layers),
        concepts,
        state=folder / STATE,
        share=share,
        **dict(job.options),
    )
    if not any(one.eligible for one in found.concepts):
        most = max(found.concepts, key=lambda one: one.images)
        raise ConsilienceError(
            f"no concept of {concepts.spec} can be a label; the most frequent, {most.name}: "
            f"{most.why}"
        )
    found.write(folder)
    _remove(folder / PIECES)
    return found


def _remove(folder: Path) -> None:
    """A folder of files, wherever it is."""
    if folder.is_dir():
        for file in list(folder.iterdir()):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # other storage has no folders
            folder.rmdir()


def _named(
    job: DissectionJob,
    model: Network,
    layers: Sequence[str],
    concepts: ConceptSet,
    encoder: Encoder | None,
    folder: Path,
) -> dict[str, Any] | None:
    """Words of all units; returns how they were made, or None where no words were asked
    for.
    """
    if job.words is None or encoder is None:
        return None
    facts = folder / "words.json"
    if not (facts.is_file() and (folder / WORDS).is_file()):
        asked = job.words
        probe: Sequence[Sample] = (
            concepts.samples if asked.probe is None else Images(asked.probe)
        )
        view = dict(job.options).get("view", "squash")
        made = words.name_units(
            model,
            layers,
            asked.file,
            probe,
            encoder,
            asked.similarity,
            asked.prompt,
            view,
        )
        write_table(folder / WORDS, made.table())
        write_json(
            facts,
            {
                **made.facts,
                "prompt": asked.prompt,
                "probe": asked.probe or "the concept set's images",
            },
        )
    return read_json(facts)


def _knocked_out(
    job: DissectionJob,
    model: Network,
    found: Dissection,
    concepts: ConceptSet,
    folder: Path,
) -> dict[str, Any] | None:
    """Losses of all units that detect something; returns how they were measured."""
    if job.knockout is None:
        return None
    asked, facts = job.knockout, folder / "knockout.json"
    if facts.is_file():
        return read_json(facts)
    samples = _knockout_images(asked, model, concepts)
    groups = read_groups(asked.groups, model.classes) if asked.groups else None
    view = dict(job.options).get("view", "squash")
    tables, hurt, left = [], [], 0
    for layer in found.layers:
        rows = found.detectors(layer.layer).sort_values(
            "iou", ascending=False, kind="stable"
        )
        left += max(0, len(rows) - asked.most)
        rows = rows.head(asked.most)
        if rows.empty:
            continue
        units, names = (
            [int(unit) for unit in rows["unit"]],
            [str(name) for name in rows["concept"]],
        )
        lost = knockout.knock_out(
            model, layer.layer, units, samples, names, groups, view
        )
        tables.append(lost.table())
        hurt += [
            lost.hurt(unit, HURT_CLASSES).assign(layer=layer.layer, unit=unit)
            for unit in units
        ]
    write_table(
        folder / KNOCKOUT,
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(),
    )
    write_table(
        folder / HURT, pd.concat(hurt, ignore_index=True) if hurt else pd.DataFrame()
    )
    write_json(
        facts,
        {
            "images": len(samples),
            "units": sum(map(len, tables)),
            "left_out": left,
            "outputs": model.outputs,
        },
    )
    return read_json(facts)


def _knockout_images(
    asked: KnockoutJob, model: Network, concepts: ConceptSet
) -> Sequence[Sample]:
    """Images of a folder with their labels, or some of the concept set, spread evenly
    over it.
    """
    if asked.folder is not None:
        return Images(asked.folder, asked.truth, model.classes)
    count = min(asked.images, len(concepts))
    return concepts.subset(
        np.linspace(0, len(concepts) - 1, count).round().astype(int).tolist()
    ).samples


# ---- images, read when they are asked for


class Images(Sequence[Sample]):
    """Images of a folder as samples, one in memory at a time; one that cannot be read
    is named at once and left out.
    """

    def __init__(
        self, folder: str, truth: str | None = None, classes: Sequence[str] = ()
    ) -> None:
        known = data.read_truth(truth, classes) if truth is not None else None
        self._truth, self._classes = known, classes
        self._files = list(self._readable(data.find_images([folder])))
        if not self._files:
            raise ConsilienceError(f"{folder} holds no image that can be read")

    def _readable(self, files: Sequence[Path]) -> Iterator[Path]:
        for file, sample in zip(files, data.read_files(files), strict=True):
            if isinstance(sample, data.Failure):
                progress.say(sample.reason)
            else:
                yield file

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        read = next(
            iter(data.read_files([self._files[at]], self._truth, self._classes))
        )
        if isinstance(read, data.Failure):
            raise ConsilienceError(read.reason)
        return read


# ---- reading


class DissectionRun:
    """A finished dissection, read from its folder as far as it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = place(folder)
        self.manifest = read_manifest(self.folder, "dissection")
        """What was asked and what ran."""

    @cached_property
    def dissection(self) -> Dissection:
        """The numbers."""
        return Dissection.read(self.folder)

    @cached_property
    def words(self) -> pd.DataFrame | None:
        """A row a unit with its word; None where no words were asked for."""
        return self._table(WORDS)

    @cached_property
    def knockout(self) -> pd.DataFrame | None:
        """A row a unit with what knocking it out costs."""
        return self._table(KNOCKOUT)

    @cached_property
    def hurt(self) -> pd.DataFrame | None:
        """The classes that lose most, by layer and unit."""
        return self._table(HURT)

    def _table(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return read_table(path) if path.is_file() else None

    @property
    def units(self) -> pd.DataFrame:
        """A row a unit: what IoU says of it, and its word where it has one."""
        table = self.dissection.table()
        return table if self.words is None else words.beside(self.words, table)


def is_dissection(folder: str | Path) -> bool:
    """Whether the folder holds a finished dissection."""
    return run_kind(folder) == "dissection"


__all__ = [
    "DissectionRun",
    "DissectionJob",
    "KnockoutJob",
    "WordsJob",
    "is_dissection",
    "run_dissection",
]
