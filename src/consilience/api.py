"""The public verbs: load, read, explain, agree. Each parses, resolves, times and validates; the work is elsewhere."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from consilience import images, registry
from consilience.models import engines
from consilience.types import (
    Array,
    ClassTarget,
    ConsilienceError,
    Explainer,
    Explanation,
    Heat,
    Model,
    Sample,
    Target,
    View,
    ViewMode,
)


@dataclass(frozen=True)
class Prediction:
    """What a model says of a picture: the first class, its probability (nan for bare values), its lead over the second."""

    index: int
    name: str
    probability: float
    margin: float


def explain(
    model: Model,
    sample: Sample,
    by: str | Explainer = "gradcam",
    target: str | int | Target = "predicted",
    view: ViewMode | None = None,
) -> Explanation:
    """Explain one picture: a raw map in the model's frame.

    ``by`` is an explainer or its spelling (``"lime:samples=700,seed=1"``), ``target`` is ``predicted``, ``true``, a class's
    index or name, or a `Target`; ``view`` is ``crop`` or ``squash``, None as the model was trained.
    Raises `ConsilienceError` where the model cannot do what the explainer needs.
    """
    explainer = resolve_explainer(model, by)
    shown = model.view(sample, view)
    outputs = raw_outputs(model, shown)
    goal = resolve_target(model, sample, target, outputs)
    goal = scored(goal, explainer)
    start = time.perf_counter()
    with engines.recorded() as ran:
        heat = explainer.explain(model, shown, goal)
    seconds = time.perf_counter() - start
    facts = {
        **as_it_ran(ran),
        "seconds": seconds,
        "score": float(goal.of(outputs)[0]),
        "prediction": asdict(predict(model, outputs)),
    }
    return finish(model, sample, shown, explainer, by, goal, heat, facts)


def resolve_explainer(model: Model, by: str | Explainer) -> Explainer:
    """Build an explainer, refuse what the model cannot do, and settle what ``auto`` becomes for this model."""
    explainer: Explainer = registry.explainers.build(by)
    missing = sorted(explainer.needs - model.can)
    if missing:
        name = registry.spell(explainer)
        has = ", ".join(sorted(model.can)) or "scores only"
        raise ConsilienceError(f"{name} needs {', '.join(missing)} of the model; {model.id} offers {has}")
    resolved = getattr(explainer, "resolved", None)
    return explainer if resolved is None else resolved(model)


def raw_outputs(model: Model, view: View) -> torch.Tensor:
    """Outputs (1, K) of one view, by the plain network where there is one (no batch engine is started for one picture)."""
    if "module" not in model.can:
        return model.scores(view.pixels).detach().float().cpu()
    with torch.no_grad():
        return model.logits(view.pixels).detach().float().cpu()  # type: ignore[attr-defined, no-any-return]


def predict(model: Model, outputs: torch.Tensor) -> Prediction:
    """The first class of outputs (1, K)."""
    row = outputs[0]
    if model.outputs == "logits":
        row = row.softmax(dim=0)
    values, order = row.sort(descending=True, stable=True)
    first = int(order[0])
    probability = float("nan") if model.outputs == "values" else float(values[0])
    margin = float(values[0] - values[1]) if len(values) > 1 else float("nan")
    return Prediction(first, class_name(model, first), probability, margin)


def class_name(model: Model, index: int) -> str:
    """The name of a class, or its number where the model has no names."""
    return model.classes[index] if index < len(model.classes) else str(index)


def resolve_target(model: Model, sample: Sample, target: str | int | Target, outputs: torch.Tensor) -> Target:
    """The target that a word, a number or a class name means for this picture."""
    if not isinstance(target, str | int):
        return target
    index = _target_index(model, sample, target, outputs)
    if not 0 <= index < outputs.shape[1]:
        raise ConsilienceError(f"target {target!r} is out of range: {model.id} has classes 0 to {outputs.shape[1] - 1}")
    plain = ClassTarget(index, class_name(model, index), outputs=model.outputs)
    return plain.scored("logit")


def check_target(model: Model, target: str | int | Target) -> None:
    """Refuse a class that the model has not, before any picture is read."""
    if isinstance(target, str) and target not in ("predicted", "true") and not target.lstrip("-").isdigit():
        _class_index(model, target)


def full_spelling(by: str | Explainer) -> str:
    """An explainer's spelling with every option named."""
    return registry.spell(registry.explainers.build(by), full=True)


def _target_index(model: Model, sample: Sample, target: str | int, outputs: torch.Tensor) -> int:
    if target == "predicted":
        return int(outputs[0].argmax())
    if target == "true":
        if sample.label is None:
            raise ConsilienceError(f"{sample.name}: target 'true' needs the true class; give --truth boxes.csv")
        return sample.label
    if isinstance(target, int) or target.lstrip("-").isdigit():
        return int(target)
    return _class_index(model, target)


def _class_index(model: Model, name: str) -> int:
    wanted = _plain(name)
    found = [index for index, known in enumerate(model.classes) if _plain(known) == wanted]
    if not found:
        raise ConsilienceError(registry.unknown("class", name, model.classes, limit=12))
    if len(found) > 1:
        raise ConsilienceError(f"class {name!r} is not unique: it is number {' and '.join(map(str, found))}; give the number")
    return found[0]


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()


def as_it_ran(ran: set[tuple[str, str]]) -> dict[str, str]:
    """Engines and precisions that an explanation was made with; nothing where no pass was seen."""
    if not ran:
        return {}
    names, precisions = zip(*ran, strict=True)
    return {"engine": "+".join(sorted({*names})), "precision": "+".join(sorted({*precisions}))}


def scored(target: Target, explainer: Explainer) -> Target:
    """The target read as the explainer's ``score`` option says, where it has one."""
    score = getattr(explainer, "score", None)
    return target.scored(score) if isinstance(score, str) and isinstance(target, ClassTarget) else target


def finish(
    model: Model,
    sample: Sample,
    view: View,
    explainer: Explainer,
    by: str | Explainer,
    target: Target,
    heat: Heat,
    facts: dict[str, Any],
) -> Explanation:
    """An explainer's heat as an explanation in the model's frame, checked and with its provenance."""
    values = heat.values.detach().float().cpu()
    size = view.geometry.size
    extras = dict(heat.extras)
    if tuple(values.shape) != tuple(size):
        extras["grid"] = values.numpy()
        values = images.enlarge(values, size)
    asked = registry.spell(registry.explainers.build(by))
    if not bool(torch.isfinite(values).all()):
        raise ConsilienceError(f"{asked} gave a map with values that are not finite on {sample.name}")
    provenance = {
        **model.facts,
        **heat.facts,
        **facts,
        "resolved": registry.spell(explainer, full=True),
        "view": view.mode,
        "model": model.spec,
        "versions": versions(),
        "key": explanation_key(model, sample, view, explainer, target),
    }
    array: Array = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    return Explanation(sample, model.id, asked, target, view.geometry, array, extras, provenance)


def explanation_key(model: Model, sample: Sample, view: View, explainer: Explainer, target: Target) -> str:
    """Digest of everything the map depends on: picture, model, view, engine, every option, target, library version."""
    engine = [str(model.facts.get(name)) for name in ("engine", "precision")]
    parts = [sample.digest, model.id, view.mode, str(view.geometry.as_dict()), registry.spell(explainer, full=True)]
    parts += [f"{target.name}|{target.index}|{target.score}", *engine, versions()["consilience"]]
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("consilience", "torch", "torchvision", "timm", "numpy", "scikit-image", "scikit-learn")
    return {name: version(name) for name in names}
