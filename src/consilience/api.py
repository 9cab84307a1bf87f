"""The public verbs: load, read, explain, evaluate, agree.

Each parses, resolves, times and validates; the work is elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from consilience import images, registry, targets
from consilience.models.engines import plan
from consilience.models.layers import plain_torch
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


def explain(
    model: Model,
    sample: Sample,
    by: str | Explainer = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Explanation:
    """Explain one image: a raw map in the model's frame.

    ``by`` is an explainer or its spelling (``"lime:samples=700,seed=1"``), ``target``
    is ``predicted``, ``true``, a class's index or name, a spelling
    (``"difference:cat,dog"``, ``"unit:layer4,412"``: see `targets`), or a `Target`;
    ``view`` is ``crop`` or ``squash``, None as the model was trained. Raises
    `ConsilienceError` where the model cannot do what the explainer needs.
    """
    with plain_torch():
        return _explain(model, sample, by, target, view)


def _explain(
    model: Model,
    sample: Sample,
    by: str | Explainer,
    target: str | int | Target,
    view: ViewMode | None,
) -> Explanation:
    explainer = resolve_explainer(model, by)
    shown = model.view(sample, view)
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


def evaluate(
    model: Model,
    explanation: Explanation,
    metrics: str | Metric | Sequence[str | Metric],
) -> Scores:
    """Score one explanation by several metrics: by each spelling its `Score`, or
    `NotApplicable` with the reason.

    ``model`` is the one that made the explanation. Raises `ConsilienceError` for a
    metric or option that there is not, or for another model. Each number stands alone:
    they have units of their own and are never added up.
    """
    asked = (
        [metrics]
        if isinstance(metrics, str) or not isinstance(metrics, Sequence)
        else list(metrics)
    )
    built = {
        one if isinstance(one, str) else registry.spell(one): registry.metrics.build(
            one
        )
        for one in asked
    }
    if explanation.model_id != model.id:
        raise ConsilienceError(
            f"{explanation.explainer} is of {explanation.model_id}; the model given is "
            f"{model.id}"
        )
    with plain_torch():
        view = model.view(explanation.sample, explanation.provenance.get("view"))
        return Scores(
            (name, metric_scores(model, metric, [view], [explanation])[0])
            for name, metric in built.items()
        )


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


def engines_that_ran(ran: set[tuple[str, str]]) -> dict[str, str]:
    """Engines and precisions that an explanation was made with; nothing where no pass
    was seen.
    """
    if not ran:
        return {}
    names, precisions = zip(*ran, strict=True)
    return {
        "engine": "+".join(sorted({*names})),
        "precision": "+".join(sorted({*precisions})),
    }


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
    notes = [*heat.facts.get("notes", ()), *_doubts(model, explainer, values)]
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
