"""A data set, explained column by column into a run's folder; a run that was killed
continues where it was.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pandas as pd

from consilience import api, data, inputs, progress, registry, study, targets
from consilience.agreement.audit import Auditor
from consilience.agreement.masks import default_cutter, largest, pixels_of
from consilience.agreement.overlap import Agreement, iou, spearman
from consilience.dissection.result import UNITS
from consilience.dissection.units import explain_by_units, known_units
from consilience.files import (
    CannotWriteError,
    digest_of_data,
    file_stem,
    write_bytes,
)
from consilience.models.load import as_model, load_model
from consilience.runs.folder import (
    MAPS,
    PANELS,
    ImageResult,
    KeptExplanation,
    Run,
    Writer,
    file_content,
    files_content,
    findings_as_rows,
)
from consilience.show import figures, html, words
from consilience.study import RunColumn
from consilience.types import (
    DEFAULT_MODEL,
    Array,
    ConsilienceError,
    Explainer,
    Explanation,
    Model,
    Network,
    Sample,
    ViewMode,
    unexpected,
)

LOW = ("bf16", "f16")


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
class Failed:
    """An image that could not be read or explained."""

    name: str
    reason: str


def run(
    model: Any,
    images: Any,
    by: str | Explainer | Sequence[str | Explainer] = ("gradcam", "lime"),
    output: str | Path | None = None,
    target: str | Sequence[str] = "predicted",
    view: ViewMode | None = None,
    truth: str | Path | None = None,
) -> Run:
    """Explain images into a folder, compare the explanations, write the
    report; returns the finished `Run`.

    ``model`` and ``images`` are whatever `explain` takes; of a data set no image stays in
    memory (it is gone through twice). The same call
    continues a run that was stopped; ``output`` is ``runs/DATE-TIME`` unless given.
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
    return run_explanations(
        job, given, folder, truth, models=[model] * len(job.columns), again=again
    )


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
) -> Run:
    """Explain every one of ``images`` (files, folders, globs, samples) and keep
    everything in ``folder``.

    An image that fails is named in the manifest and the rest is done. ``command`` is
    what was typed, for the report; ``models`` are the columns' own where they are
    loaded already, ``after`` is called with each image and its explanations. Memory
    does not grow with the number of images beyond a table row and one packed mask (6
    kB) an explanation, which the permutation of images needs.
    """
    start = time.perf_counter()
    models = models or load_models(job, options or LoadOptions())
    check_job(job, models)
    source = _Source(
        images,
        truth,
        models[0].classes,
        _channels_of(models),
        again,
        job.value_range,
    )
    parts = describe_job(job, models) | source.parts()
    writer = Writer(folder, parts, {"command": command})
    units = (
        known_units(job.dissection, [model.id for model in models])
        if job.dissection
        else None
    )
    session = _Session(
        replace(job, columns=seeded(job.columns)), models, writer, units
    )
    session.after = after
    with progress.task("images", len(source)) as running:
        for place, sample in enumerate(source.samples()):
            began = time.perf_counter()
            session.take(sample)
            running.advance()
            if place == 0 and len(source) > 1:
                _say_estimate(time.perf_counter() - began, len(source) - 1)
    return session.finish(time.perf_counter() - start, command)


def _say_estimate(seconds: float, left: int) -> None:
    """How long the rest may take, where it is worth a line; the first image is the
    slowest, since engines start with it.
    """
    if seconds * left > WORTH_SAYING:
        took, rest = (words.format_seconds(one) for one in (seconds, seconds * left))
        images_left = words.count_of(left, "more image")
        progress.say(f"the first image took {took}; {images_left} may take {rest}")


WORTH_SAYING = 20.0
"""Seconds that a person waits without asking how long."""


def _channels_of(models: Sequence[Model]) -> int:
    """For how many channels images are read: the most that a model takes, or one where
    all are grey.
    """
    return max(int(getattr(model, "channels", 3)) for model in models)


class _Source:
    """The images of a run: files, read one by one, or samples that are there."""

    def __init__(
        self,
        given: Sequence[str | Path | Sample],
        truth: str | Path | None,
        classes: Sequence[str],
        channels: int = 3,
        again: inputs.Again | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self._range = value_range
        self._there = [one for one in given if isinstance(one, Sample)]
        self._again, self._known = again, dict[str, str]()
        for one in again or ():
            known = one.digest if isinstance(one, Sample) else one.reason
            if one.name in self._known:
                raise ConsilienceError(f"two images are called {one.name!r}")
            self._known[one.name] = known
        self._channels = channels
        patterns = [str(one) for one in given if not isinstance(one, Sample)]
        wanted = bool(patterns) or not (given or again)
        self._files = data.find_images(patterns) if wanted else []
        self._truth_file, self._classes = truth, classes
        names = [*data.names_of(self._files), *(one.name for one in self._there)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConsilienceError(f"two images are called {twice[0]!r}")
        if (left := data.passed_over(patterns)) is not None:
            progress.say(left)
        self._truth = data.read_truth(truth, classes) if truth is not None else None
        if self._truth is not None:
            unmatched = self._truth.unmatched_note(self._files)
            for note in (*self._truth.notes, *([unmatched] if unmatched else [])):
                progress.say(note)

    def __len__(self) -> int:
        return len(self._files) + len(self._there) + len(self._known)

    def parts(self) -> dict[str, Any]:
        """What the images are for the job: content, by name."""
        files = files_content(self._files, data.names_of(self._files))
        there = {one.name: one.digest for one in self._there}
        return {
            "images": {**files, **there, **self._known},
            "truth": file_content(self._truth_file),
        }

    def samples(self) -> Iterator[Sample | data.Failure]:
        """One after the other."""
        if self._files:
            yield from data.read_files(
                self._files, self._truth, self._classes, self._channels, self._range
            )
        yield from self._there
        yield from self._again or ()


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


class _Session:
    """One pass over the images: explains, keeps, and feeds what looks across images."""

    def __init__(
        self,
        job: ExplanationJob,
        models: Sequence[Model],
        writer: Writer,
        units: pd.DataFrame | None = None,
    ) -> None:
        self.job, self.models, self.writer, self.units = job, models, writer, units
        self.agreement, self.auditor = (
            Agreement(allow_mismatch=job.allow_mismatch),
            Auditor(),
        )
        self.labels = [column.label for column in job.columns]
        self.rows: list[dict[str, Any]] = []
        self.precision: list[dict[str, Any]] | None = None
        self.failures: list[Failed] = []
        self.after: Callable[[Sample, Sequence[Explanation]], None] | None = None

    def take(self, sample: Sample | data.Failure) -> None:
        """Explain one image, or take what an earlier try kept; a failure is noted and
        the rest goes on.
        """
        if isinstance(sample, data.Failure):
            self._fail(sample.name, sample.reason)
            return
        for note in sample.notes:
            progress.say(f"{sample.name}: {note}")
        try:
            kept = self.writer.done(sample.name, sample.digest)
            result = self._explain(sample) if kept is None else kept
            explanations, masks = result.explanations, result.masks
            self.agreement.add(explanations, masks, self.labels)
        except (CannotWriteError, progress.Cancelled):
            raise
        except ConsilienceError as error:
            self._fail(sample.name, str(error))
            return
        except (
            Exception
        ) as error:  # one image's, whatever a network or plug-in raises
            self._fail(sample.name, unexpected(error))
            return
        self.auditor.add(explanations, masks, result.prediction, self.labels)
        self.rows += table_rows(result)
        if self.precision is None:
            self.precision = precision_shifts(
                self.job.columns, self.models, explanations
            )
        if self.after is not None:
            self.after(sample, explanations)

    def _fail(self, name: str, reason: str) -> None:
        self.failures.append(Failed(name, reason))
        progress.say(f"{name}: {reason}" if name not in reason else reason)

    def _explain(self, sample: Sample) -> ImageResult:
        """All columns of one image, kept with their panel."""
        explanations = self._carried(
            [
                api.explain(
                    model,
                    sample,
                    column.explainer,
                    column.target or self.job.target,
                    column.view,
                )
                for column, model in zip(self.job.columns, self.models, strict=True)
            ]
        )
        result = ImageResult(
            sample=sample,
            image=self._shown(sample),
            prediction=prediction(sample, explanations[0], self.models[0]),
            items=tuple(map(kept_explanation, self.job.columns, explanations)),
            notes=sample.notes + self._carriers(explanations),
        )
        panel = self.writer.path / PANELS / f"{file_stem(sample.name)}.png"
        write_bytes(panel, figures.panel(result))
        self.writer.put(result)
        return result

    def _carried(self, explanations: list[Explanation]) -> list[Explanation]:
        """With the units that carry each map, where a dissection is at hand."""
        if self.units is None:
            return explanations
        pairs = zip(self.models, explanations, strict=True)
        return [
            explain_by_units(cast(Network, model), [one], self.units)[0]
            for model, one in pairs
        ]

    def _carriers(self, explanations: Sequence[Explanation]) -> tuple[str, ...]:
        """What is known of the units that carry each map, in words."""
        said = [
            words.units_words(one.provenance.get("units")) for one in explanations
        ]
        pairs = zip(self.labels, said, strict=True)
        return tuple(f"{label}: {sentence}" for label, sentence in pairs if sentence)

    def _shown(self, sample: Sample) -> Array:
        view = self.models[0].view(sample, self.job.columns[0].view)
        return (view.rgb * 255).round().astype("uint8")

    def finish(self, seconds: float, command: str) -> Run:
        """Tables, audit, manifest and report."""
        if not self.rows:
            reasons = "; ".join(failed.reason for failed in self.failures[:3])
            raise ConsilienceError(
                f"none of {len(self.failures)} images could be explained: {reasons}"
            )
        table, summary = self.agreement.table(), self.agreement.summary()
        if self.job.published:
            table = study.with_published(table)
        manifest = {
            "version": api.versions()["consilience"],
            "versions": api.versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "title": self.job.title,
            "note": self.job.note,
            "preset": self.job.preset,
            "target": self.job.target,
            "allow_mismatch": self.job.allow_mismatch,
            "model": model_facts(self.models[0], self.rows),
            "models": [
                model_facts(model, self.rows) for model in dict.fromkeys(self.models)
            ],
            "precision": self.precision or [],
            "columns": self._columns(),
            "seconds": seconds,
            "failures": [asdict(failed) for failed in self.failures],
            "summary": summary.to_dict("records"),
            "audit": findings_as_rows(self.auditor.findings(table, summary)),
        }
        finished = self.writer.finish_tables(manifest, pd.DataFrame(self.rows), table)
        html.write_report(finished)
        return finished

    def _columns(self) -> list[dict[str, Any]]:
        first = {row["column"]: row for row in reversed(self.rows)}
        return [
            {
                "name": column.label,
                "explainer": column.by,
                "full": registry.spell(column.explainer, full=True),
                "model": first[column.label]["model"],
                "view": first[column.label]["view"],
                "mask": first[column.label]["mask_rule"],
                "unseeded": column.unseeded,
            }
            for column in self.job.columns
        ]


def model_facts(model: Model, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a model; engine and precision are those of the
    explanations that were made with it.
    """
    mine = [row for row in rows if row["model"] == model.id and row["passes"]]
    ran = {
        key: "+".join(sorted({part for row in mine for part in row[key].split("+")}))
        for key in ("engine", "precision")
    }
    facts = model.facts | {key: said for key, said in ran.items() if said}
    return {
        "spec": model.spec,
        "id": model.id,
        "facts": facts,
        "classes_count": len(model.classes),
    }


# ---- did the precision change the explanation?


def precision_shifts(
    columns: Sequence[RunColumn],
    models: Sequence[Model],
    explanations: Sequence[Explanation],
) -> list[dict[str, Any]]:
    """Rows for the explanations of one image by models of low precision: how far each
    lies from the same made in f32.
    """
    low = [model.facts.get("precision") in LOW for model in models]
    exact = {
        model: model.using(precision="f32")
        for model, is_low in zip(models, low, strict=True)
        if is_low
    }
    return [
        precision_shift(column, exact[model], explanation)
        for column, model, explanation, is_low in zip(
            columns, models, explanations, low, strict=True
        )
        if is_low
    ]


def precision_shift(
    column: RunColumn, exact: Model, explanation: Explanation
) -> dict[str, Any]:
    """Rank correlation, and IoU of the top 20 %, of a map with that of the ``exact``
    model for the same target.
    """
    sample = explanation.sample
    outputs = api.raw_outputs(exact, exact.view(sample, column.view))
    index = explanation.target.index
    target = api.target_of_image(
        exact, sample, explanation.target if index is None else int(index), outputs
    )
    again = api.explain(exact, sample, column.explainer, target, column.view)
    maps = [one.values for one in (explanation, again)]
    tops = [largest(values, pixels_of(0.2, values.size)) for values in maps]
    return {
        "column": column.label,
        "spearman": spearman(*maps),
        "iou_at_20": iou(*tops),
        "image": sample.name,
        "precision": explanation.provenance["precision"],
        "exact": again.provenance["precision"],
    }


def prediction(
    sample: Sample, explanation: Explanation, model: Model
) -> dict[str, Any]:
    """What the model said of an image, beside the truth where it is known."""
    true = None if sample.label is None else api.class_name(model, sample.label)
    return {
        **explanation.provenance["prediction"],
        "true": sample.label,
        "true_name": true,
    }


def kept_explanation(column: RunColumn, explanation: Explanation) -> KeptExplanation:
    """An explanation with the mask its column asks for."""
    if column.unseeded:
        made = {**explanation.provenance, "unseeded": True}
        explanation = replace(explanation, provenance=made)
    cutter = column.cutter or default_cutter(explanation)
    return KeptExplanation(column.label, explanation, cutter.cut(explanation))


def _units_said(provenance: Mapping[str, Any]) -> str:
    """Which units carry a map, in words; nothing where that is not told."""
    units = provenance.get("units") or {}
    return "" if "code" in units else words.units_words(units)


def table_rows(result: ImageResult) -> list[dict[str, Any]]:
    """Rows of ``explanations.parquet``."""
    said = result.prediction
    return [
        {
            "sample": result.name,
            "explainer": item.explanation.explainer,
            "column": item.column,
            "model": item.explanation.model_id,
            "target": item.explanation.target.index,
            "target_name": item.explanation.target.name,
            "score": item.provenance["score"],
            "seconds": item.provenance["seconds"],
            "passes": int(item.provenance.get("passes", 0)),
            "source": result.sample.source,
            "map": f"{MAPS}/{file_stem(result.name)}.npz",
            "key": item.provenance["key"],
            "mask_rule": item.cut.rule,
            "mask_area": item.cut.share,
            "layer": item.provenance.get("layer", ""),
            "verdict": (item.provenance.get("verdict") or {}).get("code", ""),
            "units": _units_said(item.provenance),
            "view": item.provenance["view"],
            "engine": item.provenance.get("engine", ""),
            "precision": item.provenance.get("precision", ""),
            "predicted": said["index"],
            "predicted_name": said["name"],
            "probability": said["probability"],
            "true": said["true"],
            "true_name": said["true_name"],
        }
        for item in result.items
    ]
