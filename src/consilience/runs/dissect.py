"""A dissection as a run's folder: measured, named, tried by knocking out, drawn; each
stage kept, the manifest last.

``job.json`` says what was asked and is there from the start; another job's folder is
refused. A stage that is done is read from its file when the same command is given
again, so that a killed run goes on where it was. ``run.json`` is written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import blake2b
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
from consilience.dissection.measure import dissect
from consilience.dissection.result import Dissection
from consilience.files import digest_of_data, json_ready, write_atomically, write_json
from consilience.models.load import load_model
from consilience.runs.folder import JOB, MANIFEST
from consilience.show import dissection_page as page
from consilience.show.unit_tiles import draw_tiles
from consilience.types import ConsilienceError, Model, Network, Sample

DISSECTION_RUN_SCHEMA = "dissection 1"
WORDS, KNOCKOUT, HURT, STATE = (
    "words.parquet",
    "knockout.parquet",
    "hurt.parquet",
    "state.part",
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
) -> DissectionRun:
    """Do a job, or what an earlier try left of it; writes the report; returns the
    finished run.
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
    place = _claim(
        Path(folder), describe_dissection(job, model, concepts, layers, encoder)
    )
    found = _dissected(job, model, layers, concepts, place)
    named = _named(job, model, layers, concepts, encoder, place)
    hurt = _knocked_out(job, model, found, concepts, place)
    shown = draw_tiles(model, found, concepts, place)
    manifest = {
        "schema": DISSECTION_RUN_SCHEMA,
        "kind": "dissection",
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
        "concepts": {"spec": job.concepts, "id": concepts.id, "images": len(concepts)},
        "layers": list(layers),
        "headlines": {name: found.headline(name) for name in layers},
        "words": named,
        "knockout": hurt,
        "tiles": shown,
        "seconds": time.perf_counter() - start,
    }
    write_json(place / MANIFEST, manifest)
    finished = DissectionRun(place)
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
        "kind": "dissection",
        "model": model.id,
        "concepts": concepts.id,
        "layers": list(layers),
    }
    asked |= {"options": dict(job.options), "version": version("consilience")}
    if job.words is not None and encoder is not None:
        vocabulary = words.read_words(job.words.file)
        asked["words"] = {
            **asdict(job.words),
            "file": digest_of_data(vocabulary),
            "encoder": encoder.id or job.words.encoder,
        }
    if job.knockout is not None:
        files = {
            name: _digest_of_file(getattr(job.knockout, name))
            for name in ("truth", "groups")
        }
        asked["knockout"] = asdict(job.knockout) | files
    return asked


def _digest_of_file(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ConsilienceError(f"{path}: no such file")
    return blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _check_layers(model: Network, layers: Sequence[str]) -> None:
    known = [layer.name for layer in model.layers()]
    for name in layers:
        if name not in known:
            raise ConsilienceError(
                registry.unknown(f"layer in {model.id}", name, known, limit=20)
            )


def _claim(folder: Path, asked: Mapping[str, Any]) -> Path:
    """The folder for this job: new, empty, or its own."""
    asked = json.loads(json.dumps(json_ready(asked)))
    if folder.exists() and not folder.is_dir():
        raise ConsilienceError(f"{folder} is a file; -o names the run's folder")
    known = folder / JOB
    if known.is_file():
        there = _read_json(known)
        differ = sorted(
            key for key in {**there, **asked} if there.get(key) != asked.get(key)
        )
        if differ:
            raise ConsilienceError(
                f"{folder} holds another job ({', '.join(differ)} differ); name another "
                f"folder with -o"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConsilienceError(
            f"{folder} is not empty and holds no run; name another folder with -o"
        )
    else:
        write_json(known, asked)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        thing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConsilienceError(f"{path} does not read as JSON: {error}") from None
    if not isinstance(thing, dict):
        raise ConsilienceError(f"{path} is not a run's file")
    return thing


# ---- the stages


def _dissected(
    job: DissectionJob,
    model: Network,
    layers: Sequence[str],
    concepts: ConceptSet,
    folder: Path,
) -> Dissection:
    if (folder / DISSECTED).is_file():
        return Dissection.read(folder)
    found = dissect(
        model, list(layers), concepts, state=folder / STATE, **dict(job.options)
    )
    found.write(folder)
    return found


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
        _write_table(folder / WORDS, made.table())
        write_json(
            facts,
            {
                **made.facts,
                "prompt": asked.prompt,
                "probe": asked.probe or "the concept set's images",
            },
        )
    return _read_json(facts)


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
        return _read_json(facts)
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
    _write_table(
        folder / KNOCKOUT,
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(),
    )
    _write_table(
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
    return _read_json(facts)


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


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda file: table.to_parquet(file, index=False))


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
        for file, sample in zip(files, data.read_samples(files), strict=True):
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
            iter(data.read_samples([self._files[at]], self._truth, self._classes))
        )
        if isinstance(read, data.Failure):
            raise ConsilienceError(read.reason)
        return read


# ---- reading


class DissectionRun:
    """A finished dissection, read from its folder as far as it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_dissection(self.folder):
            raise ConsilienceError(
                f"{self.folder} holds no finished dissection: {_what_there_is(self.folder)}"
            )
        if self.manifest.get("schema") != DISSECTION_RUN_SCHEMA:
            raise ConsilienceError(
                f"{self.folder} has schema {self.manifest.get('schema')}; this version reads "
                f"{DISSECTION_RUN_SCHEMA}"
            )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was asked and what ran."""
        return _read_json(self.folder / MANIFEST)

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
        return pd.read_parquet(path) if path.is_file() else None

    @property
    def units(self) -> pd.DataFrame:
        """A row a unit: what IoU says of it, and its word where it has one."""
        table = self.dissection.table()
        return table if self.words is None else words.beside(self.words, table)


def is_dissection(folder: str | Path) -> bool:
    """Whether the folder holds a finished dissection."""
    path = Path(folder) / MANIFEST
    return path.is_file() and _read_json(path).get("kind") == "dissection"


def _what_there_is(folder: Path) -> str:
    """Why a folder is no finished dissection, and which are near."""
    if (folder / JOB).is_file() and not (folder / MANIFEST).is_file():
        return "give the same command again to finish it"
    near = [parent for parent in (folder, folder.parent) if parent.is_dir()]
    there = sorted(
        {
            str(path.parent)
            for place in near
            for path in place.glob(f"*/{MANIFEST}")
            if is_dissection(path.parent)
        }
    )
    known = f"there is: {', '.join(there[:12])}" if there else "there is none near it"
    if (folder / MANIFEST).is_file():
        return f"it holds a run of explanations; {known}"
    return known


__all__ = [
    "DissectionRun",
    "DissectionJob",
    "KnockoutJob",
    "WordsJob",
    "is_dissection",
    "run_dissection",
]
