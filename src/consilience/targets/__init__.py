"""What can be explained, and how it is spelled: a class, or ``name:value,key=value``
for everything else.

A class is a word (``predicted``, ``true``, ``second``), a number or a name. The rest
are registered dataclasses, spelled like explainers: ``difference:tench,goldfish``,
``unit:layer4,412``. A target that is not read from the class outputs names a `Reading`;
`asked` gives the model that answers it, and every explainer runs on that model as on
any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from consilience import registry
from consilience.classnames import classes_named
from consilience.models.network import TorchNetwork
from consilience.models.readouts import Readout, read_again
from consilience.targets.classes import (
    TARGET_WORDS,
    check_class,
    class_index,
    class_target,
)
from consilience.targets.places import file_digest
from consilience.types import (
    ClassTarget,
    ConsilienceError,
    Model,
    NotApplicable,
    Sample,
    Target,
    View,
)

targets = registry.Registry("target", "consilience.targets")
"""Every kind of target that is not a class."""


class Posed(Protocol):
    """A target as it is spelled, before it is settled for one image."""

    def check(self, model: Model) -> None:
        """Refuse what the model has not, before any image is read."""

    def resolved(self, model: Model, sample: Sample, outputs: Tensor) -> Target:
        """The same with words as class numbers and the digests of files; ``outputs``
        (1, K) are the image's.
        """


def resolve_target(
    model: Model, sample: Sample, target: str | int | Target, outputs: Tensor
) -> Target:
    """The target that a word, a number, a class name or a spelling means for this
    image; ``outputs`` (1, K) are its own.
    """
    target = _as_target(target)
    if isinstance(target, str) and is_spelled(model, target):
        target = build_target(target)
    if not isinstance(target, str | int):
        return (
            target.resolved(model, sample, outputs)
            if hasattr(target, "resolved")
            else target
        )
    return class_target(model, class_index(model, sample, target, outputs)).scored(
        "logit"
    )


def _as_target(given: Any) -> Any:
    """What was given as a target, with whole numbers of numpy and torch as numbers;
    `ConsilienceError` for what is no target at all.
    """
    if isinstance(given, str) or hasattr(given, "of") or hasattr(given, "resolved"):
        return given
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise ConsilienceError(
            f"a target is a word ({', '.join(TARGET_WORDS)}), a class's number or name, a "
            f"spelling, or a Target; got {given!r}"
        ) from None


def check_target(model: Model, target: str | int | Target) -> None:
    """Refuse a class, layer, unit or file that is not there, before any image is read."""
    target = _as_target(target)
    if isinstance(target, str) and is_spelled(model, target):
        target = build_target(target)
    if isinstance(target, str):
        check_class(model, target)
    elif hasattr(target, "check"):
        target.check(model)


def is_spelled(model: Model, text: str) -> bool:
    """Whether a text spells a target of a kind: ``name:...`` with a name that is
    registered, and no class is called so.
    """
    name, colon, _ = text.partition(":")
    return (
        bool(colon)
        and name.strip() in targets.names()
        and not classes_named(text, model.classes)
    )


def build_target(text: str) -> Any:
    """A target from its spelling."""
    return targets.build(text)


def ask_where_read(model: Model, view: View, target: Target) -> tuple[Model, Target]:
    """The model and the target to ask it for ``view``: these themselves for class
    outputs, else the network read elsewhere.

    Whoever explains or scores images for a target asks this first: `ReadElsewhere`
    targets refuse class outputs.
    """
    if not isinstance(target, ReadElsewhere):
        return model, target
    network = network_of(model, target)
    return read_again(network, target.reading(network, view)), Bound(target)


class Waiting:
    """The target of one image that is known when a pass over it has said something:
    `read`, or the first question, settles it.

    ``goal`` is the target then, ``outputs`` (1, K) float32 are what was said.
    """

    index: None = None
    name: str = "the prediction of the same pass"
    score: str = "mixed"

    def __init__(self, resolve: Callable[[Tensor], Target]) -> None:
        self._resolve = resolve
        self._settled: tuple[Target, Tensor] | None = None

    def read(self, outputs: Tensor) -> Target:
        """Settle it by outputs (1, K), once."""
        if self._settled is None:
            said = outputs.detach().float().cpu()
            self._settled = self._resolve(said), said
        return self._settled[0]

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (1,) of the outputs (1, K) that settle it."""
        return self.read(outputs).of(outputs)

    @property
    def goal(self) -> Target:
        """The target; `ConsilienceError` before anything was said."""
        return self._known[0]

    @property
    def outputs(self) -> Tensor:
        """What was said (1, K)."""
        return self._known[1]

    @property
    def _known(self) -> tuple[Target, Tensor]:
        if self._settled is None:
            raise ConsilienceError("no pass has said yet what the target is")
        return self._settled


class ReadElsewhere:
    """What targets share that are not read from class outputs: they refuse those, which
    would give another number.
    """

    def reading(self, model: TorchNetwork, view: View) -> Readout:
        """What is taken from a pass, for this image."""
        raise NotImplementedError

    def pick(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of what the reading gives, (N, K)."""
        raise NotImplementedError

    def of(self, outputs: Tensor) -> Tensor:
        """Refused."""
        name = getattr(self, "name", type(self).__name__)
        raise NotApplicable(code="not-class-outputs", name=name)


@dataclass(frozen=True)
class Bound:
    """A target on the outputs of the network that is read for it."""

    goal: Any
    index: None = None

    @property
    def name(self) -> str:
        """The target's."""
        return str(self.goal.name)

    @property
    def score(self) -> str:
        """The target's."""
        return str(self.goal.score)

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of outputs (N, K)."""
        picked: Tensor = self.goal.pick(outputs)
        return picked


def network_of(model: Model, what: Any) -> TorchNetwork:
    """The model as a torch network, or `ConsilienceError` naming the target that needs
    one.
    """
    if isinstance(model, TorchNetwork):
        return model
    name = getattr(type(what), "spelled", "target")
    raise ConsilienceError(
        f"target {name} needs the layers of a torch network; {model.id} offers scores only"
    )


def target_spelling(target: Target) -> str:
    """Everything a target depends on, spelled; empty for classes and for targets made
    in Python, which have no spelling.
    """
    return (
        registry.spell(target, full=True)
        if type(target).__dict__.get("registry") is targets
        else ""
    )


def pinned_spelling(target: str | None) -> str | None:
    """A spelled target with the digests of the files that it names, so that another
    content is another job.
    """
    if (
        target is None
        or ":" not in target
        or target.partition(":")[0].strip() not in targets.names()
    ):
        return target
    goal = build_target(target)
    files = [str(getattr(goal, name, "")) for name in ("mask", "reference")]
    return "#".join(
        [
            target,
            *(file_digest(file) for file in files if file and Path(file).is_file()),
        ]
    )


@dataclass(frozen=True)
class PythonTarget:
    """What is known of a target that was made in Python, when its run is read from
    disk: it cannot be asked again.
    """

    name: str
    score: str
    index: int | None = None

    def of(self, outputs: Tensor) -> Tensor:
        """Refused."""
        raise ConsilienceError(
            f"target {self.name!r} was made in Python and is not kept with the run; give it "
            f"again"
        )


def target_facts(target: Target) -> dict[str, Any]:
    """What a run keeps of a target, besides its class and name, so that `from_facts`
    makes it again.
    """
    known = {"target_score": target.score, "target_spelled": target_spelling(target)}
    return known | (
        {"target_outputs": target.outputs} if isinstance(target, ClassTarget) else {}
    )


def target_from_facts(
    index: int | None, name: str, facts: Mapping[str, Any]
) -> Target:
    """The target of a stored explanation."""
    spelled = facts.get("target_spelled")
    if spelled:
        goal: Target = build_target(spelled)
        return goal
    if index is None:
        return PythonTarget(name, facts["target_score"])
    return ClassTarget(
        index, name, facts["target_score"], facts.get("target_outputs", "logits")
    )
