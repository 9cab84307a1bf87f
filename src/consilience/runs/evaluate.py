"""The evaluation of a run: every metric on every column of every image, kept image by
image, then summed up.

A killed evaluation continues where it was; one with more metrics computes only those.
Memory: the maps of one image, and a row of numbers an image, column and metric.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consilience import api, data, progress, registry
from consilience.evaluation import marked, mosaics, summary
from consilience.evaluation.columns import (
    Entry,
    TableColumn,
    columns_of,
    engine_of,
    image_entries,
    remember,
    truth_digest,
)
from consilience.evaluation.memory import remembering
from consilience.files import place, read_json
from consilience.inputs import Again
from consilience.metrics.mosaic import GridPointing
from consilience.metrics.planted_mark import PlantedMark
from consilience.models.load import load_model
from consilience.runs.explain import (
    ExplanationJob,
    How,
    LoadOptions,
    load_models,
    run_explanations,
)
from consilience.runs.folder import JOB, Run
from consilience.runs.scores import (
    Evaluation,
    ImageScores,
    as_kept,
    finish_evaluation,
)
from consilience.show import html
from consilience.types import (
    ConsilienceError,
    Explanation,
    Metric,
    Model,
    NotApplicable,
    Sample,
    unexpected,
)

FAILED = "failed"
"""The code of a number that could not be had; it is tried again next time."""
PATIENCE = 5.0
"""Seconds of scoring one image that may be lost when an evaluation is killed, beside
the metric that runs.
"""
MAKERS = (GridPointing, PlantedMark)
"""Metrics that are asked of images they make of the run's."""
_Made = tuple[Entry, Explanation | NotApplicable]


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked: spellings of metrics, the suite they came from, and
    the seed of draws of other classes.
    """

    metrics: tuple[str, ...]
    suite: str | None = None
    seed: int = 0


def evaluate_images(
    asked: Asked,
    job: ExplanationJob,
    inputs: Sequence[str | Path],
    folder: str | Path,
    truth: str | Path | None = None,
    options: LoadOptions | None = None,
    command: str = "",
    how: How | None = None,
    models: Sequence[Model] | None = None,
    again: Again | None = None,
) -> Evaluation | None:
    """Explain every image as `run.run` does, into ``folder``, and score each as soon as
    it is explained.

    ``models`` are the columns' own where they are loaded already; ``again`` takes the
    place of ``inputs`` for images that are no files.
    """
    start = time.perf_counter()
    if how is not None and (how.several or how.shard is not None):
        run_explanations(
            job,
            inputs,
            folder,
            truth,
            options,
            command,
            models,
            again=again,
            how=how,
            asked=asked,
        )
        if how.shard is not None:
            return None
        return evaluate_run(asked, folder, truth, options, command)
    loaded = models or load_models(job, options or LoadOptions())
    models, take, scoring, by_label = _scoring_of(asked, folder, job, loaded)
    remember(by_label, on=True)
    finished = run_explanations(
        job, inputs, folder, truth, options, command, models, take, again, how
    )
    assert finished is not None
    remember(by_label, on=False)
    scoring.collect(finished, by_label)
    if again is None:
        scoring.take_made(lambda: samples_of(finished, truth, by_label))
    else:
        kept = again
        scoring.take_made(lambda: (one for one in kept if isinstance(one, Sample)))
    return _finish(
        finished,
        scoring,
        asked,
        scoring.columns,
        time.perf_counter() - start,
        command,
    )


def scoring_of(
    asked: Asked, folder: str | Path, job: ExplanationJob, loaded: Sequence[Model]
) -> tuple[tuple[Model, ...], Callable[[Sample, Sequence[Explanation]], None]]:
    """For a worker: the models with a memory, and what scores each image as soon as it is
    explained.
    """
    models, take, _, by_label = _scoring_of(asked, folder, job, loaded)
    remember(by_label, on=True)
    return models, take


def _scoring_of(
    asked: Asked, folder: str | Path, job: ExplanationJob, loaded: Sequence[Model]
) -> tuple[
    tuple[Model, ...],
    Callable[[Sample, Sequence[Explanation]], None],
    _Scoring,
    dict[str, Model],
]:
    once = {id(model): remembering(model) for model in loaded}
    models = tuple(once[id(model)] for model in loaded)
    columns = columns_of([(column.label, column.by) for column in job.columns])
    by_label = {
        column.label: model for column, model in zip(job.columns, models, strict=True)
    }
    scoring = _Scoring(asked, place(folder), columns, by_label)
    return models, scoring.score, scoring, by_label


def evaluate_run(
    asked: Asked,
    folder: str | Path,
    truth: str | Path | None = None,
    options: LoadOptions | None = None,
    command: str = "",
) -> Evaluation:
    """Score the maps of a finished run; its images are read again from where they were.

    Raises `ConsilienceError` where an image is gone or has changed, or the model has
    other weights. ``truth`` takes the place of the run's own.
    """
    start = time.perf_counter()
    finished = Run(folder)
    models = models_of(finished, options or LoadOptions())
    named = [
        (column["name"], column["explainer"])
        for column in finished.manifest["columns"]
    ]
    by_label = {
        column["name"]: models[column["model"]]
        for column in finished.manifest["columns"]
    }
    columns = columns_of(named)
    scoring = _Scoring(asked, finished.folder, columns, by_label)
    with progress.task("images", len(finished.samples)) as running:
        for sample in samples_of(finished, truth, models):
            made = finished[sample.name].values()
            scoring.take(sample, [replace(one, sample=sample) for one in made])
            running.advance()
    scoring.take_made(lambda: samples_of(finished, truth, models))
    return _finish(
        finished, scoring, asked, columns, time.perf_counter() - start, command
    )


def merge_evaluation(finished: Run, command: str = "") -> Evaluation | None:
    """The evaluation of a run whose parts scored their images; None where none did."""
    call = read_json(finished.folder / JOB).get("call") or {}
    if not call.get("asked"):
        return None
    told = call["asked"]
    asked = Asked(tuple(told["metrics"]), told["suite"], told["seed"])
    options = LoadOptions(**call["options"])
    return evaluate_run(asked, finished.folder, call["truth"], options, command)


# ---- a run, found again


def models_of(finished: Run, options: LoadOptions) -> dict[str, Model]:
    """The run's models by id, loaded as they were spelled; other weights are refused."""
    found: dict[str, Model] = {}
    for known in finished.manifest["models"]:
        if known["spec"] is None:
            raise ConsilienceError(
                f"{finished.folder}: {known['id']} was made in Python and cannot be loaded "
                f"again"
            )
        given = {
            key: value for key, value in asdict(options).items() if value is not None
        }
        model = load_model(known["spec"], **given)
        if model.id != known["id"]:
            raise ConsilienceError(
                f"{finished.folder} was made with {known['id']}; {known['spec']} is now "
                f"{model.id}"
            )
        found[known["id"]] = remembering(model)
    return found


def samples_of(
    finished: Run, truth: str | Path | None, models: Mapping[str, Model]
) -> Iterator[Sample]:
    """The run's images, read again from where they were, in the order of the run; with
    the labels and boxes of ``truth`` where it is given, else those that they had.
    """
    names = finished.samples
    table = finished.explanations.drop_duplicates("sample").set_index("sample")
    sources = [Path(str(table["source"][name])) for name in names]
    gone = [path for path in sources if not path.is_file()]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise ConsilienceError(
            f"{finished.folder}: the image {gone[0]}{more} is not where it was when it was "
            f"explained"
        )
    classes = next(iter(models.values())).classes
    known = data.read_truth(truth, classes) if truth is not None else None
    unmatched = known.unmatched_note(sources) if known is not None else None
    if unmatched:
        progress.say(unmatched)
    for name, path in zip(names, sources, strict=True):
        kept = finished.load(name).sample
        try:
            sample = replace(kept, pixels=kept.pixels)
            yield data.labelled(sample, path, known, classes) if known else sample
        except ConsilienceError as error:
            raise ConsilienceError(f"{finished.folder}: {error}") from None


# ---- scoring


class _Scoring:
    """Scores image after image and keeps a row a number."""

    def __init__(
        self,
        asked: Asked,
        folder: Path,
        columns: Sequence[TableColumn],
        models: Mapping[str, Model],
    ) -> None:
        self.asked, self.folder, self.columns, self.models = (
            asked,
            folder,
            columns,
            models,
        )
        self.metrics: dict[str, Metric] = {
            spec: registry.metrics.build(spec) for spec in asked.metrics
        }
        self.rows: list[dict[str, Any]] = []
        self.images = 0
        self.absent: dict[str, str] = {}

    def score(self, sample: Sample, explanations: Sequence[Explanation]) -> None:
        """Score one image's columns and keep that; what an earlier try kept stays."""
        own = dict(zip(self.models, explanations, strict=True))
        there = image_entries(self.columns, own, self.models, self.asked.seed)
        self._score_missing(sample, there, self._of_images)

    def take(self, sample: Sample, explanations: Sequence[Explanation]) -> None:
        """`score` an image and take its numbers into the table."""
        own = dict(zip(self.models, explanations, strict=True))
        there = image_entries(self.columns, own, self.models, self.asked.seed)
        self._take(sample, there, self._of_images)
        self.images += 1

    @property
    def _of_images(self) -> list[str]:
        """Metrics of single images."""
        return [
            spec
            for spec, metric in self.metrics.items()
            if not isinstance(metric, MAKERS)
        ]

    def collect(self, finished: Run, models: Mapping[str, Model]) -> None:
        """The numbers of every image of a run, in its order; an image whose numbers are
        not there is read again and scored.
        """
        for name in finished.samples:
            self.take(finished.load(name).sample, finished[name].values())  # type: ignore[arg-type]

    def take_made(self, samples: Callable[[], Iterable[Sample]]) -> None:
        """Score the columns on images that a metric makes of those of the run (mosaics,
        planted marks); ``absent`` says why there are none.
        """
        for spec, metric in self.metrics.items():
            if not isinstance(metric, MAKERS):
                continue
            try:
                made = list(self._made_for(metric, samples()))
            except ConsilienceError as reason:
                self.absent[spec] = str(reason)
                continue
            with progress.task(f"{metric.unit}s", len(made)) as running:
                for sample, models in made:
                    self._take_made(spec, sample, models)
                    running.advance()

    def _made_for(
        self, metric: GridPointing | PlantedMark, samples: Iterable[Sample]
    ) -> Iterator[tuple[Sample, Mapping[str, Model]]]:
        """Images that a metric is asked of, each with the models by label that explain
        it.
        """
        several = list(dict.fromkeys(self.models.values()))
        seed = self.asked.seed
        if isinstance(metric, PlantedMark):
            for one in marked.marked_images(metric, several, samples, seed):
                yield (
                    one.sample,
                    {
                        label: one.models[id(model)]
                        for label, model in self.models.items()
                    },
                )
            return
        for sample in mosaics.mosaics_of(metric, several, samples, seed):
            yield sample, self.models

    def _take_made(
        self, spec: str, sample: Sample, models: Mapping[str, Model]
    ) -> None:
        remember(models, on=True)
        mosaics.write_mosaic(self.folder, sample)
        there = mosaics.mosaic_entries(self.columns, models, sample, self.asked.seed)
        self._take(sample, there, [spec], models)
        remember(models, on=False)

    def _take(
        self,
        sample: Sample,
        there: Sequence[Entry],
        specs: Sequence[str],
        models: Mapping[str, Model] | None = None,
    ) -> None:
        image, truth = self._score_missing(sample, there, specs, models)
        self._add_rows(image, there, truth, specs)

    def _score_missing(
        self,
        sample: Sample,
        there: Sequence[Entry],
        specs: Sequence[str],
        models: Mapping[str, Model] | None = None,
    ) -> tuple[ImageScores, str]:
        asked = models or self.models
        image = ImageScores(self.folder, sample.name, sample.digest)
        truth = truth_digest(sample)
        missing = {
            spec: [e for e in there if self._known(image, spec, e, truth) is None]
            for spec in specs
        }
        wanted = {id(entry): entry for some in missing.values() for entry in some}
        maps = {key: _made(entry) for key, entry in wanted.items()}
        remember(asked, on=False)
        due = {
            spec: [(entry, maps[id(entry)]) for entry in some]
            for spec, some in missing.items()
            if some
        }
        self._score_all(image, due, truth)
        remember(asked, on=True)
        return image, truth

    def _score_all(
        self, image: ImageScores, due: Mapping[str, Sequence[_Made]], truth: str
    ) -> None:
        """What an image lacks, metric after metric; what is done is kept before it is
        long ago.
        """
        written = time.perf_counter()
        with progress.task("metrics", len(due)) as running:
            for spec, some in due.items():
                self._score(image, spec, some, truth)
                if time.perf_counter() - written > PATIENCE:
                    image.write()
                    written = time.perf_counter()
                running.advance()
        if due:
            image.write()

    def _known(self, image: ImageScores, spec: str, entry: Entry, truth: str) -> Any:
        kept = image.get(
            _full(self.metrics[spec]), entry.column.label, _key(entry, truth)
        )
        return None if kept is not None and kept.code == FAILED else kept

    def _score(
        self, image: ImageScores, spec: str, some: Sequence[_Made], truth: str
    ) -> None:
        """One metric on the columns of an image, those of one model and view together."""
        metric = self.metrics[spec]
        groups: dict[tuple[int, str], list[tuple[Entry, Explanation]]] = {}
        for entry, made in some:
            if isinstance(made, NotApplicable):
                image.put(
                    _full(metric),
                    entry.column.label,
                    as_kept(_key(entry, truth), made),
                )
            else:
                groups.setdefault(
                    (id(entry.model), made.provenance["view"]), []
                ).append((entry, made))
        for group in groups.values():
            for (entry, _), score in zip(group, _scores(metric, group), strict=True):
                image.put(
                    _full(metric),
                    entry.column.label,
                    as_kept(_key(entry, truth), score),
                )

    def _add_rows(
        self,
        image: ImageScores,
        there: Sequence[Entry],
        truth: str,
        specs: Sequence[str],
    ) -> None:
        for spec in specs:
            for entry in there:
                kept = image.get(
                    _full(self.metrics[spec]), entry.column.label, _key(entry, truth)
                )
                assert kept is not None
                row = {
                    "sample": image.name,
                    "digest": image.digest,
                    "column": entry.column.label,
                    "metric": spec,
                }
                value = float("nan") if kept.value is None else kept.value
                self.rows.append(
                    {
                        **row,
                        "kind": entry.column.kind,
                        "value": value,
                        "code": kept.code,
                        "facts": json.dumps(dict(kept.reason), ensure_ascii=False),
                    }
                )


def _scores(
    metric: Metric, group: Sequence[tuple[Entry, Explanation]]
) -> Sequence[Any]:
    model = group[0][0].model
    view = model.view(group[0][1].sample, group[0][1].provenance["view"])
    try:
        return api.metric_scores(
            model, metric, [view] * len(group), [made for _, made in group]
        )
    except ConsilienceError as error:
        # a metric that fails on an image takes nothing else with it; the table says so
        return [NotApplicable(code=FAILED, error=str(error))] * len(group)
    except progress.Cancelled:
        raise
    except Exception as error:
        return [NotApplicable(code=FAILED, error=unexpected(error))] * len(group)


def _made(entry: Entry) -> Explanation | NotApplicable:
    try:
        return entry.make()
    except ConsilienceError as error:
        return (
            error
            if isinstance(error, NotApplicable)
            else NotApplicable(code="not-explained", error=str(error))
        )
    except progress.Cancelled:
        raise
    except Exception as error:
        return NotApplicable(code="not-explained", error=unexpected(error))


def _full(metric: Metric) -> str:
    return registry.spell(metric, full=True)


def _key(entry: Entry, truth: str) -> str:
    version = api.versions()["consilience"]
    return f"{entry.key} {truth} {engine_of(entry.model)} {version}"


def _finish(
    finished: Run,
    scoring: _Scoring,
    asked: Asked,
    columns: Sequence[TableColumn],
    seconds: float,
    command: str,
) -> Evaluation:
    """Table, summary, and the run's report with its section."""
    if not scoring.images:
        raise ConsilienceError(f"{finished.folder}: no image could be evaluated")
    found = summary.summarise(
        scoring.rows, scoring.metrics, columns, asked.seed, scoring.absent
    )
    names = dict.fromkeys(
        (str(row["sample"]), str(row["digest"])) for row in scoring.rows
    )
    images = (ImageScores(finished.folder, name, digest) for name, digest in names)
    curves = summary.mean_curves(images, scoring.metrics, columns)
    facts = {
        "version": api.versions()["consilience"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "suite": asked.suite,
        "seed": asked.seed,
        "seconds": seconds,
    }
    evaluation = finish_evaluation(
        finished.folder,
        scoring.rows,
        {**facts, "images": scoring.images, **found, **curves},
    )
    html.write_report(finished)
    return evaluation
