"""A data set, explained column by column into a run's folder; a run that was killed
continues where it was.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pandas as pd

from consilience import api, data, images, progress, registry, study, targets
from consilience.agreement.audit import Auditor
from consilience.agreement.masks import Mask, default_cutter, largest, pixels_of
from consilience.agreement.overlap import Agreement, iou, spearman
from consilience.dissection.units import explain_by_units, known_units
from consilience.files import file_stem, write_atomically
from consilience.images import Placement
from consilience.models.load import load_model
from consilience.runs.folder import (
    MAPS,
    PANELS,
    Item,
    Run,
    Stored,
    Writer,
    findings_as_rows,
)
from consilience.show import html, panels
from consilience.study import RunColumn
from consilience.types import (
    DEFAULT_MODEL,
    Array,
    ConsilienceError,
    Explanation,
    Model,
    Network,
    Sample,
    ViewMode,
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
    title: str = "Explanations held against each other"
    note: str = ""
    published: bool = False
    dissection: str | None = None


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


def run_explanations(
    job: ExplanationJob,
    inputs: Sequence[str | Path],
    folder: str | Path,
    truth: str | Path | None = None,
    options: LoadOptions | None = None,
    command: str = "",
    models: Sequence[Model] | None = None,
    after: Callable[[Sample, Sequence[Explanation]], None] | None = None,
) -> Run:
    """Explain every image of ``inputs`` (files, folders, globs) and keep everything in
    ``folder``.

    An image that fails is named in the manifest and the rest is done. ``command`` is
    what was typed, for the report; ``models`` are the columns' own where they are
    loaded already, ``after`` is called with each image and its explanations. Memory
    does not grow with the number of images beyond a table row and one packed mask (6
    kB) an explanation, which the permutation of images needs.
    """
    start = time.perf_counter()
    models = models or load_models(job, options or LoadOptions())
    check_job(job, models)
    paths = data.find_images([str(item) for item in inputs])
    known = data.read_truth(truth, models[0].classes) if truth is not None else None
    for note in known.notes if known is not None else ():
        progress.say(note)
    writer = Writer(folder, describe_job(job, models, paths, truth))
    units = (
        known_units(job.dissection, [model.id for model in models])
        if job.dissection
        else None
    )
    session = _Session(replace(job, columns=seeded(job.columns)), models, writer, units)
    session.after = after
    with progress.task("images", len(paths)) as running:
        for sample in data.read_samples(paths, known, models[0].classes):
            session.take(sample)
            running.advance()
    return session.finish(time.perf_counter() - start, command)


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
        api.resolve_explainer(model, column.by)
        api.check_target_name(model, column.target or job.target)
        if column.mask:
            registry.cutters.build(column.mask)


def describe_job(
    job: ExplanationJob,
    models: Sequence[Model],
    paths: Sequence[Path],
    truth: str | Path | None,
) -> dict[str, Any]:
    """What makes this job this job and no other."""
    engines = [
        {key: model.facts.get(key) for key in ("engine", "precision")}
        for model in models
    ]
    columns = [
        asdict(column)
        | {
            "by": api.explainer_spelling(column.by),
            "target": targets.pinned_spelling(column.target),
        }
        for column in job.columns
    ]
    return {
        **({"dissection": job.dissection} if job.dissection else {}),
        "images": [str(path) for path in paths],
        "truth": None if truth is None else str(truth),
        "columns": columns,
        "models": [model.id for model in models],
        "engines": engines,
        "target": targets.pinned_spelling(job.target),
        "allow_mismatch": job.allow_mismatch,
        "version": api.versions()["consilience"],
    }


def seeded(columns: Sequence[RunColumn]) -> tuple[RunColumn, ...]:
    """Columns that are to be unseeded get a seed that nobody chose, as an unseeded
    generator would; it is recorded.
    """
    return tuple(
        replace(column, by=study.with_seed(column.by, secrets.randbelow(2**31)))
        if column.unseeded
        else column
        for column in columns
    )


def job_from_specs(
    by: Sequence[str],
    models: Sequence[str] | None = None,
    target: str | None = None,
    view: ViewMode | None = None,
    title: str = "Explanations held against each other",
) -> ExplanationJob:
    """A job with a column for each explainer; one model for all columns, or one for
    each.
    """
    if len(set(by)) < len(by):
        raise ConsilienceError(f"an explainer is asked for twice: {', '.join(by)}")
    names = [registry.parse(spec).name for spec in by]
    columns = [
        RunColumn(
            label=_label(spec) if names.count(name) == 1 else spec, by=spec, view=view
        )
        for spec, name in zip(by, names, strict=True)
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


def _label(spec: str) -> str:
    explainer = registry.explainers.build(spec)
    return str(getattr(explainer, "label", type(explainer).spelled))


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
            stored = self.writer.done(sample.name, sample.digest) or self._explain(
                sample
            )
            explanations, masks = rebuild(stored, sample)
            self.agreement.add(explanations, masks, self.labels)
        except ConsilienceError as error:
            self._fail(sample.name, str(error))
            return
        self.auditor.add(explanations, masks, stored.prediction, self.labels)
        self.rows += table_rows(stored)
        if self.precision is None:
            self.precision = precision_shifts(
                self.job.columns, self.models, explanations
            )
        if self.after is not None:
            self.after(sample, explanations)

    def _fail(self, name: str, reason: str) -> None:
        self.failures.append(Failed(name, reason))
        progress.say(f"{name}: {reason}" if name not in reason else reason)

    def _explain(self, sample: Sample) -> Stored:
        """All columns of one image, kept with their panel."""
        explanations = [
            api.explain(
                model, sample, column.by, column.target or self.job.target, column.view
            )
            for column, model in zip(self.job.columns, self.models, strict=True)
        ]
        explanations = self._carried(explanations)
        items = tuple(
            as_item(column, one)
            for column, one in zip(self.job.columns, explanations, strict=True)
        )
        stored = Stored(
            name=sample.name,
            digest=sample.digest,
            image=self._shown(sample),
            prediction=prediction(sample, explanations[0], self.models[0]),
            items=items,
            notes=sample.notes + self._carriers(explanations),
        )
        panel = self.writer.folder / PANELS / f"{file_stem(sample.name)}.png"
        write_atomically(panel, lambda file: file.write(panels.panel(stored)))
        self.writer.put(stored)
        return stored

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
        said = [one.provenance.get("units") or {} for one in explanations]
        pairs = [
            (label, one.get("sentence") or one.get("reason"))
            for label, one in zip(self.labels, said, strict=True)
        ]
        return tuple(f"{label}: {words}" for label, words in pairs if words)

    def _shown(self, sample: Sample) -> Array:
        view = self.models[0].view(sample, self.job.columns[0].view)
        return (images.to_array(view.pixels) * 255).round().astype("uint8")

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
        finished = self.writer.finish(manifest, pd.DataFrame(self.rows), table)
        html.write_report(finished)
        return finished

    def _columns(self) -> list[dict[str, Any]]:
        first = {row["column"]: row for row in reversed(self.rows)}
        return [
            {
                "name": column.label,
                "explainer": column.by,
                "full": api.explainer_spelling(column.by),
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
    again = api.explain(exact, sample, column.by, target, column.view)
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


def as_item(column: RunColumn, explanation: Explanation) -> Item:
    """An explanation as it is kept, with the mask its column asks for."""
    cutter = (
        registry.cutters.build(column.mask)
        if column.mask
        else default_cutter(explanation)
    )
    mask = cutter.cut(explanation)
    made = explanation.provenance
    return Item(
        column=column.label,
        explainer=explanation.explainer,
        model=explanation.model_id,
        target=explanation.target.index,
        target_name=explanation.target.name,
        score=made["score"],
        seconds=made["seconds"],
        passes=int(made.get("passes", 0)),
        key=made["key"],
        values=explanation.values,
        mask=mask.on,
        mask_rule=mask.rule,
        extras=explanation.extras,
        provenance={
            **made,
            **targets.target_facts(explanation.target),
            "unseeded": column.unseeded,
            "mask_tied": mask.tied,
            "mask_note": mask.note,
        },
        geometry=explanation.geometry.as_dict(),
    )


def rebuild(stored: Stored, sample: Sample) -> tuple[list[Explanation], list[Mask]]:
    """The explanations and masks of an image as they were when it was kept."""
    explanations, masks = [], []
    for item in stored.items:
        made = item.provenance
        target = targets.target_from_facts(item.target, item.target_name, made)
        geometry = Placement.from_dict(dict(item.geometry))
        explanations.append(
            Explanation(
                sample,
                item.model,
                item.explainer,
                target,
                geometry,
                item.values,
                item.extras,
                made,
            )
        )
        assert item.mask is not None
        masks.append(
            Mask(item.mask, item.mask_rule, made["mask_tied"], made["mask_note"])
        )
    return explanations, masks


def table_rows(stored: Stored) -> list[dict[str, Any]]:
    """Rows of ``explanations.parquet``."""
    said = stored.prediction
    return [
        {
            "sample": stored.name,
            "explainer": item.explainer,
            "column": item.column,
            "model": item.model,
            "target": item.target,
            "target_name": item.target_name,
            "score": item.score,
            "seconds": item.seconds,
            "passes": item.passes,
            "map": f"{MAPS}/{file_stem(stored.name)}.npz",
            "key": item.key,
            "mask_rule": item.mask_rule,
            "mask_area": float("nan") if item.mask is None else float(item.mask.mean()),
            "layer": item.provenance.get("layer", ""),
            "verdict": item.provenance.get("verdict", ""),
            "units": (item.provenance.get("units") or {}).get("sentence", ""),
            "view": item.provenance["view"],
            "engine": item.provenance.get("engine", ""),
            "precision": item.provenance.get("precision", ""),
            "predicted": said["index"],
            "predicted_name": said["name"],
            "probability": said["probability"],
            "true": said["true"],
            "true_name": said["true_name"],
        }
        for item in stored.items
    ]
