"""A whole job in one TOML file: images, networks, explainers, metrics, a dissection, and
how it is run.

Everything that is wrong with it is said at once, before any work.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from consilience import registry
from consilience.files import read_text
from consilience.metrics.suites import asked_metrics
from consilience.runs.dissect import DissectionJob, run_dissection
from consilience.runs.evaluate import Asked, evaluate_images
from consilience.runs.explain import (
    ExplanationJob,
    How,
    LoadOptions,
    channels_of,
    check_job,
    job_from_preset,
    job_from_specs,
    load_models,
    run_explanations,
)
from consilience.runs.sources import source_of
from consilience.study import RunColumn
from consilience.types import DEFAULT_MODEL, ConsilienceError

KEYS = {
    "images": list,
    "truth": str,
    "output": str,
    "networks": list,
    "explainers": list,
    "columns": list,
    "preset": str,
    "target": str,
    "view": str,
    "value_range": list,
    "allow_mismatch": bool,
    "maps": str,
    "title": str,
    "plugins": list,
    "metrics": list,
    "suite": str,
    "seed": int,
    "loading": dict,
    "run": dict,
    "dissection": dict,
}
"""What a job file may hold, and of which kind."""
CALLED = {
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    dict: "a table",
}
COLUMN_KEYS = ("label", "by", "model", "view", "mask", "target")
DISSECTION_KEYS = ("concepts", "network", "layers", "output", "options")


class MistakesError(ConsilienceError):
    """Several things are wrong; ``lines`` has one each."""

    def __init__(self, what: str, mistakes: Sequence[str]) -> None:
        count = len(mistakes)
        head = f"{what}: {count} mistake{'s' if count > 1 else ''}"
        self.lines = [head, *(f"  {one}" for one in mistakes)]
        super().__init__(f"{head}: {'; '.join(mistakes)}")


@dataclass(frozen=True)
class Work:
    """What a job file asks: a run of explanations for each network, evaluated where
    metrics are asked for, and a dissection.
    """

    images: tuple[str, ...] = ()
    truth: str | None = None
    jobs: tuple[tuple[str, ExplanationJob], ...] = ()
    options: LoadOptions = field(default_factory=LoadOptions)
    asked: Asked | None = None
    how: How = field(default_factory=How)
    dissection: tuple[DissectionJob, str] | None = None


def read_job(path: str | Path, **changes: Any) -> Work:
    """Read a job file; ``changes`` take the place of its keys (``output``) and of those of
    its table ``run``.

    Raises `MistakesError` with everything that is wrong.
    """
    file = Path(path)
    try:
        told = tomllib.loads(read_text(file, "job file"))
    except tomllib.TOMLDecodeError as error:
        raise ConsilienceError(f"{file} is no TOML: {error}") from None
    if changes.get("output") is not None:
        told["output"] = changes.pop("output")
    run = {key: value for key, value in changes.items() if value is not None}
    if run:
        told["run"] = {**told.get("run", {}), **run}
    return work_of(told, str(file), file.parent)


def run_job(job: str | Path | Mapping[str, Any], **changes: Any) -> list[Any]:
    """Do a job that stands in a TOML file, or in a dict of the same keys; returns the
    finished runs, evaluations and dissections. ``changes`` are as in `read_job`.
    """
    if isinstance(job, Mapping):
        return do_work(work_of({**job, **changes}, "the job"))
    return do_work(read_job(job, **changes))


@dataclass
class _Reading:
    """A job that is read, and what is wrong with it."""

    told: Mapping[str, Any]
    folder: Path
    mistakes: list[str] = field(default_factory=list)

    def tried(self, what: str, make: Callable[..., Any], *given: Any) -> Any:
        """What is made, or None and a mistake."""
        try:
            return make(*given)
        except ConsilienceError as error:
            self.mistakes.append(f"{what}: {error}")
        except (TypeError, ValueError) as error:
            self.mistakes.append(f"{what}: {error}")
        return None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the kind it must have."""
        return self.told.get(key, default)

    def beside(self, path: str) -> str:
        """A path as the file means it: beside itself; spellings and addresses stay."""
        if ":" in path or Path(path).is_absolute():
            return path
        return str(self.folder / path)


def work_of(told: Mapping[str, Any], where: str, folder: Path | None = None) -> Work:
    """A job from plain data, as `read_job`; ``where`` names it in errors, paths are
    relative to ``folder``.
    """
    reading = _Reading(told, folder or Path())
    _check_kinds(reading)
    if reading.mistakes:
        raise MistakesError(where, reading.mistakes)
    for plugin in reading.get("plugins", []):
        reading.tried(
            "plugins",
            registry.load_plugin,
            reading.beside(plugin),
        )
    work = Work(
        tuple(reading.beside(str(one)) for one in reading.get("images", [])),
        reading.beside(told["truth"]) if "truth" in told else None,
        _jobs(reading),
        reading.tried("loading", lambda: LoadOptions(**reading.get("loading", {})))
        or LoadOptions(),
        _asked(reading),
        _how(reading),
        _dissection(reading),
    )
    if not work.images and work.dissection is None:
        reading.mistakes.append("images: none are named")
    _check_work(work, reading)
    if reading.mistakes:
        raise MistakesError(where, list(dict.fromkeys(reading.mistakes)))
    return work


def _check_kinds(reading: _Reading) -> None:
    for key, value in reading.told.items():
        if key not in KEYS:
            reading.mistakes.append(registry.unknown("key", key, KEYS))
        elif not isinstance(value, KEYS[key]) or (
            KEYS[key] is int and isinstance(value, bool)
        ):
            said = CALLED[KEYS[key]]
            reading.mistakes.append(f"{key} is {said}; got {value!r}")
    for key, known in (
        ("run", tuple(one.name for one in fields(How))),
        ("loading", tuple(one.name for one in fields(LoadOptions))),
        ("dissection", DISSECTION_KEYS),
    ):
        table = reading.told.get(key)
        if isinstance(table, dict):
            reading.mistakes += [
                f"{key}: {registry.unknown('key', name, known)}"
                for name in table
                if name not in known
            ]


def _how(reading: _Reading) -> How:
    told = dict(reading.get("run", {}))
    for key in ("reuse", "shard"):
        if isinstance(told.get(key), list):
            told[key] = tuple(told[key])
    if isinstance(told.get("shard"), str):
        told["shard"] = reading.tried("run", lambda: shard_of(told["shard"]))
    found: How | None = reading.tried("run", lambda: How(**told))
    return found or How()


def shard_of(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers."""
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
        raise ConsilienceError(f"shard is I/N with I from 1 to N; got {text!r}")
    return int(number), int(count)


def _asked(reading: _Reading) -> Asked | None:
    metrics, suite = reading.get("metrics", []), reading.get("suite")
    if not metrics and suite is None:
        return None
    for one in metrics:
        reading.tried("metrics", registry.metrics.build, one)
    found = reading.tried("suite", lambda: asked_metrics(metrics, suite))
    return Asked(tuple(found or ()), suite, reading.get("seed", 0))


def _jobs(reading: _Reading) -> tuple[tuple[str, ExplanationJob], ...]:
    """By folder the run of each network."""
    if not reading.get("images"):
        return ()
    output = reading.beside(str(reading.get("output", "run")))
    networks = [str(one) for one in reading.get("networks", [DEFAULT_MODEL])]
    twice = {name for name in networks if networks.count(name) > 1}
    if twice:
        reading.mistakes.append(f"networks: {sorted(twice)[0]} is named twice")
    told = {
        key: reading.told[key] for key in ("title", "maps") if key in reading.told
    }
    made: list[tuple[str, ExplanationJob]] = []
    for network in networks:
        job = reading.tried("explainers", _job, reading, network)
        if job is None:
            continue
        bounds = reading.get("value_range")
        job = reading.tried("maps", lambda job=job: replace(job, **told)) or job
        job = replace(
            job,
            allow_mismatch=job.allow_mismatch
            or bool(reading.get("allow_mismatch", False)),
            value_range=(float(bounds[0]), float(bounds[1])) if bounds else None,
        )
        folder = output
        if len(networks) > 1:
            from consilience.files import file_stem

            folder = f"{output.rstrip('/')}/{file_stem(network)}"
        made.append((folder, job))
    return tuple(made)


def _job(reading: _Reading, network: str) -> ExplanationJob:
    target, view = reading.get("target"), reading.get("view")
    columns = reading.get("columns")
    if columns is not None:
        made = []
        for number, one in enumerate(columns, 1):
            unknown = [key for key in one if key not in COLUMN_KEYS]
            if unknown or "by" not in one:
                said = (
                    registry.unknown("key", unknown[0], COLUMN_KEYS)
                    if unknown
                    else "by is missing"
                )
                raise ConsilienceError(f"column {number}: {said}")
            registry.explainers.build(one["by"])
            made.append(
                RunColumn(
                    **{"label": one["by"], "model": network, "view": view, **one}
                )
            )
        return ExplanationJob(tuple(made), target or "predicted")
    if "preset" in reading.told:
        return job_from_preset(reading.told["preset"], [network], target, view)
    by = reading.get("explainers", ["gradcam", "lime"])
    wrong = []
    for one in by:
        try:
            registry.explainers.build(one)
        except ConsilienceError as error:
            wrong.append(str(error))
    if wrong:
        raise ConsilienceError("; ".join(wrong))
    return job_from_specs(by, [network], target, view)


def _dissection(reading: _Reading) -> tuple[DissectionJob, str] | None:
    told = reading.get("dissection")
    if told is None:
        return None
    if "concepts" not in told:
        reading.mistakes.append("dissection: concepts are missing")
        return None
    output = told.get("output") or str(
        Path(str(reading.get("output", "run"))) / "dissection"
    )
    job = DissectionJob(
        reading.beside(told["concepts"]),
        told.get("network") or reading.get("networks", [DEFAULT_MODEL])[0],
        tuple(told.get("layers", ())),
        tuple(told.get("options", {}).items()),
    )
    return job, reading.beside(output)


def _check_work(work: Work, reading: _Reading) -> None:
    """Networks, images, targets: what can be known before the first image."""
    channels, classes = 3, ()
    for _, job in work.jobs:
        name = job.columns[0].model or DEFAULT_MODEL
        models = reading.tried(f"network {name}", load_models, job, work.options)
        if models is None:
            continue
        channels, classes = channels_of(models), models[0].classes
        reading.tried(f"network {name}", check_job, job, models)
    if work.images:
        reading.tried(
            "images", lambda: source_of(work.images, work.truth, classes, channels)
        )
    if work.dissection is not None:
        from consilience.dissection.concepts import load_concepts

        reading.tried("dissection", load_concepts, work.dissection[0].concepts)


def do_work(work: Work, command: str = "") -> list[Any]:
    """Do all of it; returns the finished runs, evaluations and dissections. Of a shard
    nothing is finished, and the list is empty.
    """
    finished: list[Any] = []
    for folder, job in work.jobs:
        make: Callable[..., Any] = (
            run_explanations
            if work.asked is None
            else partial(evaluate_images, work.asked)
        )
        made = make(
            job, work.images, folder, work.truth, work.options, command, how=work.how
        )
        finished += [made] if made is not None else []
    if work.dissection is not None and (
        work.how.shard is None or work.how.shard[0] == 1
    ):
        job_of, folder = work.dissection
        loading = asdict(work.options)
        finished.append(run_dissection(job_of, folder, loading, command, work.how))
    return finished
