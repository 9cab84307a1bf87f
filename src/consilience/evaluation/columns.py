"""What stands in the table for one image: the run's maps, the controls it lacks, and
each method's map of another class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from consilience import api, registry, targets
from consilience.evaluation.memory import Remembering
from consilience.types import (
    ClassTarget,
    ConsilienceError,
    Explanation,
    Model,
    NotApplicable,
    Sample,
)

CONTROLS = ("random", "centre", "edges", "constant")
ColumnKind = Literal["method", "control", "other"]


@dataclass(frozen=True)
class TableColumn:
    """A column of the table: a method, a control map, or a method's map of another
    class (``of`` names the method).
    """

    label: str
    kind: ColumnKind
    spec: str
    of: str | None = None


@dataclass(frozen=True, eq=False)
class Entry:
    """One column's map of one image, made when it is first asked for; ``key`` changes
    with all that the map depends on.
    """

    column: TableColumn
    key: str
    model: Model
    make: Callable[[], Explanation]


def is_control(spec: str) -> bool:
    """Whether an explainer is a control map."""
    return bool(
        getattr(registry.explainers.get(registry.parse(spec).name), "control", False)
    )


def columns_of(named: Sequence[tuple[str, str]]) -> tuple[TableColumn, ...]:
    """Columns for a run's (label, spec): its own, the controls that it lacks, then
    another class for each method.
    """
    own = [
        TableColumn(label, "control" if is_control(spec) else "method", spec)
        for label, spec in named
    ]
    known = {
        registry.parse(column.spec).name for column in own if column.kind == "control"
    }
    missing = [
        TableColumn(name, "control", name) for name in CONTROLS if name not in known
    ]
    others = [
        TableColumn(other_label(one.label), "other", one.spec, one.label)
        for one in own
        if one.kind == "method"
    ]
    return (*own, *missing, *others)


def other_label(label: str) -> str:
    """How a method's map of another class is called."""
    return f"{label}, another class"


def image_entries(
    columns: Sequence[TableColumn],
    explanations: Mapping[str, Explanation],
    models: Mapping[str, Model],
    seed: int,
) -> list[Entry]:
    """The columns of one image; ``explanations`` are the run's own by label, ``models``
    those that made them, by label.

    Controls take the view and the class of the first method (of the first column where
    there is none).
    """
    first = first_of(columns, explanations)
    return [_entry(column, explanations, models, first, seed) for column in columns]


def first_of(columns: Sequence[TableColumn], own: Mapping[str, Any]) -> str:
    """Whose view and class the controls take: the first method's of a run's own
    columns, else the first column's.
    """
    methods = [
        column.label
        for column in columns
        if column.kind == "method" and column.label in own
    ]
    return methods[0] if methods else next(iter(own))


def _entry(
    column: TableColumn,
    explanations: Mapping[str, Explanation],
    models: Mapping[str, Model],
    first: str,
    seed: int,
) -> Entry:
    if column.label in explanations:
        own = explanations[column.label]
        return Entry(
            column, str(own.provenance["key"]), models[column.label], lambda: own
        )
    base = column.of or first
    like, model = explanations[base], models[base]
    if column.kind == "other":
        return Entry(
            column,
            f"{like.provenance['key']} other {seed}",
            model,
            once(lambda: another_class(model, like, seed)),
        )
    target = f"{like.target.index} {targets.target_spelling(like.target)}"
    spelled = api.explainer_spelling(column.spec)  # with its seed and every default
    parts = (spelled, like.model_id, like.provenance["view"], like.geometry.as_dict())
    key = f"{parts} {target} {engine_of(model)} {api.versions()['consilience']}"
    return Entry(column, key, model, once(lambda: _control(model, like, column.spec)))


def _control(model: Model, like: Explanation, spec: str) -> Explanation:
    return api.explain(model, like.sample, spec, like.target, like.provenance["view"])


def another_class(model: Model, like: Explanation, seed: int) -> Explanation:
    """The same method's map of a class drawn at random, given out for a map of the
    class that is explained.

    The class is neither the one explained, nor the image's label, nor the model's
    first; the draw is seeded by the image. Raises `NotApplicable` where the target is
    no class, there is no other one, or the map is the same for every class.
    """
    index = drawn_class(like, len(model.classes), seed)
    made = api.explain(
        model, like.sample, like.explainer, index, like.provenance["view"]
    )
    if np.array_equal(made.values, like.values):
        raise NotApplicable(code="same-for-every-class")
    facts = {
        key: value for key, value in made.provenance.items() if key != "resolved"
    }
    # a name that no explainer has: metrics that explain again must not take this for
    # the method itself
    name = f"another-class({like.explainer})"
    return replace(
        made,
        target=like.target,
        explainer=name,
        provenance={**facts, "another": made.target.name},
    )


def drawn_class(like: Explanation, count: int, seed: int) -> int:
    """The number of the other class."""
    if not isinstance(like.target, ClassTarget):
        raise NotApplicable(code="target-no-class", target=like.target.name)
    taken = {
        like.target.index,
        like.sample.label,
        like.provenance["prediction"]["index"],
    }
    free = [index for index in range(count) if index not in taken] or [
        i for i in range(count) if i != like.target.index
    ]
    if not free:
        raise NotApplicable(code="no-other-class")
    return int(
        np.random.default_rng([seed, int(like.sample.digest, 16)]).choice(free)
    )


def once(make: Callable[[], Explanation]) -> Callable[[], Explanation]:
    """Made once, however many metrics ask; a refusal is kept too."""
    kept: list[Any] = []

    def call() -> Explanation:
        if not kept:
            try:
                kept.append(make())
            except ConsilienceError as error:
                kept.append(error)
        if isinstance(kept[0], ConsilienceError):
            raise kept[0]
        made: Explanation = kept[0]
        return made

    return call


def remember(models: Mapping[str, Model], on: bool) -> None:
    """Let models keep, or drop, what they say of an image."""
    for model in models.values():
        if isinstance(model, Remembering):
            (model.remember if on else model.forget)()


def engine_of(model: Model) -> str:
    """What a number depends on beside the weights: engine and precision."""
    return "/".join(str(model.facts.get(name)) for name in ("engine", "precision"))


def truth_digest(sample: Sample) -> str:
    """What is known of an image besides its pixels, for keys: metrics of localisation
    depend on it.
    """
    masks = {
        name: blake2b(np.packbits(mask).tobytes(), digest_size=8).hexdigest()
        for name, mask in sample.masks.items()
    }
    return repr((sample.label, sample.boxes, masks))
