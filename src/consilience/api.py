"""The public verbs: load, read, explain, evaluate, agree.

Each parses, resolves, times and validates; the work is elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import pandas as pd
import torch

from consilience import data, images, inputs, progress, registry, stats, targets
from consilience.explanations import Explanations
from consilience.metrics.suites import asked_metrics
from consilience.models.engines import plan
from consilience.models.layers import plain_torch
from consilience.models.load import as_model
from consilience.targets.classes import class_name as class_name
from consilience.types import (
    PIXELS,
    Array,
    ConsilienceError,
    Explainer,
    Explanation,
    Heat,
    Metric,
    Model,
    NotApplicable,
    Sample,
    Score,
    Target,
    View,
    ViewMode,
    as_probabilities,
    unexpected,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image: the first class, its probability (nan for bare
    values), its lead over the second, and the probability that each class of so many
    would have if the model knew nothing (nan where classes do not exclude each other).
    ``also`` are the other labels, by number, that independent outputs put at .5 or more.
    """

    index: int
    name: str
    probability: float
    margin: float
    uniform: float = float("nan")
    also: tuple[int, ...] = ()


@overload
def explain(
    model: Any,
    image: Sample,
    by: str | Explainer = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Explanation: ...
@overload
def explain(
    model: Any,
    image: Any,
    by: str | Explainer = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Any: ...
def explain(
    model: Any,
    image: Any,
    by: str | Explainer = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Explanation | Explanations:
    """Explain an image, or many: a raw map in the model's frame for each.

    ``model`` is a `Model`, a spelling (``"resnet50"``), a torch module (wrapped as `wrap`
    does) or a function (`wrap_callable`). ``image`` is a path, a PIL image, an array, a
    tensor or a `Sample`, which gives one `Explanation`; or a folder, a pattern, a batch,
    a list, a data set or a loader, which gives `Explanations` in its order, explained in
    full batches. Of many, what cannot be read or explained is among their
    ``failures``, and the rest goes on; all samples stay in memory, which `run` avoids.

    ``by`` is an explainer or its spelling (``"lime:samples=700,seed=1"``), ``target``
    is ``predicted``, ``true``, a class's index or name, a spelling
    (``"difference:cat,dog"``, ``"unit:layer4,412"``: see `targets`), or a `Target`;
    ``view`` is ``crop`` or ``squash``, None as the model was trained. Raises
    `ConsilienceError` where the model cannot do what the explainer needs, and where no
    image can be explained.
    """
    model = as_model(model)
    _check_one(by)
    if not isinstance(image, Sample) and not inputs.is_single(image):
        return _explain_many(model, image, by, target, view)
    sample = inputs.one_sample(image, inputs.Shown.of(model))
    with plain_torch():
        return explain_one(model, sample, by, target, view)


def _check_one(by: Any) -> None:
    if isinstance(by, list | tuple | set | dict):
        raise ConsilienceError(
            "explain takes one explainer; call it once for each, or take run for several"
        )


def _explain_many(
    model: Model,
    given: Any,
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
) -> Explanations:
    resolve_explainer(model, by)  # what can be refused before an image is read
    check_target_name(model, target)
    made: list[Explanation] = []
    failures: list[data.Failure] = []
    waiting = inputs.samples_from(given, inputs.Shown.of(model))
    while part := list(islice(waiting, _at_a_time(model, by))):
        samples = [one for one in part if isinstance(one, Sample)]
        failed = [one for one in part if isinstance(one, data.Failure)]
        for result in _explain_batch(model, samples, by, target, view):
            if isinstance(result, data.Failure):
                failed.append(result)
            else:
                made.append(result)
        for one in failed:
            progress.say(f"{one.name}: {one.reason}")
        failures += failed
    if not made:
        reasons = "; ".join(dict.fromkeys(one.reason for one in failures[:3]))
        raise ConsilienceError(
            f"none of {len(failures)} images could be explained: {reasons}"
        )
    return Explanations(made, failures)


def _at_a_time(model: Model, by: str | Explainer) -> int:
    """How many images an explainer takes best in one pass."""
    explainer = registry.explainers.build(by)
    if not hasattr(explainer, "explain_batch"):
        return 1
    size: int = getattr(model, "gradient_batch", model.batch)
    return max(1, min(size, MOST_AT_A_TIME))


MOST_AT_A_TIME = 32
"""Images beyond which a batch is no faster on a CPU or an accelerator that is full."""


def explain_part(
    model: Model,
    samples: Sequence[Sample],
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None = None,
) -> list[Explanation | data.Failure]:
    """Explanations of some images, in passes as full as the explainer takes; an image
    that fails is alone, with its reason.
    """
    size = _at_a_time(model, by)
    return [
        result
        for start in range(0, len(samples), size)
        for result in _explain_batch(
            model, samples[start : start + size], by, target, view
        )
    ]


def _explain_batch(
    model: Model,
    samples: Sequence[Sample],
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
) -> list[Explanation | data.Failure]:
    """All samples in one pass where that works, else one after the other, so that an
    image that fails is alone.
    """
    with plain_torch():
        if len(samples) > 1:
            try:
                return list(explain_together(model, samples, by, target, view))
            except ApartError:
                pass
            except progress.Cancelled:
                raise
            except Exception as error:  # whose fault it is shows one by one
                progress.say(f"a batch failed, one by one: {unexpected(error)}")
        return [_explain_alone(model, one, by, target, view) for one in samples]


class ApartError(Exception):
    """Images that cannot be explained in one pass."""


def _explain_alone(
    model: Model,
    sample: Sample,
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
) -> Explanation | data.Failure:
    try:
        return explain_one(model, sample, by, target, view)
    except progress.Cancelled:
        raise
    except ConsilienceError as error:
        return data.Failure(sample.name, str(error))
    except Exception as error:  # one image's, whatever a network or plug-in raises
        return data.Failure(sample.name, unexpected(error))


def explain_together(
    model: Model,
    samples: Sequence[Sample],
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
    outputs: torch.Tensor | None = None,
    size: int = 0,
) -> Iterator[Explanation]:
    """Explanations of images of one view size in one pass.

    ``outputs`` (N, K) are what the model says of them, where that is known; ``size``
    fills the pass up to so many images, so that a map does not depend on how many are
    beside it. Raises `ApartError` where they cannot go together.
    """
    explainer = resolve_explainer(model, by)
    many = getattr(explainer, "explain_batch", None)
    views = [model.view(sample, view) for sample in samples]
    if many is None or len({one.pixels.shape for one in views}) > 1:
        raise ApartError

    def goal_of(sample: Sample, row: torch.Tensor) -> Target:
        goal = target_of_image(model, sample, target, row)
        goal = read_as_explained(goal, explainer)
        if isinstance(goal, targets.ReadElsewhere):
            raise ApartError
        return goal

    # what the model says is what the method's own pass says, where that is asked for
    waits = outputs is None and getattr(explainer, "reads_target_in_its_pass", False)
    if outputs is None and not waits:
        pixels = torch.cat([one.pixels for one in views])
        outputs = raw_outputs(model, replace(views[0], pixels=pixels))
    asked = [targets.Waiting(partial(goal_of, sample)) for sample in samples]
    if outputs is not None:
        for place, one in enumerate(asked):
            one.read(outputs[place : place + 1])
    given = asked if waits else [one.goal for one in asked]
    if "gradients" in explainer.needs and _of_pixels(explainer):
        model.check_gradients()  # type: ignore[attr-defined]
    start = time.perf_counter()
    short = max(0, size - len(samples))
    with plan.recorded_passes() as ran:
        heats = many(model, views + views[:1] * short, given + given[:1] * short)
    heats = heats[: len(samples)]
    seconds = (time.perf_counter() - start) / len(samples)
    goals, rows = [one.goal for one in asked], [one.outputs for one in asked]
    parts = zip(samples, views, goals, heats, rows, strict=True)
    for sample, shown, goal, heat, row in parts:
        facts = {
            **engines_that_ran(ran),
            "seconds": seconds,
            "score": float(goal.of(row)[0]),
            "prediction": asdict(predict(model, row)),
        }
        yield finish_explanation(
            model, sample, shown, explainer, by, goal, heat, facts
        )


def explain_one(
    model: Model,
    sample: Sample,
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
    outputs: torch.Tensor | None = None,
) -> Explanation:
    """An explanation of one image; ``outputs`` (1, K) are what the model says of it,
    where that is known.
    """
    explainer = resolve_explainer(model, by)
    if outputs is None and getattr(explainer, "reads_target_in_its_pass", False):
        try:  # a pass is saved: what the model says comes with the method's own
            return next(explain_together(model, [sample], by, target, view))
        except ApartError:
            pass
    shown = model.view(sample, view)
    if outputs is None:
        outputs = raw_outputs(model, shown)
    goal = target_of_image(model, sample, target, outputs)
    goal = read_as_explained(goal, explainer)
    (asked, bound), said = targets.ask_where_read(model, shown, goal), outputs
    if asked is not model:
        explainer, said = resolve_explainer(asked, by), raw_outputs(asked, shown)
    if "gradients" in explainer.needs and _of_pixels(explainer):
        asked.check_gradients()  # type: ignore[attr-defined]
    start = time.perf_counter()
    with plan.recorded_passes() as ran:
        heat = explainer.explain(asked, shown, bound)
    seconds = time.perf_counter() - start
    facts = {
        **engines_that_ran(ran),
        "seconds": seconds,
        "score": float(bound.of(said)[0]),
        "prediction": asdict(predict(model, outputs)),
    }
    return finish_explanation(model, sample, shown, explainer, by, goal, heat, facts)


class Scores(dict[str, Score | NotApplicable]):
    """What `evaluate` says of one explanation: a score, or why there is none, by the
    metric's spelling.
    """

    def table(self) -> pd.DataFrame:
        """A row a metric: ``metric``, ``value`` (NaN where it does not apply),
        ``higher_is_better``, ``lowest`` and ``highest`` possible value, ``reason``.
        """
        return pd.DataFrame(
            [_score_row(spelled, score) for spelled, score in self.items()],
            columns=SCORE_COLUMNS,
        )

    def figure(self) -> Figure:
        """The curves behind the scores, for the metrics that have one."""
        from consilience.show.figures import curves_figure

        return curves_figure(self)

    def _repr_html_(self) -> str:
        from consilience.show.figures import scores_html

        return scores_html(self)


class ScoreTable(Sequence[Scores]):
    """What `evaluate` says of many explanations: their `Scores` in order, and a table of
    all.
    """

    def __init__(
        self, explanations: Sequence[Explanation], scores: Sequence[Scores]
    ) -> None:
        self.explanations, self._scores = tuple(explanations), tuple(scores)

    def __len__(self) -> int:
        return len(self._scores)

    @overload
    def __getitem__(self, at: int) -> Scores: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Scores]: ...
    def __getitem__(self, at: int | slice) -> Scores | Sequence[Scores]:
        return self._scores[at]

    def __repr__(self) -> str:
        metrics = ", ".join(self._scores[0])
        return f"<Scores of {len(self)} explanations by {metrics}>"

    def table(self) -> pd.DataFrame:
        """A row an explanation and metric: ``image`` and ``explainer`` before the columns
        of `Scores.table`.
        """
        parts = [
            scores.table().assign(image=one.sample.name, explainer=one.explainer)
            for one, scores in zip(self.explanations, self._scores, strict=True)
        ]
        whole = pd.concat(parts, ignore_index=True)
        return whole[["image", "explainer", *SCORE_COLUMNS]]

    def summary(self) -> pd.DataFrame:
        """A row an explainer and metric: ``n`` images with a number, their ``mean`` and
        its 95 % interval ``low`` to ``high`` (NaN for fewer than two), and how many have
        none (``missing``).
        """
        whole = self.table()
        rows = []
        groups = whole.groupby(["explainer", "metric"], sort=False)
        for (explainer, metric), part in groups:
            values = part["value"].dropna().to_numpy()
            known = stats.mean_interval(values) if len(values) else None
            rows.append(
                {
                    "explainer": explainer,
                    "metric": metric,
                    "n": len(values),
                    "mean": known.mean if known else math.nan,
                    "low": known.low if known else math.nan,
                    "high": known.high if known else math.nan,
                    "missing": len(part) - len(values),
                }
            )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        from consilience.show.figures import table_html

        return table_html(self.summary())


SCORE_COLUMNS = ["metric", "value", "higher_is_better", "lowest", "highest", "reason"]


def _score_row(spelled: str, score: Score | NotApplicable) -> dict[str, Any]:
    metric = registry.metrics.build(spelled)
    refused = isinstance(score, NotApplicable)
    return {
        "metric": spelled,
        "value": math.nan if isinstance(score, NotApplicable) else score.value,
        "higher_is_better": metric.higher_is_better,
        "lowest": metric.bounds[0],
        "highest": metric.bounds[1],
        "reason": str(score) if refused else "",
    }


def _of_pixels(explainer: Explainer) -> bool:
    """Whether a gradient has to reach the image itself; that a layer gets one is seen
    where it is taken.
    """
    return getattr(explainer, "layer", PIXELS) in (PIXELS, (PIXELS,))


@overload
def evaluate(
    model: Any,
    explanation: Explanation,
    metrics: str | Metric | Sequence[str | Metric] = (),
    suite: str | None = None,
) -> Scores: ...
@overload
def evaluate(
    model: Any,
    explanation: Sequence[Explanation],
    metrics: str | Metric | Sequence[str | Metric] = (),
    suite: str | None = None,
) -> ScoreTable: ...
def evaluate(
    model: Any,
    explanation: Explanation | Sequence[Explanation],
    metrics: str | Metric | Sequence[str | Metric] = (),
    suite: str | None = None,
) -> Scores | ScoreTable:
    """Score explanations by several metrics: for one, by each spelling its `Score`, or
    `NotApplicable` with the reason; for many, these `Scores` in a `ScoreTable`.

    ``suite`` names a set of metrics (``quick`` where nothing is asked). ``model`` is the
    one that made the explanations. Raises `ConsilienceError` for a metric, suite or
    option that there is not, or for another model. Each number stands alone: they have
    units of their own and are never added up. Intervals, controls and tests over images
    are those of an evaluated run.
    """
    model = as_model(model)
    built = _built_metrics(metrics, suite)
    if isinstance(explanation, Explanation):
        return _evaluate_part(model, [explanation], built)[0]
    many = list(explanation)
    if not many:
        raise ConsilienceError("no explanations to evaluate")
    scores: list[Scores] = []
    for start in range(0, len(many), MOST_AT_A_TIME):
        part = many[start : start + MOST_AT_A_TIME]
        scores += _evaluate_part(model, part, built)
    return ScoreTable(many, scores)


def _built_metrics(
    metrics: str | Metric | Sequence[str | Metric], suite: str | None
) -> dict[str, Metric]:
    """Metrics by their spelling, those of a suite after those that were named."""
    single = isinstance(metrics, str) or not isinstance(metrics, Sequence)
    named: list[Any] = [metrics] if single else list(metrics)  # type: ignore[arg-type]
    if suite is not None or not named:
        named += asked_metrics((), suite or "quick")
    return {
        one if isinstance(one, str) else registry.spell(one): registry.metrics.build(
            one
        )
        for one in named
    }


def _evaluate_part(
    model: Model, explanations: Sequence[Explanation], built: Mapping[str, Metric]
) -> list[Scores]:
    """Scores of some explanations, by metrics that may take them all at once."""
    for one in explanations:
        if one.model_id != model.id:
            raise ConsilienceError(
                f"{one.explainer} is of {one.model_id}; the model given is {model.id}"
            )
    with plain_torch():
        views = [
            model.view(one.sample, one.provenance.get("view")) for one in explanations
        ]
        by_metric = {
            name: metric_scores(model, metric, views, explanations)
            for name, metric in built.items()
        }
    return [
        Scores((name, column[row]) for name, column in by_metric.items())
        for row in range(len(explanations))
    ]


def metric_scores(
    model: Model,
    metric: Metric,
    views: Sequence[View],
    explanations: Sequence[Explanation],
) -> list[Score | NotApplicable]:
    """One metric's scores of explanations of one model, in one batch where the metric
    takes many.

    What the model cannot do, and a number that is not finite, is `NotApplicable` too.
    """
    missing = sorted(getattr(metric, "needs", frozenset()) - model.can)
    if missing:
        return [
            NotApplicable(
                code="model-cannot", needs=", ".join(missing), model=model.id
            )
        ] * len(views)
    posed = [
        targets.ask_where_read(model, view, one.target)
        for view, one in zip(views, explanations, strict=True)
    ]
    many = getattr(metric, "score_batch", None)
    if many is not None and all(asked is model for asked, _ in posed):
        return [_finite(score) for score in many(model, views, explanations)]
    bound = [
        replace(one, target=goal)
        for one, (_, goal) in zip(explanations, posed, strict=True)
    ]
    rows = zip(posed, views, bound, strict=True)
    return [_score(metric, asked, view, one) for (asked, _), view, one in rows]


def _score(
    metric: Metric, model: Model, view: View, explanation: Explanation
) -> Score | NotApplicable:
    try:
        return _finite(metric.score(model, view, explanation))
    except NotApplicable as reason:
        return reason


def _finite(score: Score | NotApplicable) -> Score | NotApplicable:
    if isinstance(score, Score) and not math.isfinite(score.value):
        return NotApplicable(code="score-not-finite", value=score.value)
    return score


def resolve_explainer(model: Model, by: str | Explainer) -> Explainer:
    """Build an explainer, refuse what the model cannot do, and settle what ``auto``
    becomes for this model.
    """
    explainer: Explainer = registry.explainers.build(by)
    missing = sorted(explainer.needs - model.can)
    if missing:
        name = registry.spell(explainer)
        has = ", ".join(sorted(model.can)) or "scores only"
        raise ConsilienceError(
            f"{name} needs {', '.join(missing)} of the model; {model.id} offers {has}"
        )
    resolved = getattr(explainer, "resolved", None)
    return explainer if resolved is None else resolved(model)


def raw_outputs(model: Model, view: View) -> torch.Tensor:
    """Outputs (1, K) of one view, by the plain network where there is one (no batch
    engine is started for one image).
    """
    if "module" not in model.can:
        return model.scores(view.pixels).detach().float().cpu()
    with torch.no_grad():
        return model.logits(view.pixels).detach().float().cpu()  # type: ignore[attr-defined, no-any-return]


def predict(model: Model, outputs: torch.Tensor) -> Prediction:
    """The first class of outputs (1, K)."""
    row = as_probabilities(outputs[0], model.outputs)
    values, order = row.sort(descending=True, stable=True)
    first = int(order[0])
    probability = float("nan") if model.outputs == "values" else float(values[0])
    margin = float(values[0] - values[1]) if len(values) > 1 else float("nan")
    exclusive = model.outputs in ("logits", "probabilities") and len(values) > 1
    exclusive = exclusive or bool(getattr(model, "complement", False))
    uniform = 1 / len(values) if exclusive else float("nan")
    also: tuple[int, ...] = ()
    if model.outputs == "sigmoid" and not exclusive:
        also = tuple(index for index in order[1:].tolist() if row[index] >= 0.5)
    name = class_name(model, first)
    return Prediction(first, name, probability, margin, uniform, also)


def target_of_image(
    model: Model, sample: Sample, target: str | int | Target, outputs: torch.Tensor
) -> Target:
    """The target that a word, a number, a class name or a spelling means for this
    image.
    """
    return targets.resolve_target(model, sample, target, outputs)


def check_target_name(model: Model, target: str | int | Target) -> None:
    """Refuse a class, layer, unit or file that is not there, before any image is read."""
    targets.check_target(model, target)


def explainer_spelling(by: str | Explainer) -> str:
    """An explainer's spelling with every option named."""
    return registry.spell(registry.explainers.build(by), full=True)


def engines_that_ran(ran: set[plan.Ran]) -> dict[str, Any]:
    """Engines and precisions that an explanation was made with, how gradients ran where
    that was chosen by trial, and how far low precision moved them; nothing where no pass
    was seen.
    """
    found: dict[str, Any] = {}
    for key in ("engine", "precision", "gradients"):
        names = sorted({getattr(one, key) for one in ran} - {""})
        found |= {key: "+".join(names)} if names else {}
    shifts = [one.shift for one in ran if one.shift is not None]
    return found | ({"gradient_shift": max(shifts)} if shifts else {})


def read_as_explained(target: Target, explainer: Explainer) -> Target:
    """The target read as the explainer's ``score`` option says, where it has one."""
    score = getattr(explainer, "score", None)
    read_as = getattr(target, "scored", None)
    return (
        read_as(score) if isinstance(score, str) and read_as is not None else target
    )


def finish_explanation(
    model: Model,
    sample: Sample,
    view: View,
    explainer: Explainer,
    by: str | Explainer,
    target: Target,
    heat: Heat,
    facts: dict[str, Any],
) -> Explanation:
    """An explainer's heat as an explanation in the model's frame, checked and with its
    provenance.
    """
    values = heat.values.detach().float().cpu()
    size = view.geometry.size
    extras = dict(heat.extras)
    if tuple(values.shape) != tuple(size):
        extras["grid"] = values.numpy()
        values = images.enlarge(values, size)
    asked = registry.spell(registry.explainers.build(by))
    if not bool(torch.isfinite(values).all()):
        raise ConsilienceError(
            f"{asked} gave a map with values that are not finite on {sample.name}"
        )
    notes = [*heat.facts.get("notes", ()), *view.notes]
    notes += _doubts(model, explainer, values)
    asked_of = heat.facts.get("fidelity") or {}
    if asked_of.get("kind") == "exact":
        notes.append(f"every draw was asked of the network itself: {asked_of['why']}")
    if (shift := facts.get("gradient_shift")) is not None:
        notes.append(
            f"gradients in {facts['precision']}: those measured are {shift:.2%} of their "
            f"size away from f32's"
        )
    provenance = {
        **model.facts,
        **heat.facts,
        **({"notes": notes} if notes else {}),
        **facts,
        "resolved": registry.spell(explainer, full=True),
        "view": view.mode,
        "model": model.spec,
        "versions": versions(),
        "key": explanation_key(model, sample, view, explainer, target),
    }
    array: Array = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    return Explanation(
        sample, model.id, asked, target, view.geometry, array, extras, provenance
    )


def _doubts(model: Model, explainer: Explainer, values: torch.Tensor) -> list[str]:
    """What makes a map doubtful, whoever made it."""
    notes = []
    apart = float(getattr(model, "randomness", 0.0))
    if apart > 0:
        notes.append(
            f"the model's forward pass is random: two passes of one image differ by "
            f"{apart:.1%} of the largest output, and the map differs each time"
        )
    if not bool(values.any()):
        why = (
            "its gradient is exactly zero, as behind a ReLU that is off or a token that "
            "is not read"
            if "gradients" in explainer.needs
            else "nothing that was changed in the image changed the score"
        )
        notes.append(f"the map is 0 everywhere: {why}")
    return notes


def explanation_key(
    model: Model, sample: Sample, view: View, explainer: Explainer, target: Target
) -> str:
    """Digest of everything the map depends on: image, model, view, engine, every
    option, target, library version.
    """
    engine = [str(model.facts.get(name)) for name in ("engine", "precision")]
    parts = [
        sample.digest,
        model.id,
        view.mode,
        str(view.geometry.as_dict()),
        registry.spell(explainer, full=True),
    ]
    parts += [
        f"{target.name}|{target.index}|{target.score}",
        *engine,
        versions()["consilience"],
    ]
    parts += [spelled] if (spelled := targets.target_spelling(target)) else []
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = (
        "consilience",
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "scikit-image",
        "scikit-learn",
    )
    return {name: version(name) for name in names}


# ---- own maps, and many layers


def own_explanation(
    sample: Any,
    values: Any,
    model: Any,
    target: str | int | Target = "predicted",
    name: str = "own",
    view: ViewMode | None = None,
    frame: Frame = "input",
) -> Explanation:
    """A map that was made elsewhere as an explanation (`Explanation.of`)."""
    model = as_model(model)
    if frame not in get_args(Frame):
        raise ConsilienceError(f"frame is input or image; got {frame!r}")
    if name in registry.explainers.names():
        raise ConsilienceError(
            f"{name!r} is an explainer of its own; give the map another name"
        )
    sample = inputs.one_sample(sample, inputs.Shown.of(model))
    shown = model.view(sample, view)
    values = _own_values(values, name)
    if frame == "image":
        values = _moved_to_input(values, sample, shown, name)
    outputs = raw_outputs(model, shown)
    goal = target_of_image(model, sample, target, outputs)
    size = shown.geometry.size
    if values.shape != tuple(size):
        values = images.enlarge(torch.from_numpy(values), size).numpy()
    provenance = {
        "weights": model.facts.get("weights"),
        "made": "elsewhere",
        "score": float(goal.of(outputs)[0])
        if not isinstance(goal, targets.ReadElsewhere)
        else math.nan,
        "prediction": asdict(predict(model, outputs)),
        "passes": 0,
        "seconds": 0.0,
        "view": shown.mode,
        "model": model.spec,
        "versions": versions(),
        "key": blake2b(
            repr(
                (sample.digest, model.id, goal.name, name, shown.geometry.as_dict())
            ).encode()
            + values.tobytes(),
            digest_size=16,
        ).hexdigest(),
    }
    return Explanation(
        sample, model.id, name, goal, shown.geometry, values, {}, provenance
    )


Frame = Literal["input", "image"]
"""What a map covers: the model's input, or the whole image."""


def _own_values(values: Any, name: str) -> Array:
    array = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    try:
        found: Array = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise ConsilienceError(
            f"{name}: a map is numbers (h, w); got {type(values).__name__}"
        ) from None
    if found.ndim > 2:
        found = found.reshape([side for side in found.shape if side != 1] or [1])
    if found.ndim != 2 or 0 in found.shape:
        raise ConsilienceError(
            f"{name}: a map is (h, w); got {np.shape(array)} (sum it over colours first)"
        )
    if not np.isfinite(found).all():
        raise ConsilienceError(f"{name}: the map has values that are not finite")
    return np.ascontiguousarray(found)


def _moved_to_input(values: Array, sample: Sample, shown: View, name: str) -> Array:
    """A map that covers the image in the model's frame."""
    height, width = sample.pixels.shape[:2]
    if values.shape != (height, width):
        values = images.enlarge(torch.from_numpy(values), (height, width)).numpy()
    low, span = float(values.min()), float(np.ptp(values)) or 1.0
    placement = images.Placement.from_dict(shown.geometry.as_dict())
    placed = images.place(
        ((values - low) / span)[:, :, None], placement, "bilinear", -low / span
    )
    return np.ascontiguousarray(placed[:, :, 0] * span + low, dtype=np.float32)


def compare_layers(
    model: Any,
    image: Any,
    layers: Sequence[str] = (),
    by: str = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Explanations:
    """One image explained at one layer after another, in the order of the pass.

    ``layers`` are the network's blocks unless named (its outermost numbered modules that
    give a map: ``layer1.0``, ``blocks.3``) and where a CAM looks by itself. ``by`` is a
    method with a ``layer``. Its ``figure()`` has them side by side.
    """
    model = as_model(model)
    explainer = resolve_explainer(model, by)
    if not hasattr(explainer, "layer"):
        raise ConsilienceError(f"{by} looks at no layer; take gradcam or another CAM")
    sample = inputs.one_sample(image, inputs.Shown.of(model))
    names = list(layers) or blocks_of(model)
    made = [
        explain(model, sample, replace(explainer, layer=(name,)), target, view)  # type: ignore[type-var]
        for name in names
    ]
    return Explanations(made)


def blocks_of(model: Any) -> list[str]:
    """A network's outermost numbered layers with a map, and where a CAM looks by itself;
    every layer with a map where none is numbered.
    """
    maps = [
        layer.name
        for layer in model.layers()
        if layer.spatial is not None and max(layer.spatial) > 1
    ]
    numbered = [name for name in maps if _outermost_number(name)]
    automatic = model.target_layer()
    blocks = {*(numbered or maps), automatic}
    return [name for name in maps if name in blocks]


def _outermost_number(name: str) -> bool:
    parts = name.split(".")
    return parts[-1].isdecimal() and not any(part.isdecimal() for part in parts[:-1])
