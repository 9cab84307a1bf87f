"""Pieces of a dissection made by workers: each opens the network itself, looks at the
images of its pieces and leaves what it found in the run's folder, where who leads merges
it in order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consilience import registry
from consilience.dissection.concepts import concept_digest, load_concepts
from consilience.dissection.measure import (
    PASSES,
    DissectionOptions,
    Job,
    State,
    UnreadableError,
    layers_of,
    read_state,
    without_unreadable,
    write_state,
)
from consilience.files import place
from consilience.models.load import load_model
from consilience.runs.crew import Crew, join_cluster
from consilience.runs.explain import How
from consilience.runs.making import Outcome
from consilience.runs.worker import (
    Errand,
    check_known,
    devices_of,
    known_by,
    plugin_files,
)
from consilience.types import ConsilienceError

PIECES = "pieces"
"""The folder of pieces that are not merged yet."""
UNREADABLE = "unreadable: "


@dataclass(frozen=True)
class PiecesErrand(Errand):
    """Pieces of the passes over the images of a concept set. Places count those of the
    first pass, then those of the second; what all pieces of a pass need is in a file of
    the folder.
    """

    model: str
    loading: tuple[tuple[str, Any], ...]
    concepts: str
    layers: tuple[str, ...]
    options: DissectionOptions
    skipped: tuple[tuple[int, str], ...]
    folder: str
    network: tuple[Any, ...]
    plugins: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def maker(self, number: int) -> PiecesMaker:
        """Who makes the pieces."""
        return PiecesMaker(self, number)


@dataclass(eq=False)
class PiecesMaker:
    """Makes pieces of an errand; the network and the images are found once."""

    errand: PiecesErrand
    number: int = 0
    _job: Job = field(init=False)

    def __post_init__(self) -> None:
        errand, loading = self.errand, dict(self.errand.loading)
        for plugin in errand.plugins:
            registry.load_plugin(plugin)
        if errand.devices:
            loading["device"] = errand.devices[self.number % len(errand.devices)]
        model = load_model(errand.model, **loading)
        check_known(model, errand.network)
        concepts = load_concepts(errand.concepts)
        concepts = without_unreadable(concepts, dict(errand.skipped))
        opened: Any = model
        layers = layers_of(opened, errand.layers)
        self._job = Job(opened, layers, concepts, errand.options, None)

    def make(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Outcomes of pieces, as each is kept."""
        for which in places:
            start, reason = time.perf_counter(), None
            turn, number = divmod(which, len(self._job.pieces))
            try:
                self._make(PASSES[turn], number)
            except UnreadableError as error:
                reason = f"{UNREADABLE}{error}"
            name, seconds = f"piece {number + 1}", time.perf_counter() - start
            yield asdict(Outcome(which, name, seconds, reason))

    def _make(self, step: str, number: int) -> None:
        folder = place(self.errand.folder)
        told = read_state(folder / f"{step}.npz")
        key = told.pop("key")
        if key_of(self._job, step, told) != str(key):
            raise ConsilienceError(
                f"a worker finds another set of images at {self.errand.concepts} than the "
                f"run has"
            )
        found = self._job.piece(step, number, told)
        write_state(_file(folder, step, number), {**found, "key": key})


def key_of(job: Job, step: str, told: State) -> str:
    """Of which dissection and pass a piece is."""
    said = {name: value.tobytes().hex() for name, value in sorted(told.items())}
    return concept_digest(job.key, step, said)


def _file(folder: str | Path, step: str, number: int) -> Path:
    return place(folder) / f"{step}-{number:03d}.npz"


@dataclass(eq=False)
class Shared:
    """Has the pieces of a dissection made by workers, in a folder that they share."""

    model: str
    loading: Mapping[str, Any]
    concepts: str
    folder: Path
    how: How
    _crew: Crew | None = None

    def __call__(
        self, job: Job, step: str, numbers: Sequence[int]
    ) -> Iterator[tuple[int, State]]:
        """The state of each piece, in order; what an earlier try left there is taken."""
        told = job.told(step)
        key = key_of(job, step, told)
        write_state(self.folder / f"{step}.npz", {**told, "key": np.array(key)})
        there = {one for one in numbers if self._is_there(step, one, key)}
        made = self._made(job, step, [one for one in numbers if one not in there])
        for number in numbers:
            while number not in there:
                there.add(next(made))
            file = _file(self.folder, step, number)
            yield number, read_state(file)
            file.unlink(missing_ok=True)
        if step == PASSES[-1] and self._crew is not None:
            self._crew.end()
            self._crew = None

    def close(self) -> None:
        """Stop workers that are still there."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    def _made(self, job: Job, step: str, left: Sequence[int]) -> Iterator[int]:
        """Numbers of pieces as workers make them; the workers stay for the next pass."""
        if not left:
            return
        first = PASSES.index(step) * len(job.pieces)
        names = [f"piece {one + 1}" for _ in PASSES for one in range(len(job.pieces))]
        self._crew = self._crew or self._hired(job)
        places = [first + number for number in left]
        try:
            for outcome in self._crew.make(places, names, last=False):
                if outcome.reason is not None:
                    kind = (
                        UnreadableError
                        if outcome.reason.startswith(UNREADABLE)
                        else ConsilienceError
                    )
                    raise kind(outcome.reason.removeprefix(UNREADABLE))
                yield outcome.place - first
        except BaseException:
            self._crew = None
            raise

    def _is_there(self, step: str, number: int, key: str) -> bool:
        file = _file(self.folder, step, number)
        try:
            return file.is_file() and str(read_state(file).get("key")) == key
        except ConsilienceError:
            return False

    def _hired(self, job: Job) -> Crew:
        workers = self.how.workers
        if self.how.cluster is not None:
            room = join_cluster(self.how.cluster)
            workers = workers or room
        errand = PiecesErrand(
            self.model,
            tuple(self.loading.items()),
            self.concepts,
            tuple(layer.name for layer in job.layers),
            job.options,
            tuple(job.concepts.skipped.items()),
            str(self.folder),
            known_by(job.model),
            plugin_files(),
            devices_of(self.loading.get("device")),
        )
        return Crew(errand, workers, self.how.cluster, 1)
