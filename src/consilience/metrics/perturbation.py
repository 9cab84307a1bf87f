"""What metrics of edited images share: the order of pixels, edits by rank, and scoring
many images in full chunks.

A metric of this kind says by `Probing.plan` which edits of an image it wants scored and
what it makes of the scores. Nothing here is a metric.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.perturb.fidelity import (
    WORTHWHILE,
    Points,
    cheaper_of,
    points,
    summed,
)
from consilience.perturb.probe import Edits, Keeps, probe_many
from consilience.types import (
    Array,
    Cheaper,
    ClassTarget,
    ConsilienceError,
    Explanation,
    Fidelity,
    Model,
    NotApplicable,
    Score,
    Target,
    View,
)

ScoreKind = Literal["probability", "logit"]
VIEWS_AT_ONCE = 16
"""Images whose edits share chunks: beyond it hardly a batch is saved, and each holds
its image, fill and ranks.
"""

POINTS_FIDELITY = (
    "what most points are asked of: the network itself, or a cheap copy of it, whose errors "
    "a random part asked of both takes out; auto: where this machine has one that pays"
)

# ---- from edits to a score


@dataclass(frozen=True, eq=False)
class EditPlan:
    """Which edits of an image are to be scored, and what becomes of the scores (n,),
    float64.

    ``affine``: once the first and the last score are known, the value is a weighted sum
    of the others and a constant. Then most may be asked of a cheaper network.
    """

    keeps: Keeps
    fill: Tensor
    target: Target
    finish: Callable[[Array], Score]
    affine: bool = False


class Probing:
    """``score`` and ``score_batch`` of a metric that has a ``plan``."""

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """The edits of one image; raises `NotApplicable` where the metric can say
        nothing of it.
        """
        raise NotImplementedError

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The number, and the curve behind it; raises `NotApplicable`."""
        found = self.score_batch(model, [view], [explanation])[0]
        if isinstance(found, NotApplicable):
            raise found
        return found

    def score_batch(
        self, model: Model, views: Sequence[View], explanations: Sequence[Explanation]
    ) -> list[Score | NotApplicable]:
        """Many of one, with the model's chunks full across images; what `NotApplicable`
        says takes the place of a score.

        At a time 16 images are held with their fills and ranks, whatever their number.
        """
        found: list[Score | NotApplicable] = []
        for start in range(0, len(views), VIEWS_AT_ONCE):
            part = slice(start, start + VIEWS_AT_ONCE)
            plans = [
                self._planned(model, *pair)
                for pair in zip(views[part], explanations[part], strict=True)
            ]
            found += self._finished(model, views[part], plans)
        return found

    def _planned(
        self, model: Model, view: View, explanation: Explanation
    ) -> EditPlan | NotApplicable:
        try:
            return self.plan(model, view, explanation)
        except NotApplicable as reason:
            return reason

    def _finished(
        self,
        model: Model,
        views: Sequence[View],
        plans: Sequence[EditPlan | NotApplicable],
    ) -> list[Score | NotApplicable]:
        ready = [
            (view, plan)
            for view, plan in zip(views, plans, strict=True)
            if isinstance(plan, EditPlan)
        ]
        done = iter(self._asked(model, ready))
        return [next(done) if isinstance(plan, EditPlan) else plan for plan in plans]

    def _asked(
        self, model: Model, ready: Sequence[tuple[View, EditPlan]]
    ) -> list[Score | NotApplicable]:
        label = str(getattr(self, "spelled", "probing"))
        fidelity: Fidelity = getattr(self, "fidelity", "exact")
        found = "" if fidelity == "exact" else cheaper_of(model, fidelity)
        shared = [_shared(plan, found, fidelity) for _, plan in ready]
        exact = probe_many(
            model,
            [
                _edits(view, plan, one.exact if isinstance(one, Points) else None)
                for (view, plan), one in zip(ready, shared, strict=True)
            ],
            label,
        )
        both = [
            (*pair, one)
            for pair, one in zip(ready, shared, strict=True)
            if isinstance(one, Points)
        ]
        if not both or not isinstance(found, Cheaper):
            return [
                _done(plan, scores, one)
                for (_, plan), scores, one in zip(ready, exact, shared, strict=True)
            ]
        cheap = iter(
            probe_many(
                found.model,
                [_edits(view, plan, one.inner) for view, plan, one in both],
                f"{label} in {found.kind}",
            )
        )
        return [
            _of_both(plan, one, scores, next(cheap), found)
            if isinstance(one, Points)
            else _done(plan, scores, one)
            for (_, plan), scores, one in zip(ready, exact, shared, strict=True)
        ]


def _edits(view: View, plan: EditPlan, rows: Array | None) -> Edits:
    keeps = plan.keeps
    if rows is not None:
        assert isinstance(keeps, Ranked)
        keeps = keeps.at(rows)
    return Edits(view, keeps, plan.target, plan.fill)


def _shared(plan: EditPlan, found: Cheaper | str, fidelity: Fidelity) -> Points | str:
    """Which points are asked of which network; or why all of the exact one, "" where
    nothing else was asked for.
    """
    if isinstance(found, str):
        return found
    if not (plan.affine and isinstance(plan.keeps, Ranked)):
        return "the value is no sum over its points"
    # by the map itself: what the choice adds is independent between maps and images
    order = plan.keeps.rank.astype(np.uint32).tobytes()
    found_points = points(len(plan.keeps), [zlib.crc32(order)])
    most = WORTHWHILE if fidelity == "auto" else 1.0
    if found_points.relative_time(found.cost) >= most:
        return f"{len(plan.keeps)} points are too few for {found.kind} to pay"
    return found_points


def _done(plan: EditPlan, scores: Tensor, why: str | Points) -> Score | NotApplicable:
    try:
        made = plan.finish(scores.double().numpy())
    except NotApplicable as reason:
        return reason
    if not why:
        return made
    return replace(
        made, facts={**made.facts, "fidelity": {"kind": "exact", "why": why}}
    )


def _of_both(
    plan: EditPlan, asked: Points, exact: Tensor, cheap: Tensor, found: Cheaper
) -> Score | NotApplicable:
    """The score of what the two networks said together."""
    said, told = np.zeros(len(plan.keeps)), np.zeros(len(plan.keeps))
    said[asked.exact] = exact.double().numpy()
    told[asked.inner] = cheap.double().numpy()
    try:
        together = summed(asked, _weights(plan, said, asked.inner), told, said)
        made = plan.finish(together.scores)
    except NotApplicable as reason:
        return reason
    facts = {
        "kind": found.kind,
        "exact_passes": len(asked.exact),
        "cheap_passes": len(asked.inner),
        "cheap_cost": found.cost,
        "relative_time": round(asked.relative_time(found.cost), 3),
        **together.facts,
    }
    return replace(made, facts={**made.facts, "fidelity": facts})


def _weights(plan: EditPlan, scores: Array, inner: Array) -> Array:
    """Of each inner point in the value: what one more there adds."""
    plain = plan.finish(scores).value
    found = np.zeros(len(scores))
    for at in inner:
        more = scores.copy()
        more[at] += 1
        found[at] = plan.finish(more).value - plain
    return found


def map_of(view: View, explanation: Explanation) -> Array:
    """The explanation's values (h, w) float64, checked against the view."""
    values = np.asarray(explanation.values, dtype=np.float64)
    if values.shape != tuple(view.pixels.shape[-2:]):
        raise ConsilienceError(
            f"the map is {values.shape}; the image is {tuple(view.pixels.shape[-2:])}"
        )
    if not np.isfinite(values).all():
        raise ConsilienceError(
            f"{explanation.explainer}: {int((~np.isfinite(values)).sum())} values of the map "
            f"are not finite"
        )
    return values


def read_as(target: Target, score: ScoreKind) -> Target:
    """The target as a probability or logit, as far as the model's outputs allow; one
    that is not a class stays as it is.
    """
    return target.scored(score) if isinstance(target, ClassTarget) else target


def options_turn(metric: Any, **changes: Any) -> None:
    """Options may turn a metric's direction or lift its bounds: then the instance says
    otherwise than its class.
    """
    for name, value in changes.items():
        object.__setattr__(metric, name, value)


def open_ended(metric: Any, lifted: bool) -> None:
    """Lift the bounds where the options do: a logit has none."""
    if lifted:
        options_turn(metric, bounds=(-np.inf, np.inf))


# ---- the order of pixels


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int) -> Array:
    order = np.random.default_rng([seed, count]).permutation(count)
    order.setflags(write=False)
    return order


def ranks(values: Array, seed: int) -> Array:
    """The rank int32 of each value, 0 the largest, in the shape of ``values``.

    Ties are broken in a random order that depends on the seed and the number of values
    alone, so that it is the same for all methods: neither the order of memory nor a
    method's own noise decides.
    """
    shuffled = _shuffled(values.size, seed)
    order = shuffled[np.argsort(-values.ravel()[shuffled], kind="stable")]
    found = np.empty(values.size, dtype=np.int32)
    found[order] = np.arange(values.size, dtype=np.int32)
    return found.reshape(values.shape)


def removal_stops(
    pixels: int, steps: int, step: int = 0, share: float = 1.0
) -> Array:
    """How many pixels are edited at each point: from 0 up to ``share`` in equal
    ``steps``, or ``step`` more at a time.
    """
    most = round(share * pixels)
    if step:
        return np.minimum(np.arange(-(-most // step) + 1) * step, most)
    return np.unique(np.rint(np.linspace(0, most, steps + 1)).astype(np.int64))


@dataclass(frozen=True, eq=False)
class Ranked:
    """Edits by rank: image i shows ``fill`` where ``start[i] <= rank < stop[i]``, and
    the image elsewhere.

    ``rank`` is (h, w) int32, ``start`` and ``stop`` (n,) are whole numbers. ``reveal``
    turns it round: the image appears there on the fill. Each image is one comparison a
    pixel and a choice, whatever the number of steps.
    """

    rank: Array
    start: Array
    stop: Array
    reveal: bool = False

    def __len__(self) -> int:
        return len(self.stop)

    def at(self, rows: Array) -> Ranked:
        """Some of the images."""
        return replace(self, start=self.start[rows], stop=self.stop[rows])

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        rank = torch.from_numpy(self.rank).to(image.device)
        edges = torch.from_numpy(
            np.stack([self.start, self.stop]).astype(np.int32)
        ).to(image.device)
        inside, outside = (image, fill) if self.reveal else (fill, image)
        for part in torch.split(edges, size, dim=1):
            start, stop = part[:, :, None, None, None]
            chosen = rank < stop
            if bool(start.any()):
                chosen &= rank >= start
            yield torch.where(chosen, inside, outside)


def first(rank: Array, stop: Array, reveal: bool = False) -> Ranked:
    """The first ``stop`` (n,) of all pixels edited."""
    return Ranked(rank, np.zeros_like(stop), stop, reveal)


# ---- curves and correlations


def area(curve: Array) -> float:
    """Mean height of a curve (2, n) by trapezoids: its area over the width, whatever
    share of the image it spans.
    """
    at, height = curve
    return float(
        np.sum((height[1:] + height[:-1]) / 2 * np.diff(at)) / (at[-1] - at[0])
    )


def check_gap(found: float, gap: float, what: str) -> None:
    """Raise `NotApplicable` where what is divided by is below ``gap``, or 0."""
    if found < max(gap, 1e-12):
        raise NotApplicable(code="below-gap", what=what, found=found, gap=gap)


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation; raises `NotApplicable` where one side does not vary beyond
    the rounding of a float32.
    """
    for side, what in ((a, "the map's sums"), (b, "the model's scores")):
        if np.ptp(side) <= 1e-6 * np.abs(side).max(initial=0.0):
            raise NotApplicable(code="all-equal", what=what)
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
