"""One class against another."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from typing import ClassVar

from torch import Tensor

from consilience.registry import option
from consilience.targets import targets
from consilience.targets.classes import (
    ScoreName,
    check_class,
    class_index,
    class_name,
    readable,
)
from consilience.types import Model, NotApplicable, Outputs, Sample, as_probabilities


@targets.register("difference")
@dataclass(frozen=True)
class DifferenceTarget:
    """One class against another: the difference of their logits, or of their
    probabilities where an explainer reads those.

    Classes are names, numbers, ``predicted``, ``second`` (the runner-up) or ``true``.
    """

    a: str = option(MISSING, help="class whose evidence is positive")
    b: str = option(MISSING, help="class whose evidence is negative")
    a_name: str = option("", help="its name; found")
    b_name: str = option("", help="its name; found")
    score: ScoreName = option(
        "logit", help="what is subtracted; settled by the explainer"
    )
    outputs: Outputs = option("logits", help="what the model's outputs are; found")
    index: ClassVar[None] = None

    @property
    def name(self) -> str:
        """Both classes."""
        return f"{self.a_name or self.a} - {self.b_name or self.b}"

    def check(self, model: Model) -> None:
        """Both are classes."""
        for one in (self.a, self.b):
            check_class(model, one)

    def resolved(
        self, model: Model, sample: Sample, outputs: Tensor
    ) -> DifferenceTarget:
        """Both as numbers; `NotApplicable` where they are the same class."""
        first, second = (
            class_index(model, sample, one, outputs) for one in (self.a, self.b)
        )
        names = (class_name(model, first), class_name(model, second))
        if first == second:
            raise NotApplicable(
                code="same-classes",
                image=sample.name,
                first=self.a,
                second=self.b,
                name=names[0],
            )
        score = readable(self.score, model.outputs)
        return replace(
            self,
            a=str(first),
            b=str(second),
            a_name=names[0],
            b_name=names[1],
            score=score,
            outputs=model.outputs,
        )

    def scored(self, score: str) -> DifferenceTarget:
        """The same classes read as ``score``, as far as the outputs allow."""
        return replace(self, score=readable(score, self.outputs))

    def of(self, outputs: Tensor) -> Tensor:
        """Differences (N,) of model outputs (N, K)."""
        if self.score == "probability":
            outputs = as_probabilities(outputs, self.outputs)
        return outputs[..., int(self.a)] - outputs[..., int(self.b)]
