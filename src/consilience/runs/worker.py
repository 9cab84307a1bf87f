"""One worker of a run: loads the networks once, makes images by their place (or pieces of
a dissection), says what became of each.

A worker of this machine is a process that reads lines of JSON and answers with such
(``python -m consilience.runs.worker``); one of a cluster is an actor, `Remote`. Both write
what they make straight into the run's folder and give back only outcomes.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from consilience import progress, registry
from consilience.types import ConsilienceError


class Maker(Protocol):
    """Makes what a worker is given, by place."""

    def make(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Outcomes, as each is kept."""


class Errand:
    """What a worker is told; kinds of it say what is made."""

    devices: tuple[str, ...] = ()

    def maker(self, number: int) -> Maker:
        """Who does it, as worker ``number``."""
        raise NotImplementedError

    def to_send(self) -> Errand:
        """Without what each worker builds for itself."""
        return self

    def as_text(self) -> str:
        """For a worker of ours, on a pipe of ours."""
        return base64.b64encode(pickle.dumps(self.to_send())).decode()

    @staticmethod
    def from_text(text: str) -> Errand:
        """Inverse of `as_text`."""
        made: Errand = pickle.loads(base64.b64decode(text))
        return made


class Remote:
    """A worker of a cluster."""

    def __init__(self, errand: Errand, number: int) -> None:
        self._maker = errand.maker(number)

    def make_all(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Outcomes, when all are kept."""
        return list(self._maker.make(places))


@dataclass(frozen=True)
class ImagesErrand(Errand):
    """Explanations of images: the job, how its networks are loaded, where the images are,
    which folder the records go to.
    """

    job: Any
    options: Any
    images: tuple[str, ...]
    truth: str | None
    folder: str
    digest: str
    batch: int
    threads: int
    panels: bool
    reuse: tuple[str, ...] = ()
    asked: Any = None
    plugins: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    networks: tuple[tuple[Any, ...], ...] = ()

    def maker(self, number: int) -> ImagesMaker:
        """Who makes the images."""
        return ImagesMaker(self, number)

    def to_send(self) -> ImagesErrand:
        """With explainers as they are spelled: each worker builds its own."""
        columns = tuple(replace(one, built=None) for one in self.job.columns)
        return replace(self, job=replace(self.job, columns=columns))


@dataclass(eq=False)
class ImagesMaker:
    """Makes images of an errand; networks and images are found once."""

    errand: ImagesErrand
    number: int = 0
    _making: Any = field(init=False)
    _source: Any = field(init=False)

    def __post_init__(self) -> None:
        from consilience.dissection.units import known_units
        from consilience.runs.explain import channels_of, check_job, load_models
        from consilience.runs.folder import Writer
        from consilience.runs.making import Making
        from consilience.runs.reuse import Reuse
        from consilience.runs.sources import source_of

        errand = self.errand
        for plugin in errand.plugins:
            registry.load_plugin(plugin)
        job, options = errand.job, errand.options
        if errand.devices:
            device = errand.devices[self.number % len(errand.devices)]
            options = replace(options, device=device)
        models = load_models(job, options)
        for told, model in zip(errand.networks, models, strict=False):
            check_known(model, told)
        after = None
        if errand.asked is not None:
            from consilience.runs.evaluate import scoring_of

            models, after = scoring_of(errand.asked, errand.folder, job, models)
        check_job(job, models)
        self._source = source_of(
            errand.images,
            errand.truth,
            models[0].classes,
            channels_of(models),
            None,
            job.value_range,
        )
        writer = Writer.joining(errand.folder, errand.digest)
        writer.half = job.maps == "float16"
        ids = [model.id for model in models]
        self._making = Making(
            job.columns,
            job.target,
            job.allow_mismatch,
            models,
            writer,
            known_units(job.dissection, ids) if job.dissection else None,
            after,
            errand.batch,
            0 if after is not None else errand.threads,
            errand.panels,
            Reuse.of(errand.reuse, writer.path) if errand.reuse else None,
        )

    def make(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Outcomes of images, as each is kept."""
        for outcome in self._making.images(self._source, places):
            yield asdict(outcome)


def known_by(model: Any) -> tuple[Any, ...]:
    """What two processes must have alike of a network: weights, engine, precision, pass."""
    return (
        model.id,
        getattr(model, "engine", None),
        getattr(model, "precision", None),
        getattr(model, "batch", None),
    )


def check_known(model: Any, told: tuple[Any, ...]) -> None:
    """Raise `ConsilienceError` where a worker's network is another than the run's."""
    if told != known_by(model):
        raise ConsilienceError(
            f"a worker loads {model.spec} as {known_by(model)}, the run has {told}: "
            f"give the options in the spelling, or workers=1"
        )


def check_shared(model: Any, folder: Any) -> None:
    """Raise `ConsilienceError` for what other processes cannot have."""
    if model.spec is None:
        raise ConsilienceError(
            f"workers load the network by its spelling; {model.id} was made in Python: "
            f"give load_model's spelling (package.module:factory), or workers=1"
        )
    if str(folder).startswith("memory:"):
        raise ConsilienceError(
            f"{folder} is the memory of one process; workers need a folder or storage"
        )


def devices_of(device: str | None) -> tuple[str, ...]:
    """Accelerators that workers share, where there are several and none was asked for."""
    import torch

    if device not in (None, "auto") or not torch.cuda.is_available():
        return ()
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


# ---- a process


class _Lines:
    """What a worker says, to the process that started it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, **facts: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(facts) + "\n")
            self._stream.flush()

    def start(self, label: str, total: int) -> int:
        """As a `progress.Reporter`, who passes on words alone."""
        return 0

    def advance(self, task: int, steps: int) -> None:
        """Steps are not passed on."""

    def finish(self, task: int) -> None:
        """Nor are ends."""

    def say(self, message: str) -> None:
        """A line for the person who waits."""
        self.send(say=message)


def main() -> int:
    """Read an errand, then blocks of places, until there are no more."""
    lines = _Lines(os.fdopen(os.dup(sys.stdout.fileno()), "w"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this stops it
    signal.signal(signal.SIGTERM, _stopped)
    first = json.loads(sys.stdin.readline())
    _settle(first)
    blocks = _Blocks()
    with progress.listening(lines):
        try:
            maker = Errand.from_text(first["errand"]).maker(first["number"])
            lines.send(ready=True)
            for block, places in blocks:
                for outcome in maker.make(places):
                    lines.send(outcome=outcome, block=block)
                lines.send(done=block)
        except KeyboardInterrupt:
            return 130
        except ConsilienceError as error:
            lines.send(error=str(error))
            return 1
        except Exception as error:
            lines.send(error=f"{type(error).__name__}: {error}")
            return 1
    return 0


def _stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _settle(first: dict[str, Any]) -> None:
    """Keep to the cores that this worker has."""
    cores = first.get("cores")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


class _Blocks:
    """Blocks of places as they are told; when nobody is there to tell any, the worker
    stops.
    """

    def __init__(self) -> None:
        import queue

        self._told: Any = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            told = json.loads(line)
            self._told.put(
                (told["block"], told["places"]) if "block" in told else None
            )
            if "block" not in told:
                return
        os.kill(os.getpid(), signal.SIGTERM)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        while (told := self._told.get()) is not None:
            yield told


def cores_of(workers: int) -> list[list[int]]:
    """The cores of each of so many workers: as many as there are, shared out."""
    there = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    if workers >= len(there):
        return [[there[number % len(there)]] for number in range(workers)]
    share = len(there) / workers
    return [
        there[round(number * share) : round((number + 1) * share)]
        for number in range(workers)
    ]


def plugin_files() -> tuple[str, ...]:
    """Files that were loaded as plug-ins in this process."""
    return tuple(
        str(Path(str(module.__file__)).resolve())
        for name, module in sorted(sys.modules.items())
        if name.startswith("consilience_plugin_")
        and getattr(module, "__file__", None)
    )


if __name__ == "__main__":
    sys.exit(main())
