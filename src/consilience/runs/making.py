"""The columns of a run, made for some images at a time and kept image by image.

Images of one view size go through the methods of one pass together, always as many as a
pass holds, filled up where there are fewer: a map does not depend on how many images are
beside it. Methods that only ask for scores are made by several threads whose passes share
batches. Decoding runs ahead, cutting, comparing and writing run behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import pandas as pd
import torch

from consilience import api, data, progress, registry, targets
from consilience.agreement.audit import seen_of
from consilience.agreement.masks import default_cutter
from consilience.agreement.overlap import compared
from consilience.dissection.units import explain_by_units
from consilience.explanations import KeptExplanation
from consilience.files import CannotWriteError, digest_of_data, file_stem, write_bytes
from consilience.models.engines.threads import steady_threads
from consilience.models.gathering import Gathering, can_gather, held
from consilience.models.layers import plain_torch
from consilience.runs.folder import MAPS, PANELS, ImageResult, Writer
from consilience.runs.reuse import Reuse
from consilience.runs.sources import Source, read_ahead
from consilience.show import words
from consilience.study import RunColumn
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Model,
    Network,
    Sample,
    unexpected,
)

IMAGES_AT_A_TIME = 32
PASS = 8
"""Images of a pass forward and back on a CPU: more are no faster."""
WAITING = 32
"""Images that may wait to be written, beside the one that is."""
WRITERS = 2
"""Threads that cut, compare and write; drawing is for one."""
_Made = Explanation | data.Failure


@dataclass(frozen=True)
class Outcome:
    """What became of an image: ``reason`` says why it failed."""

    place: int
    name: str
    seconds: float
    reason: str | None = None


Made = Callable[[Sample, str, Explanation], None]
"""Called with each explanation as soon as it is made."""


@dataclass(eq=False)
class Making:
    """Makes the columns of a job for images of a source.

    ``batch`` images are taken at a time; ``threads`` ask for scores beside each other
    (0: one image after the other, as an evaluation that goes with it needs, which is
    ``after``); ``panels`` draws each image; ``made`` is told of each explanation as soon
    as it is made, by its image and the column's label, maybe in another thread.
    """

    columns: Sequence[RunColumn]
    target: str
    allow_mismatch: bool
    models: Sequence[Model]
    writer: Writer
    units: pd.DataFrame | None = None
    after: Callable[[Sample, Sequence[Explanation]], None] | None = None
    batch: int = IMAGES_AT_A_TIME
    threads: int = 2
    panels: bool = True
    reuse: Reuse | None = None
    made: Made | None = None
    _waiting: deque[Future[Outcome]] = field(default_factory=deque)

    def images(self, source: Source, places: Sequence[int]) -> Iterator[Outcome]:
        """Make images and keep them; an image that fails is an outcome like any other.

        A stop (an exception of whoever takes the outcomes) lets what is under way be
        finished and kept.
        """
        readers = 2 if self.threads else 0
        read = read_ahead(source, places, self.batch, readers, self._look_at)
        with (
            ExitStack() as stack,
            ThreadPoolExecutor(1 if self.panels else WRITERS, "write") as writing,
        ):
            stack.enter_context(steady_threads())
            for model in {id(one): one for one in self.models}.values():
                stack.enter_context(held(model))
            try:
                while chunk := _taken(read, self.batch):
                    yield from self._chunk(chunk, writing)
                yield from self._written(0)
            finally:
                read.close()  # type: ignore[attr-defined]

    def _look_at(self, sample: Sample) -> None:
        """Have the networks' views of an image made, which they keep."""
        for model, column in zip(self.models, self.columns, strict=True):
            with suppress(Exception):  # whoever needs it meets it again
                model.view(sample, column.view)

    # -- some images

    def _chunk(
        self, chunk: Sequence[tuple[int, Sample | data.Failure]], writing: Any
    ) -> Iterator[Outcome]:
        samples = []
        for place, sample in chunk:
            if isinstance(sample, data.Failure):
                yield self._failed(place, sample.name, sample.reason)
            else:
                samples.append((place, sample))
        made = _Chunk(self, [sample for _, sample in samples])
        with plain_torch():
            made.prepare()
            for row, explanations in made.finished():
                place, sample = samples[row]
                yield from self._keep(place, sample, explanations, writing)
        yield from self._written(WAITING)

    def _keep(
        self,
        place: int,
        sample: Sample,
        made: Sequence[_Made],
        writing: ThreadPoolExecutor,
    ) -> Iterator[Outcome]:
        failed = next((one for one in made if isinstance(one, data.Failure)), None)
        if failed is not None:
            yield self._failed(place, sample.name, failed.reason)
            return
        for note in sample.notes:
            progress.say(f"{sample.name}: {note}")
        explanations = self._carried(cast(list[Explanation], list(made)))
        if self.after is not None:
            outcome = self._write(place, sample, explanations)
            if outcome.reason is None:
                self.after(sample, explanations)
            yield outcome
            return
        task = copy_context().run
        self._waiting.append(
            writing.submit(task, self._write, place, sample, explanations)
        )
        yield from self._written(WAITING)

    def _written(self, most: int) -> Iterator[Outcome]:
        """Outcomes of what is written, until no more than ``most`` wait."""
        while self._waiting and (
            len(self._waiting) > most or self._waiting[0].done()
        ):
            yield self._waiting.popleft().result()

    def _failed(self, place: int, name: str, reason: str) -> Outcome:
        self.writer.fail(name, reason)
        return Outcome(place, name, 0.0, reason)

    def _write(
        self, place: int, sample: Sample, explanations: Sequence[Explanation]
    ) -> Outcome:
        """Cut, compare, draw and keep an image."""
        start = time.perf_counter()
        try:
            result = self._result(sample, explanations)
            if self.panels:
                from consilience.show import (
                    figures,  # draws, which takes a second to load
                )

                panel = self.writer.path / PANELS / f"{file_stem(sample.name)}.png"
                write_bytes(panel, figures.panel(result), durable=False)
            self.writer.put(result)
        except (CannotWriteError, progress.Cancelled):
            raise
        except ConsilienceError as error:
            return self._failed(place, sample.name, str(error))
        except Exception as error:  # one image's, whatever a mask or plug-in raises
            return self._failed(place, sample.name, unexpected(error))
        spent = sum(float(one.provenance.get("seconds") or 0) for one in explanations)
        return Outcome(place, sample.name, spent + time.perf_counter() - start)

    def _result(
        self, sample: Sample, explanations: Sequence[Explanation]
    ) -> ImageResult:
        labels = [column.label for column in self.columns]
        said = prediction(sample, explanations[0], self.models[0])
        items = tuple(map(kept_explanation, self.columns, explanations))
        kept = [item.explanation for item in items]
        masks = [item.cut for item in items]
        pairs = compared(kept, masks, labels, self.allow_mismatch)
        result = ImageResult(
            sample=sample,
            image=self._shown(sample),
            prediction=said,
            items=items,
            notes=sample.notes + self._carriers(kept),
        )
        found = {
            "rows": table_rows(result, self.recipes(sample)),
            "pairs": [asdict(pair) for pair in pairs],
            "seen": seen_of(kept, masks, said, labels),
        }
        return replace(result, found=found)

    def _shown(self, sample: Sample) -> Array:
        view = self.models[0].view(sample, self.columns[0].view)
        return (view.rgb * 255).round().astype("uint8")

    # -- what belongs to an image

    def recipes(self, sample: Sample) -> list[str]:
        """By column the digest of everything its explanation depends on, known before it
        is made.
        """
        return [
            recipe_of(sample, column, model, column.target or self.target)
            for column, model in zip(self.columns, self.models, strict=True)
        ]

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
        labels = [column.label for column in self.columns]
        said = [
            words.units_words(one.provenance.get("units")) for one in explanations
        ]
        pairs = zip(labels, said, strict=True)
        return tuple(f"{label}: {sentence}" for label, sentence in pairs if sentence)


def _taken(read: Iterator[Any], count: int) -> list[Any]:
    return [item for _, item in zip(range(count), read, strict=False)]


# ---- some images, column by column


class _Chunk:
    """Some images and their columns: those of one pass first, together; then the others,
    image by image.
    """

    def __init__(self, making: Making, samples: Sequence[Sample]) -> None:
        self.making, self.samples = making, samples
        self._made: list[list[_Made | None]] = [
            [None] * len(making.columns) for _ in samples
        ]
        self._said: dict[tuple[int, str | None], list[torch.Tensor | None]] = {}
        self._gathered: dict[int, Model] = {}

    def prepare(self) -> None:
        """What can be made of all images at once."""
        if self.making.reuse is not None:
            self._reuse()
        for number, column in enumerate(self.making.columns):
            if self._asks_before(column) and any(
                row[number] is None for row in self._made
            ):
                self._outputs(self.making.models[number], column.view)
        for number, column in enumerate(self.making.columns):
            explainer = column.explainer
            model = self.making.models[number]
            if hasattr(explainer, "explain_batch") and any(
                row[number] is None for row in self._made
            ):
                self._together(number, column, model)

    def _asks_before(self, column: RunColumn) -> bool:
        """Whether a column must know what the model says before its own pass."""
        return not getattr(column.explainer, "reads_target_in_its_pass", False)

    def _reuse(self) -> None:
        assert self.making.reuse is not None
        for row, sample in enumerate(self.samples):
            for number, recipe in enumerate(self.making.recipes(sample)):
                self._made[row][number] = self.making.reuse.find(recipe, sample)
                self._tell(row, number)

    def finished(self) -> Iterator[tuple[int, list[_Made]]]:
        """Images with all their columns, in order."""
        alone = [
            number
            for number, column in enumerate(self.making.columns)
            if not hasattr(column.explainer, "explain_batch")
        ]
        by_threads = self.making.threads if self._can_gather(alone) else 0
        if by_threads < 1:
            for row in range(len(self.samples)):
                yield row, self._image(row, alone, self.making.models)
            return
        models = [self._gathering(model) for model in self.making.models]
        with ThreadPoolExecutor(by_threads, "ask") as asking:
            tasks = [
                asking.submit(copy_context().run, self._image, row, alone, models)
                for row in range(len(self.samples))
            ]
            row = 0
            try:
                for row, task in enumerate(tasks):
                    yield row, task.result()
            except KeyboardInterrupt:
                # asked to stop: what is under way is finished and kept
                under_way = [
                    (late, task)
                    for late, task in enumerate(tasks)
                    if late > row and not task.cancel()
                ]
                for late, task in under_way:
                    if task.exception() is None:
                        yield late, task.result()
                raise
            finally:
                for task in tasks:
                    task.cancel()

    def _can_gather(self, alone: Sequence[int]) -> bool:
        """Whether what is left only asks for scores, of networks that threads can share."""
        making = self.making
        return bool(alone) and all(
            not making.columns[number].explainer.needs
            and can_gather(making.models[number])
            and not targets.is_spelled(
                making.models[number], making.columns[number].target or making.target
            )
            for number in alone
        )

    def _gathering(self, model: Model) -> Model:
        if not can_gather(model):
            return model
        if id(model) not in self._gathered:
            self._gathered[id(model)] = cast(Model, Gathering(cast(Any, model)))
        return self._gathered[id(model)]

    def _image(
        self, row: int, alone: Sequence[int], models: Sequence[Model]
    ) -> list[_Made]:
        making, sample = self.making, self.samples[row]
        for number in alone:
            if self._made[row][number] is None:
                column = making.columns[number]
                said = self._outputs(making.models[number], column.view)[row]
                self._made[row][number] = alone_or_failure(
                    models[number],
                    sample,
                    column.explainer,
                    column.target or making.target,
                    column.view,
                    said,
                )
                self._tell(row, number)
        return cast(list[_Made], self._made[row])

    def _tell(self, row: int, number: int) -> None:
        one = self._made[row][number]
        if self.making.made is not None and isinstance(one, Explanation):
            label = self.making.columns[number].label
            self.making.made(self.samples[row], label, one)

    def _together(self, number: int, column: RunColumn, model: Model) -> None:
        """One column of all images, in passes of one size."""
        target = column.target or self.making.target
        nothing: list[torch.Tensor | None] = [None] * len(self.samples)
        said = self._said.get((id(model), column.view), nothing)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, sample in enumerate(self.samples):
            if self._made[row][number] is None:
                shape = tuple(model.view(sample, column.view).pixels.shape)
                groups.setdefault(shape, []).append(row)
        size = pass_size(model)
        for rows in groups.values():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                for row, one in zip(
                    part,
                    self._pass(model, column, target, part, said, size),
                    strict=True,
                ):
                    self._made[row][number] = one
                    self._tell(row, number)

    def _pass(
        self,
        model: Model,
        column: RunColumn,
        target: str,
        rows: Sequence[int],
        said: Sequence[torch.Tensor | None],
        size: int,
    ) -> list[_Made]:
        samples = [self.samples[row] for row in rows]
        known = [said[row] for row in rows]
        outputs = (
            torch.cat(cast(list[torch.Tensor], known))
            if all(one is not None for one in known)
            else None
        )
        explainer = column.explainer
        try:
            return list(
                api.explain_together(
                    model, samples, explainer, target, column.view, outputs, size
                )
            )
        except api.ApartError:
            return [
                alone_or_failure(model, sample, explainer, target, column.view, one)
                for sample, one in zip(samples, known, strict=True)
            ]
        except progress.Cancelled:
            raise
        except Exception as error:
            if len(rows) == 1:
                reason = (
                    str(error)
                    if isinstance(error, ConsilienceError)
                    else unexpected(error)
                )
                return [data.Failure(samples[0].name, reason)]
        return [  # whose fault it is shows one by one
            self._pass(model, column, target, [row], said, size)[0] for row in rows
        ]

    def _outputs(self, model: Model, view: Any) -> list[torch.Tensor | None]:
        """What the model says of every image (1, K), asked once for all columns, in
        passes of one size; None where it cannot be asked so.
        """
        key = (id(model), view)
        if key not in self._said:
            self._said[key] = said_of(model, self.samples, view)
        return self._said[key]


def pass_size(model: Model) -> int:
    """Images that a pass forward and back takes: always so many."""
    return max(1, min(PASS, model.batch))


def said_of(
    model: Model, samples: Sequence[Sample], view: Any
) -> list[torch.Tensor | None]:
    """Raw outputs (1, K) of each image, by passes of ``model.batch`` images filled up
    with blank ones; None where a view cannot be made (the explainer says why).
    """
    said: list[torch.Tensor | None] = [None] * len(samples)
    if not can_gather(model) or model.batch < 2:
        return said
    asked = Gathering(cast(Any, model))
    frame = model.frame  # type: ignore[attr-defined]
    views: list[tuple[int, torch.Tensor]] = []
    for row, sample in enumerate(samples):
        try:
            pixels = model.view(sample, view).pixels
        except ConsilienceError:
            continue
        if tuple(pixels.shape[2:]) == tuple(frame):
            views.append((row, pixels))
    if not views:
        return said
    try:
        with torch.no_grad():
            outputs = asked.scores(torch.cat([pixels for _, pixels in views]))
    except (progress.Cancelled, MemoryError):
        raise
    except Exception:  # the explainer meets it again and says so
        return said
    for (row, _), one in zip(
        views, torch.split(outputs.float().cpu(), 1), strict=True
    ):
        said[row] = one
    return said


def alone_or_failure(
    model: Model,
    sample: Sample,
    by: Any,
    target: Any,
    view: Any,
    outputs: torch.Tensor | None,
) -> _Made:
    """An explanation of one image, or why there is none."""
    try:
        return api.explain_one(model, sample, by, target, view, outputs)
    except (CannotWriteError, progress.Cancelled):
        raise
    except ConsilienceError as error:
        return data.Failure(sample.name, str(error))
    except Exception as error:  # one image's, whatever a network or plug-in raises
        return data.Failure(sample.name, unexpected(error))


# ---- rows


def recipe_of(sample: Sample, column: RunColumn, model: Model, target: str) -> str:
    """Digest of everything an explanation depends on, known before it is made."""
    facts = model.facts
    return digest_of_data(
        [
            sample.digest,
            sample.label,
            [asdict(box) for box in sample.boxes],
            registry.spell(column.explainer, full=True),
            registry.source_digest(column.explainer),
            model.id,
            digest_of_data(model.classes),
            [facts.get("engine"), facts.get("precision")],
            getattr(model, "engine", None),
            targets.pinned_spelling(target),
            column.view,
            column.unseeded,
            api.versions(),
        ]
    )


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


def _units_said(provenance: Any) -> str:
    """Which units carry a map, in words; nothing where that is not told."""
    units = provenance.get("units") or {}
    return "" if "code" in units else words.units_words(units)


def table_rows(result: ImageResult, recipes: Sequence[str]) -> list[dict[str, Any]]:
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
            "passes": int(item.provenance.get("passes", 0)),
            "source": result.sample.source,
            "map": f"{MAPS}/{file_stem(result.name)}.npz",
            "key": item.provenance["key"],
            "recipe": recipe,
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
        for item, recipe in zip(result.items, recipes, strict=True)
    ]
