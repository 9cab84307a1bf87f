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
    DissectionOptions,
    Job,
    State,
    UnreadableError,
    layers_of,
    read_state,
    without_unreadable,
    write_state,
)
from consilience.models.load import load_model
from consilience.runs.crew import Crew, join_cluster
from consilience.runs.explain import How
from consilience.runs.making import Outcome
from consilience.runs.worker import (
    Errand,
    check_known,
    check_shared,
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
    """Pieces of one pass over the images of a concept set; ``told`` is the file that says
    what all of them need, ``key`` of which dissection and pass they are.
    """

    model: str
    loading: tuple[tuple[str, Any], ...]
    concepts: str
    layers: tuple[str, ...]
    options: DissectionOptions
    skipped: tuple[tuple[int, str], ...]
    folder: str
    step: str
    key: str
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
    _told: State = field(init=False)

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
        self._told = read_state(Path(errand.folder) / f"{errand.step}.npz")
        if key_of(self._job, errand.step, self._told) != errand.key:
            raise ConsilienceError(
                f"a worker finds another set of images at {errand.concepts} than the run has"
            )

    def make(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Outcomes of pieces, as each is kept."""
        errand = self.errand
        for place in places:
            start, reason = time.perf_counter(), None
            try:
                found = self._job.piece(errand.step, place, self._told)
                file = _file(errand.folder, errand.step, place)
                write_state(file, {**found, "key": np.array(errand.key)})
            except UnreadableError as error:
                reason = f"{UNREADABLE}{error}"
            name, seconds = f"piece {place + 1}", time.perf_counter() - start
            yield asdict(Outcome(place, name, seconds, reason))


def key_of(job: Job, step: str, told: State) -> str:
    """Of which dissection and pass a piece is."""
    said = {name: value.tobytes().hex() for name, value in sorted(told.items())}
    return concept_digest(job.key, step, said)


def _file(folder: str | Path, step: str, number: int) -> Path:
    return Path(folder) / f"{step}-{number:03d}.npz"


@dataclass(frozen=True)
class Shared:
    """Has the pieces of a dissection made by workers, in a folder that they share."""

    model: str
    loading: Mapping[str, Any]
    concepts: str
    folder: Path
    how: How

    def __call__(
        self, job: Job, step: str, numbers: Sequence[int]
    ) -> Iterator[tuple[int, State]]:
        """The state of each piece, in order; what an earlier try left there is taken."""
        told = job.told(step)
        key = key_of(job, step, told)
        write_state(self.folder / f"{step}.npz", told)
        left = [one for one in numbers if not self._is_there(step, one, key)]
        there = set(numbers) - set(left)
        waiting = list(numbers)

        def ready() -> Iterator[tuple[int, State]]:
            while waiting and waiting[0] in there:
                file = _file(self.folder, step, waiting[0])
                yield waiting.pop(0), read_state(file)
                file.unlink(missing_ok=True)

        yield from ready()
        if left:
            names = [f"piece {number + 1}" for number in range(max(left) + 1)]
            for outcome in self._crew(job, step, key).make(left, names):
                if outcome.reason is not None:
                    kind = (
                        UnreadableError
                        if outcome.reason.startswith(UNREADABLE)
                        else ConsilienceError
                    )
                    raise kind(outcome.reason.removeprefix(UNREADABLE))
                there.add(outcome.place)
                yield from ready()

    def _is_there(self, step: str, number: int, key: str) -> bool:
        file = _file(self.folder, step, number)
        try:
            return file.is_file() and str(read_state(file).get("key")) == key
        except ConsilienceError:
            return False

    def _crew(self, job: Job, step: str, key: str) -> Crew:
        check_shared(job.model, self.folder)
        workers = self.how.workers
        if self.how.cluster is not None:
            workers = workers or join_cluster(self.how.cluster)
        errand = PiecesErrand(
            self.model,
            tuple(self.loading.items()),
            self.concepts,
            tuple(layer.name for layer in job.layers),
            job.options,
            tuple(job.concepts.skipped.items()),
            str(self.folder),
            step,
            key,
            known_by(job.model),
            plugin_files(),
            devices_of(self.loading.get("device")),
        )
        return Crew(errand, workers, self.how.cluster, 1)
