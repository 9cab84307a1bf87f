"""Explanations beside others: in a column with a mask, and many of one call with the images
that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import pandas as pd

from consilience.agreement.masks import Mask
from consilience.data import Failure
from consilience.types import Array, ConsilienceError, Explanation, Geometry


@dataclass(frozen=True, eq=False)
class KeptExplanation:
    """An explanation beside others: the column it stands in, and the mask cut from it."""

    column: str
    explanation: Explanation
    cut: Mask

    @property
    def mask(self) -> Array:
        """(h, w) bool, in the model's frame."""
        return self.cut.on

    @property
    def values(self) -> Array:
        """The explanation's raw map."""
        return self.explanation.values

    @property
    def extras(self) -> Mapping[str, Array]:
        """The explanation's."""
        return self.explanation.extras

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The explanation's."""
        return self.explanation.provenance

    @property
    def geometry(self) -> Geometry:
        """The explanation's."""
        return self.explanation.geometry


class Explanations(Sequence[Explanation]):
    """Explanations of many images, in the order of the images; by place, or by an
    image's name.

    ``failures`` are the images that could not be read or explained, each with its
    reason.
    """

    def __init__(
        self, made: Sequence[Explanation], failures: Sequence[Failure] = ()
    ) -> None:
        self._made = tuple(made)
        self.failures = tuple(failures)

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, at: int | str) -> Explanation: ...
    @overload
    def __getitem__(self, at: slice) -> Explanations: ...
    def __getitem__(self, at: int | str | slice) -> Explanation | Explanations:
        if isinstance(at, str):
            return self._named(at)
        if isinstance(at, slice):
            return Explanations(self._made[at], self.failures)
        return self._made[at]

    def _named(self, name: str) -> Explanation:
        found = [one for one in self._made if one.sample.name == name]
        if len(found) == 1:
            return found[0]
        names = [one.sample.name for one in self._made]
        there = ", ".join(names[:NAMED]) + (", ..." if names[NAMED:] else "")
        said = f"{len(found)} images are called" if found else "no image is called"
        raise ConsilienceError(f"{said} {name!r}; there is: {there}")

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self._made)

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(one.explainer for one in self._made))
        failed = f", {len(self.failures)} failed" if self.failures else ""
        images = f"{len(self)} image{'s' if len(self) != 1 else ''}"
        return f"<Explanations by {methods or 'nothing'}: {images}{failed}>"

    def table(self) -> pd.DataFrame:
        """A row an image: what was predicted and what was explained.

        Columns ``image``, ``explainer``, ``target``, ``score``, ``predicted``,
        ``probability``, ``true`` (a number, missing where it is not known), ``view``.
        """
        return pd.DataFrame(
            [_row(one) for one in self._made],
            columns=[
                "image",
                "explainer",
                "target",
                "score",
                "predicted",
                "probability",
                "true",
                "view",
            ],
        ).astype({"true": "Int64"})

    def figure(self) -> Any:
        """Every map over its image, in a grid."""
        from consilience.show.figures import explanations_figure

        return explanations_figure(self._made)

    def _repr_html_(self) -> str:
        from consilience.show.figures import explanations_html

        return explanations_html(
            self._made, [str(one.reason) for one in self.failures]
        )

    def to_fiftyone(self, dataset: Any, field: str | None = None) -> None:
        """Add every map to its sample of a FiftyOne ``dataset`` as a heat map.

        Samples are told by their file (``filepath``), else by the name of it; ``field``
        is the explainer's name unless given. Maps are scaled to [0, 1] for display, as
        FiftyOne's are. Raises `ConsilienceError` for an image that is not in the data
        set.
        """
        from consilience.exports import to_fiftyone

        return to_fiftyone(self._made, dataset, field)


NAMED = 12


def _row(one: Explanation) -> dict[str, Any]:
    prediction = one.provenance.get("prediction") or {}
    return {
        "image": one.sample.name,
        "explainer": one.explainer,
        "target": one.target.name,
        "score": one.provenance.get("score"),
        "predicted": prediction.get("name"),
        "probability": prediction.get("probability"),
        "true": one.sample.label,
        "view": one.provenance.get("view"),
    }
