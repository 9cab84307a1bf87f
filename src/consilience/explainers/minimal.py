"""Minimal regions: as little of the image as the class needs, and as little as it cannot
do without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import registry
from consilience.perturb.minimal import Ask, Subset, irreducible, smallest
from consilience.perturb.probe import Bits, probe
from consilience.perturb.superpixels import Grid, Segmenter, segment
from consilience.registry import explainers, option
from consilience.types import Array, Heat, Model, NotApplicable, Target, View


@dataclass(frozen=True)
class FirstBy:
    """By how much a class's output is above all others': above 0 it is said first."""

    index: int
    name: str
    score: str = "margin"

    def of(self, outputs: Tensor) -> Tensor:
        """Margins (N,) of outputs (N, K)."""
        others = outputs.clone()
        others[:, self.index] = -torch.inf
        return outputs[:, self.index] - others.amax(dim=1)


@explainers.register("minimal")
@dataclass(frozen=True)
class Minimal:
    """Sufficient and necessary regions: a small part of the image that keeps the class
    first, under *every* fill of the rest, and a small part without which it is not
    first under any (sufficient input subsets, Carter et al., AISTATS 2019; abductive and
    contrastive explanations, Ignatiev et al., AAAI 2019).

    ``search=exact`` asks all subsets by size, so that none is smaller (at most 2^S
    passes a fill); ``greedy`` grows and cuts and is irreducible: no single part can be
    left out; ``auto`` is exact up to ``most_exact`` parts. Up to ``most`` disjoint
    sufficient regions are found one after the other, each in what is left. The map is 1
    on the first, 1/2 on the second, and so on; ``extras`` hold ``sufficient`` (m, h, w)
    and ``necessary`` (n, h, w), the facts sizes, margins and passes. `NotApplicable`
    where the class is not first in the image itself, is no class, or is
    first with everything hidden and whatever is removed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Minimal"
    segments: Segmenter = option(Grid(5), kind="segmenter", help="the parts")
    fills: tuple[str, ...] = option(
        ("grey", "blur"), help="what takes the place of the rest, joined by +"
    )
    search: Literal["auto", "exact", "greedy"] = option(
        "auto", help="how it is sought"
    )
    most: int = option(3, help="disjoint sufficient regions at most", least=1)
    most_exact: int = option(12, help="parts of which auto asks all subsets", least=1)

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The regions of one image."""
        if target.index is None:
            raise NotApplicable(code="no-class-to-keep", target=target.name)
        segments = segment(self.segments, view.rgb)
        count = int(segments.max()) + 1
        asked = Counter[str]()
        ask, missing = self._questions(model, view, target, segments, asked)
        everything = np.ones(count, bool)
        if ask(everything[None])[0] <= 0:
            raise NotApplicable(code="not-said", target=target.name)
        search = self._search(count)
        sufficient: list[Subset] = []
        free = everything.copy()
        while len(sufficient) < self.most and free.any():
            found = search(ask, free)
            if found is None or not found.size:
                break
            sufficient.append(found)
            free &= ~found.on
        necessary = search(missing, everything)
        if not sufficient and necessary is None:
            raise NotApplicable(code="nothing-needed", target=target.name)
        return self._heat(segments, sufficient, necessary, count, asked["passes"])

    def _search(self, count: int) -> Callable[[Ask, Array], Subset | None]:
        exact = self.search == "exact" or (
            self.search == "auto" and count <= self.most_exact
        )
        return smallest if exact else irreducible

    def _questions(
        self,
        model: Model,
        view: View,
        target: Target,
        segments: Array,
        asked: Counter[str],
    ) -> tuple[Ask, Ask]:
        """Whether what is kept is enough under every fill, and whether without what is
        removed it is not under any; ``asked`` counts passes.
        """
        fills = [
            registry.fills.build(name).image(view, segments) for name in self.fills
        ]
        first = FirstBy(int(target.index), target.name)  # type: ignore[arg-type]

        def margins(kept: Array) -> Array:
            asked["passes"] += len(kept) * len(fills)
            return np.stack(
                [
                    probe(model, view, Bits(segments, kept), first, fill, self.label)
                    .double()
                    .numpy()
                    for fill in fills
                ]
            )

        def enough(kept: Array) -> Array:
            least: Array = margins(kept).min(0)
            return least

        def missed(removed: Array) -> Array:
            most: Array = -margins(~removed).max(0)
            return most

        return enough, missed

    def _heat(
        self,
        segments: Array,
        sufficient: list[Subset],
        necessary: Subset | None,
        count: int,
        passes: int,
    ) -> Heat:
        values = np.zeros(segments.shape, np.float32)
        for place, one in enumerate(sufficient, start=1):
            values[one.on[segments]] = 1 / place
        shape = (0, *segments.shape)
        regions = [one.on[segments] for one in sufficient]
        needed = [] if necessary is None else [necessary.on[segments]]
        facts: dict[str, Any] = {
            "parts": count,
            "fills": list(self.fills),
            "sufficient": [_said(one) for one in sufficient],
            "necessary": None if necessary is None else _said(necessary),
            "passes": passes,
        }
        return Heat(
            torch.from_numpy(values),
            {
                "sufficient": np.array(regions) if regions else np.zeros(shape, bool),
                "necessary": np.array(needed) if needed else np.zeros(shape, bool),
            },
            facts,
        )


def _said(one: Subset) -> dict[str, Any]:
    return {
        "parts": one.size,
        "margin": one.margin,
        "passes": one.passes,
        "smallest": one.smallest,
        "members": np.flatnonzero(one.on).tolist(),
    }
