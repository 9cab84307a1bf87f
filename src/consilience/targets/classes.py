"""Classes by word, number or name."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from consilience import registry
from consilience.classnames import classes_named
from consilience.types import ClassTarget, ConsilienceError, Model, Outputs, Sample

TARGET_WORDS = ("predicted", "true", "second")
ScoreName = Literal["logit", "probability", "value"]


def class_name(model: Model, index: int) -> str:
    """The name of a class, with its number where two have that name; its number alone
    where the model has no names.
    """
    if index >= len(model.classes):
        return str(index)
    name = model.classes[index]
    return f"{name} ({index})" if model.classes.count(name) > 1 else name


def class_target(model: Model, index: int) -> ClassTarget:
    """A class by its number."""
    return ClassTarget(index, class_name(model, index), outputs=model.outputs)


def class_index(
    model: Model, sample: Sample, target: str | int, outputs: Tensor
) -> int:
    """The number of a class: of a word, a number or a name."""
    index = _class_index(model, sample, target, outputs)
    if not 0 <= index < outputs.shape[1]:
        raise ConsilienceError(
            f"target {target!r} is out of range: {model.id} has classes 0 to "
            f"{outputs.shape[1] - 1}"
        )
    return index


def check_class(model: Model, target: str) -> None:
    """Refuse a name that no class has."""
    if target not in TARGET_WORDS:
        numbered_or_named(model, target)


def _class_index(
    model: Model, sample: Sample, target: str | int, outputs: Tensor
) -> int:
    if isinstance(target, int):
        return target
    if target == "predicted":
        return int(outputs[0].argmax())
    if target == "second" and outputs.shape[1] > 1:
        return int(outputs[0].sort(descending=True, stable=True).indices[1])
    if target == "true":
        if sample.label is None:
            raise ConsilienceError(
                f"{sample.name}: target 'true' needs the true class; give --truth boxes.csv"
            )
        return sample.label
    return numbered_or_named(model, target)


def numbered_or_named(model: Model, name: str) -> int:
    """A class by its name, else a number: where classes are called by digits, a text is
    a name.
    """
    found = classes_named(name, model.classes)
    if not found and name.strip().lstrip("-").isdecimal():
        return int(name)
    if not found:
        raise ConsilienceError(
            registry.unknown("class", name, model.classes, limit=12)
        )
    if len(found) > 1:
        raise ConsilienceError(
            f"class {name!r} is not unique: it is number {' and '.join(map(str, found))}; "
            f"give the number"
        )
    return found[0]


def readable(wanted: str, outputs: Outputs) -> ScoreName:
    """What can be read of outputs: logits cannot be had from probabilities."""
    if outputs not in ("logits", "sigmoid"):
        return "value" if outputs == "values" else "probability"
    return "probability" if wanted == "probability" else "logit"
