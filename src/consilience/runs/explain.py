"""A data set, explained column by column into a run's folder; a run that was killed
continues where it was.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from consilience import api, inputs, progress, registry, study, targets
from consilience.dissection.result import UNITS
from consilience.dissection.units import known_units
from consilience.files import digest_of_data, place, read_json
from consilience.models.engines.threads import steady_threads
from consilience.models.load import as_model, load_model
from consilience.runs.crew import Crew, join_cluster
from consilience.runs.folder import JOB, Run, Writer, file_content
from consilience.runs.log import Log
from consilience.runs.making import IMAGES_AT_A_TIME, Made, Making, Outcome
from consilience.runs.merging import APART, finish_run, merge_records, missing_of
from consilience.runs.reuse import Reuse
from consilience.runs.sources import Source, source_of
from consilience.runs.worker import (
    ImagesErrand,
    check_shared,
    devices_of,
    known_by,
    plugin_files,
)
from consilience.show import words
from consilience.study import RunColumn
from consilience.types import (
    DEFAULT_MODEL,
    ConsilienceError,
    Explainer,
    Explanation,
    Model,
    Sample,
    ViewMode,
)


@dataclass(frozen=True)
class ExplanationJob:
    """What is asked of every image: a column for each explainer, with its own model and
    view.
    """

    columns: tuple[RunColumn, ...]
    target: str = "predicted"
    allow_mismatch: bool = False
    preset: str | None = None
    title: str = "Explanations compared"
    note: str = ""
    published: bool = False
    dissection: str | None = None
    value_range: tuple[float, float] | None = None
    maps: str = "float32"
    """How maps are kept: ``float32``, or ``float16`` (an error of at most 2**-12 of the
    largest value, recorded as ``map_error``; masks and numbers are of the whole map)."""

    def __post_init__(self) -> None:
        if self.maps not in ("float32", "float16"):
            raise ConsilienceError(f"maps is float32 or float16; got {self.maps!r}")


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded and run; the same for every column."""

    weights: str | None = None
    labels: str | None = None
    device: str | None = None
    engine: str | None = None
    precision: str | None = None
    memory: int | str | None = None


@dataclass(frozen=True)
class How:
    """How a run is made; what comes out does not depend on it.

    ``batch`` images are taken at a time, ``threads`` ask for scores beside each other,
    ``workers`` processes share the images, or the actors of a Ray ``cluster`` (``auto``
    or an address; 0 workers: as many as it has room for); ``shard`` ``(i, n)`` makes the
    i-th of n parts, which `merge_run` puts together; ``panels`` draws every image;
    ``reuse`` are runs whose explanations are taken where nothing
    that they depend on has changed.
    """

    batch: int = IMAGES_AT_A_TIME
    threads: int = 2
    workers: int = 1
    panels: bool = False
    reuse: tuple[str, ...] = ()
    cluster: str | None = None
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise ConsilienceError(
                f"shard is I/N with I from 1 to N; got {self.shard[0]}/{self.shard[1]}"
            )
        least_workers = 0 if self.cluster is not None else 1
        for name, least in (("batch", 1), ("threads", 0), ("workers", least_workers)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConsilienceError(
                    f"{name} is a whole number from {least}; got {value!r}"
                )

    @property
    def several(self) -> bool:
        """Whether other processes make the images."""
        return self.workers != 1 or self.cluster is not None

    def record(self) -> dict[str, Any]:
        """What the run's record says of it."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "workers": self.workers,
            **({"cluster": self.cluster} if self.cluster else {}),
            "cores": os.cpu_count(),
            "machine": platform.node(),
        }


def run(
    model: Any,
    images: Any,
    by: str | Explainer | Sequence[str | Explainer] = ("gradcam", "lime"),
    output: str | Path | None = None,
    target: str | Sequence[str] = "predicted",
    view: ViewMode | None = None,
    truth: str | Path | None = None,
    how: How | None = None,
) -> Run:
    """Explain images into a folder, compare the explanations, write the
    report; returns the finished `Run`.

    ``model`` and ``images`` are whatever `explain` takes; of a data set no image stays in
    memory (it is gone through twice). The same call
    continues a run that was stopped; ``output`` is ``runs/DATE-TIME`` unless given, and
    ``how`` says how many workers make it.
    Raises `ConsilienceError` where ``output`` holds another job.
    """
    specs = [by] if isinstance(by, str) or not isinstance(by, Sequence) else by
    job = job_from_specs(specs, None, str(target), view)
    model = as_model(model)
    given: list[str | Path | Sample] = []
    again: inputs.Again | None = None
    if isinstance(images, str | Path | Sample):
        given = [images]
    elif isinstance(images, list | tuple) and all(
        isinstance(one, str | Path | Sample) for one in images
    ):
        given = list(images)
    else:
        again = inputs.Again.of(images, inputs.Shown.of(model))
    folder = output if output is not None else dated_folder()
    models = [model] * len(job.columns)
    if how is not None and how.several:  # workers load it by its spelling
        named = tuple(replace(one, model=model.spec) for one in job.columns)
        job = replace(job, columns=named)
    finished = run_explanations(
        job, given, folder, truth, models=models, again=again, how=how
    )
    if finished is None:
        raise ConsilienceError(
            f"{folder}: this part is made; merge_run puts the parts together"
        )
    return finished


def dated_folder() -> Path:
    """Where a run goes unless told: ``runs/DATE-TIME``."""
    return Path("runs") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")


def run_explanations(
    job: ExplanationJob,
    images: Sequence[str | Path | Sample],
    folder: str | Path,
    truth: str | Path | None = None,
    options: LoadOptions | None = None,
    command: str = "",
    models: Sequence[Model] | None = None,
    after: Callable[[Sample, Sequence[Explanation]], None] | None = None,
    again: inputs.Again | None = None,
    how: How | None = None,
    asked: Any = None,
    made: Made | None = None,
) -> Run | None:
    """Explain every one of ``images`` (files, folders, globs, samples) and keep
    everything in ``folder``.

    An image that fails is named in the manifest and the rest is done. ``command`` is
    what was typed, for the report; ``models`` are the columns' own where they are
    loaded already, ``after`` is called with each image and its explanations, ``made``
    with each explanation as soon as it is there (by this process alone). Memory
    does not grow with the number of images beyond a table row and one packed mask (6
    kB) an explanation, which the permutation of images needs.
    """
    models = models or load_models(job, options or LoadOptions())
    check_job(job, models)
    source = source_of(
        images, truth, models[0].classes, channels_of(models), again, job.value_range
    )
    parts = describe_job(job, models) | source.parts()
    call = call_of(job, images, truth, options, asked)
    writer = Writer(folder, parts, {"command": command, "call": call})
    writer.half = job.maps == "float16"
    units = (
        known_units(job.dissection, [model.id for model in models])
        if job.dissection
        else None
    )
    job = replace(job, columns=seeded(job.columns))
    how = how or How()
    if made is not None and how.several:
        raise ConsilienceError("made= is told by one process; got several workers")
    _find_out_first(job, models)
    images_made = _Images(job, models, source, writer, how, after, units, made)
    if how.several:
        _refuse_unshared(models, images, again, writer, how)
        errand = ImagesErrand(
            job,
            options or LoadOptions(),
            tuple(str(one) for one in images),
            None if truth is None else str(truth),
            str(folder),
            writer.digest,
            how.batch,
            how.threads,
            how.panels,
            how.reuse,
            asked,
            plugin_files(),
            devices_of(options.device if options is not None else None),
            tuple(map(known_by, models)),
        )
        workers = how.workers
        if how.cluster is not None:
            room = join_cluster(how.cluster)
            workers = workers or room
        images_made.crew = Crew(errand, workers, how.cluster, how.batch)
    part = "" if how.shard is None else f"{how.shard[0]}-of-{how.shard[1]}"
    with writer.locked(part):
        log = Log(writer.path, part)
        images_made.make(log)
        if how.shard is not None:
            log.event("finished")
            return None
        merged = merge_records(source, writer, job.allow_mismatch)
        finished = finish_run(
            merged, source, writer, models, job, log.record(), command
        )
        log.event("finished")
        return finished


def _find_out_first(job: ExplanationJob, models: Sequence[Model]) -> None:
    """Let networks find out how many gradients are fastest before images are made beside
    each other, so that threads and workers do not each find out something else.
    """
    for column, model in zip(job.columns, models, strict=True):
        explainer = column.explainer
        passes = max(getattr(explainer, name, 0) for name in ("steps", "samples"))
        ask = getattr(model, "for_gradients", None)
        if ask is not None and "gradients" in explainer.needs:
            with steady_threads():
                ask(passes)


@dataclass(eq=False)
class _Images:
    """The images of a run, made here or by workers."""

    job: ExplanationJob
    models: Sequence[Model]
    source: Source
    writer: Writer
    how: How
    after: Callable[[Sample, Sequence[Explanation]], None] | None
    units: Any
    made: Made | None = None
    crew: Crew | None = None

    def make(self, log: Log) -> None:
        """Make what is missing; every outcome is said, and stands in the log."""
        places = missing_of(self.source, self.writer)
        total = len(self.source.names)
        if self.how.shard is not None:  # by all images, whoever has made which
            mine = list(part_of(total, self.how.shard))
            left = set(places)
            places, total = [place for place in mine if place in left], len(mine)
        done = total - len(places)
        log.begin(total, len(places), self.how.record())
        # the first of many comes when all that are taken together have been passed
        begins = self.how.several or len(places) > self.how.batch
        estimate = _Estimate(len(places), start_with_first=begins)
        cores = os.cpu_count() or 1
        if self.crew is None and len(places) > APART and cores >= IDLE_CORES:
            progress.say(
                f"{cores} cores are here; --workers {cores // 2} uses them better"
            )
        if done and places:
            progress.say(f"{done} of {total} images are there already")
        with progress.task("images", len(places)) as running:
            try:
                for outcome in self._outcomes(places):
                    log.outcome(outcome)
                    if outcome.reason is not None:
                        self._say_failed(outcome)
                    running.advance()
                    estimate.another()
            except BaseException:
                log.event("stopped")
                raise

    def _say_failed(self, outcome: Outcome) -> None:
        name, reason = outcome.name, outcome.reason or ""
        if self.crew is not None:
            self.writer.fail(name, reason)
        progress.say(f"{name}: {reason}" if name not in reason else reason)

    def _outcomes(self, places: Sequence[int]) -> Iterator[Outcome]:
        if not places:
            return iter(())
        if self.crew is not None:
            return self.crew.make(places, self.source.names)
        making = Making(
            self.job.columns,
            self.job.target,
            self.job.allow_mismatch,
            self.models,
            self.writer,
            self.units,
            self.after,
            self.how.batch,
            0 if self.after is not None else self.how.threads,
            self.how.panels,
            Reuse.of(self.how.reuse, self.writer.path) if self.how.reuse else None,
            self.made,
        )
        return making.images(self.source, places)


def call_of(
    job: ExplanationJob,
    images: Sequence[str | Path | Sample],
    truth: str | Path | None,
    options: LoadOptions | None,
    asked: Any = None,
) -> dict[str, Any]:
    """What was asked, as plain data from which `job_of_call` asks it again: paths are
    whole.
    """
    columns = [
        {
            key: value
            for key, value in vars(column).items()
            if key in ("label", "by", "model", "view", "mask", "target", "unseeded")
        }
        for column in job.columns
    ]
    plain = {
        key: getattr(job, key)
        for key in ExplanationJob.__dataclass_fields__
        if key != "columns"
    }
    return {
        "job": {**plain, "columns": columns},
        "images": [_whole(one) for one in images if not isinstance(one, Sample)],
        "truth": None if truth is None else _whole(truth),
        "options": asdict(options or LoadOptions()),
        "plugins": list(plugin_files()),
        "asked": None if asked is None else asdict(asked),
    }


def _whole(path: str | Path) -> str:
    """A path from wherever it is asked again; spellings stay."""
    text = str(path)
    return text if ":" in text else str(Path(text).expanduser().absolute())


def job_of_call(
    call: Mapping[str, Any],
) -> tuple[ExplanationJob, list[str], str | None, LoadOptions]:
    """Inverse of `call_of`; plug-ins are loaded."""
    for plugin in call["plugins"]:
        registry.load_plugin(plugin)
    told = dict(call["job"])
    columns = tuple(RunColumn(**column) for column in told.pop("columns"))
    if told.get("value_range"):
        told["value_range"] = tuple(told["value_range"])
    job = ExplanationJob(columns, **told)
    return job, list(call["images"]), call["truth"], LoadOptions(**call["options"])


IDLE_CORES = 6
"""Cores from which one process leaves some idle: its torch passes have two threads."""


def part_of(total: int, shard: tuple[int, int]) -> Iterator[int]:
    """The places of one of n parts of ``total`` images: every n-th block of 32, or of
    fewer where there are few.
    """
    number, count = shard
    block = max(1, min(IMAGES_AT_A_TIME, -(-total // (4 * count))))
    return (place for place in range(total) if place // block % count == number - 1)


def _refuse_unshared(
    models: Sequence[Model],
    images: Sequence[Any],
    again: inputs.Again | None,
    writer: Writer,
    how: How,
) -> None:
    """What other processes cannot have."""
    for model in models:
        check_shared(model, writer.path)
    if again is not None or any(isinstance(one, Sample) for one in images):
        raise ConsilienceError(
            "workers read images themselves: give files, folders, tables or shards, or workers=1"
        )


def merge_run(folder: str | Path, command: str = "") -> Run:
    """Put together what the parts of a run have made (`How.shard`); nothing is explained,
    and failures stay what they are.

    Raises `ConsilienceError` where images are neither made nor failed.
    """
    where = place(folder)
    if not (where / JOB).is_file():
        raise ConsilienceError(f"{folder} holds no run to merge")
    call = read_json(where / JOB).get("call")
    if not call or not call["images"]:
        raise ConsilienceError(
            f"{folder} was made in Python from images in memory: give the same call again"
        )
    job, images, truth, options = job_of_call(call)
    models = load_models(job, options)
    check_job(job, models)
    source = source_of(
        images, truth, models[0].classes, channels_of(models), None, job.value_range
    )
    parts = describe_job(job, models) | source.parts()
    writer = Writer(folder, parts, {"command": command, "call": call})
    with writer.locked():
        left = [
            source.names[place]
            for place in missing_of(source, writer)
            if writer.failure(source.names[place]) is None
        ]
        if left:
            more = ", ..." if len(left) > SHOWN_MISSING else ""
            raise ConsilienceError(
                f"{writer.path}: {len(left)} of {len(source.names)} images are not made yet "
                f"({', '.join(left[:SHOWN_MISSING])}{more}); run the missing parts first"
            )
        merged = merge_records(source, writer, job.allow_mismatch)
        record = Log(writer.path).record()
        return finish_run(merged, source, writer, models, job, record, command)


SHOWN_MISSING = 3


class _Estimate:
    """How long the rest may take, said once, as soon as it can be told; what goes
    before the first image is not counted where it stands for more than one.
    """

    def __init__(self, total: int, start_with_first: bool = False) -> None:
        self._total, self._done, self._said = total, 0, False
        self._start = time.perf_counter()
        self._begins = start_with_first

    def another(self) -> None:
        """One more image is done."""
        if self._begins:
            self._begins, self._start = False, time.perf_counter()
            self._total -= 1
            return
        self._done += 1
        spent, left = time.perf_counter() - self._start, self._total - self._done
        if self._said or spent < SOON or not left:
            return
        self._said = True
        rest = spent / self._done * left
        if rest > WORTH_SAYING:
            took, more = (words.format_seconds(one) for one in (spent, rest))
            made = words.count_of(self._done, "image")
            left_said = words.count_of(left, "more image")
            progress.say(f"{made} took {took}; {left_said} may take {more}")


SOON, WORTH_SAYING = 2.0, 20.0
"""Seconds after which a rate can be told, and that a person waits without asking."""


def channels_of(models: Sequence[Model]) -> int:
    """For how many channels images are read: the most that a model takes, or one where
    all are grey.
    """
    return max(int(getattr(model, "channels", 3)) for model in models)


def load_models(job: ExplanationJob, options: LoadOptions) -> tuple[Model, ...]:
    """The model of each column; columns of the same spelling share one."""
    specs = [column.model or DEFAULT_MODEL for column in job.columns]
    loaded = {
        spec: load_model(spec, **asdict(options)) for spec in dict.fromkeys(specs)
    }
    return tuple(loaded[spec] for spec in specs)


def check_job(job: ExplanationJob, models: Sequence[Model]) -> None:
    """Everything that can be refused before the first image: names, options, layers,
    classes, masks.
    """
    for column, model in zip(job.columns, models, strict=True):
        api.resolve_explainer(model, column.explainer)
        api.check_target_name(model, column.target or job.target)


def describe_job(job: ExplanationJob, models: Sequence[Model]) -> dict[str, Any]:
    """What makes this job this job and no other, besides its images."""
    columns = {
        column.label: {
            "place": place,
            "explainer": registry.spell(column.explainer, full=True),
            "plug-in digest": registry.source_digest(column.explainer, column.cutter),
            "model": model.id,
            "class names digest": digest_of_data(model.classes),
            "engine": model.facts.get("engine"),
            "precision": model.facts.get("precision"),
            "target": targets.pinned_spelling(column.target),
            "view": column.view,
            "mask": column.mask,
            "unseeded": column.unseeded,
        }
        for place, (column, model) in enumerate(
            zip(job.columns, models, strict=True), 1
        )
    }
    return {
        "columns": columns,
        "target": targets.pinned_spelling(job.target),
        "allow_mismatch": job.allow_mismatch,
        "dissection": dissection_content(job.dissection),
        "version": api.versions()["consilience"],
        **({"value_range": job.value_range} if job.value_range else {}),
        **({"maps": job.maps} if job.maps != "float32" else {}),
    }


def dissection_content(folder: str | None) -> dict[str, str] | None:
    """A dissection as part of a job: its numbers, wherever the folder lies."""
    if folder is None:
        return None
    if not (Path(folder) / "dissection.json").is_file():
        raise ConsilienceError(f"{folder} holds no dissection")
    numbers = [
        file_content(Path(folder) / name) for name in ("dissection.json", UNITS)
    ]
    return {"file": Path(folder).name, "digest": digest_of_data(numbers)}


def seeded(columns: Sequence[RunColumn]) -> tuple[RunColumn, ...]:
    """Columns that are to be unseeded get a seed that nobody chose, as an unseeded
    generator would; it is recorded.
    """
    return tuple(
        replace(
            column,
            by=study.with_seed(column.by, secrets.randbelow(2**31)),
            built=None,
        )
        if column.unseeded
        else column
        for column in columns
    )


def job_from_specs(
    by: Sequence[str | Explainer],
    models: Sequence[str] | None = None,
    target: str | None = None,
    view: ViewMode | None = None,
    title: str = "Explanations compared",
) -> ExplanationJob:
    """A job with a column for each explainer; one model for all columns, or one for
    each.
    """
    built: list[Explainer] = [registry.explainers.build(spec) for spec in by]
    specs = [
        spec if isinstance(spec, str) else registry.spell(explainer)
        for spec, explainer in zip(by, built, strict=True)
    ]
    if len(set(specs)) < len(specs):
        raise ConsilienceError(f"an explainer is asked for twice: {', '.join(specs)}")
    names = [type(explainer).spelled for explainer in built]  # type: ignore[attr-defined]
    columns = [
        RunColumn(
            label=_label(explainer) if names.count(name) == 1 else spec,
            by=spec,
            view=view,
            built=explainer,
        )
        for spec, name, explainer in zip(specs, names, built, strict=True)
    ]
    return ExplanationJob(
        _with_models(columns, models), target or "predicted", title=title
    )


def job_from_preset(
    name: str,
    models: Sequence[str] | None = None,
    target: str | None = None,
    view: ViewMode | None = None,
) -> ExplanationJob:
    """A named protocol; a target or view given here overrides those of its columns."""
    preset = study.load_preset(name)
    columns = tuple(
        replace(column, target=target or column.target, view=view or column.view)
        for column in study.columns_for(preset, models)
    )
    return ExplanationJob(
        columns,
        target or "predicted",
        preset.allow_mismatch,
        preset.name,
        preset.title,
        preset.note,
        preset.published,
    )


def _label(explainer: Explainer) -> str:
    return str(getattr(explainer, "label", type(explainer).spelled))  # type: ignore[attr-defined]


def _with_models(
    columns: Sequence[RunColumn], models: Sequence[str] | None
) -> tuple[RunColumn, ...]:
    given = list(models or [DEFAULT_MODEL])
    if len(given) == 1:
        given *= len(columns)
    if len(given) != len(columns):
        raise ConsilienceError(
            f"{len(given)} models for {len(columns)} columns; give one for all or one for each"
        )
    return tuple(
        replace(column, model=model)
        for column, model in zip(columns, given, strict=True)
    )
