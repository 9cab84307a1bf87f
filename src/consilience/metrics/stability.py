"""Stability: does the map stay where it is when the image hardly changes, when it is
moved, or when the dice are cast again?

Every metric here explains again, with the same method and options, the same class, and
the same seed unless seeds are what is asked about. A constant map is perfectly stable:
read these numbers beside the controls'. Where the model itself changes its mind, a map
may well move: ``facts.changed`` says for how many of the edited images the first class
was another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import progress
from consilience.metrics.explained_again import (
    chance_similarity,
    explained_maps,
    explainer_of,
)
from consilience.metrics.similarity import MapSimilarity, alike
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Model,
    NotApplicable,
    Score,
    View,
)

Views = Callable[[], Iterator[View]]
"""The edited images, made anew every time they are asked for, so that only a batch of
them is alive.
"""

# ---- edited images


def noisy(
    view: View,
    samples: int,
    size: float,
    seed: int,
    kind: Literal["uniform", "normal"] = "uniform",
) -> Iterator[View]:
    """Copies with noise on every pixel and colour, held to [0, 1]; each has a seed of
    its own.

    ``size`` is the largest change of ``uniform`` noise, the standard deviation of
    ``normal``.
    """
    for number in range(samples):
        rng, shape = np.random.default_rng([seed, number]), tuple(view.pixels.shape)
        noise = (
            rng.uniform(-size, size, shape)
            if kind == "uniform"
            else size * rng.standard_normal(shape)
        )
        pixels = view.pixels + torch.from_numpy(noise.astype(np.float32)).to(
            view.pixels
        )
        yield replace(view, pixels=pixels.clamp(0, 1))


def shifted(view: View, down: int, right: int) -> View:
    """The image moved by whole pixels; what comes in at a border repeats it."""
    height, width = view.pixels.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1).to(view.pixels.device)
    columns = (torch.arange(width) - right).clamp(0, width - 1).to(view.pixels.device)
    return replace(view, pixels=view.pixels[:, :, rows][:, :, :, columns])


def flipped(view: View) -> View:
    """The image in a mirror."""
    return replace(view, pixels=view.pixels.flip(-1))


def changed(model: Model, view: View, views: Iterator[View], total: int) -> int:
    """Of how many edited images the model's first class is not that of the image
    itself.
    """
    first = int(_scores(model, [view])[0].argmax())
    count = 0
    with progress.task("predictions", total) as running:
        while part := list(islice(views, max(1, model.batch))):
            count += int((_scores(model, part).argmax(dim=1) != first).sum())
            running.advance(len(part))
    return count


def _scores(model: Model, views: list[View]) -> Tensor:
    return model.scores(torch.cat([view.pixels for view in views]))


def again(
    model: Model, explanation: Explanation, views: Views, total: int, label: str
) -> Iterator[Array]:
    """The same method's maps (h, w) of the edited images."""
    target = explanation.target
    return explained_maps(
        explainer_of(explanation),
        model,
        ((view, target) for view in views()),
        total,
        label,
    )


def _checked(name: str, samples: int, radius: float, seed: int) -> None:
    if samples < 1:
        raise ConsilienceError(f"{name}: samples must be at least 1; got {samples}")
    if not 0 < radius <= 1:
        raise ConsilienceError(
            f"{name}: radius lies above 0 and up to 1, the range of pixels; got {radius:g}"
        )
    if seed < 0:
        raise ConsilienceError(f"{name}: seed must not be negative; got {seed}")


# ---- sensitivity


@dataclass(frozen=True)
class _Sensitivity:
    """What the two share: how far the map moves, by noisy copy."""

    samples: int = option(10, help="noisy copies that are explained")
    radius: float = option(
        0.02, help="largest change of a pixel, of its range 0 to 1"
    )
    seed: int = option(0, help="seed of the noise")

    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = "samples explanations and samples + 1 passes"
    spelled: ClassVar[str]

    def __post_init__(self) -> None:
        _checked(self.spelled, self.samples, self.radius, self.seed)

    def _moves(
        self, model: Model, view: View, explanation: Explanation
    ) -> tuple[Array, dict[str, Any]]:
        """Relative distances (samples,) of the copies' maps, and the facts."""
        whole = explanation.values.astype(np.float64)
        norm = float(np.linalg.norm(whole))
        if norm == 0:
            raise NotApplicable(
                code="map-zero-change", explainer=explanation.explainer
            )

        def views() -> Iterator[View]:
            return noisy(view, self.samples, self.radius, self.seed)

        found = again(model, explanation, views, self.samples, self.spelled)
        moves = np.array([np.linalg.norm(values - whole) / norm for values in found])
        return moves, {
            "changed": changed(model, view, views(), self.samples),
            "samples": self.samples,
        }


@metrics.register("max-sensitivity")
@dataclass(frozen=True)
class MaxSensitivity(_Sensitivity):
    """Max-sensitivity (Yeh et al., NeurIPS 2019, definition 2.1), relative to the map:
    the farthest it moves under small noise.

    ``max_{|y - x|_inf <= radius} ||E(y) - E(x)||_2 / ||E(x)||_2`` over ``samples``
    uniform draws, as captum computes it; the paper first scales maps to unit norm. A
    maximum over draws is a lower bound of the true one and grows with their number.
    ``curve`` has the draws. 0 for a map that knows nothing of the image;
    `NotApplicable` for a map of zeros.

    0 and up, lower is steadier.
    """

    label: ClassVar[str] = "Max-sensitivity"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The largest relative change."""
        moves, facts = self._moves(model, view, explanation)
        return Score(float(moves.max()), moves, facts)


@metrics.register("average-sensitivity")
@dataclass(frozen=True)
class AverageSensitivity(_Sensitivity):
    """Average sensitivity (Bhatt et al., IJCAI 2020, after Yeh et al. 2019): how far
    the map moves on average.

    ``mean_{|y - x|_inf <= radius} ||E(y) - E(x)||_2 / ||E(x)||_2`` over ``samples``
    uniform draws; unlike the maximum it does not grow with their number. ``curve`` has
    the draws.

    0 and up, lower is steadier.
    """

    label: ClassVar[str] = "Average sensitivity"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The mean relative change."""
        moves, facts = self._moves(model, view, explanation)
        return Score(float(moves.mean()), moves, facts)


@metrics.register("local-lipschitz")
@dataclass(frozen=True)
class LocalLipschitz(_Sensitivity):
    """Local Lipschitz estimate (Alvarez-Melis & Jaakkola 2018, arXiv 1806.08049,
    equation 2).

    ``max_{|y - x|_inf <= radius} ||E(x) - E(y)||_2 / ||x - y||_2`` over ``samples``
    uniform draws (the paper searches for the maximum; draws bound it from below).
    Pixels are in [0, 1]. Raw maps have units of their own, so with ``scale=unit`` they
    are first divided by the norm of E(x), and methods can be compared; ``scale=raw`` is
    the paper's equation.

    0 and up, lower is steadier.
    """

    scale: Literal["unit", "raw"] = option(
        "unit", help="maps relative to the norm of the image's own, or as they are"
    )
    label: ClassVar[str] = "Local Lipschitz"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The steepest change."""
        moves, facts = self._moves(model, view, explanation)
        if self.scale == "raw":
            moves = moves * np.linalg.norm(explanation.values.astype(np.float64))
        copies = noisy(view, self.samples, self.radius, self.seed)
        steps = np.array(
            [float((copy.pixels - view.pixels).double().norm()) for copy in copies]
        )
        slopes = np.divide(moves, steps, out=np.zeros_like(moves), where=steps > 0)
        return Score(float(slopes.max()), slopes, facts)


# ---- agreement


@dataclass(frozen=True)
class _Agreement:
    """What the rest shares: the similarity of two maps, and the line that a random map
    would give.
    """

    similarity: MapSimilarity = option(
        "spearman", help="spearman, pearson, cosine, ssim or iou-at-20"
    )

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset()

    def _scored(
        self, found: list[float], view: View, explanation: Explanation, **facts: Any
    ) -> Score:
        line = chance_similarity(explanation, view, self.similarity)
        return Score(
            float(np.mean(found)),
            np.array(found),
            {"similarity": self.similarity, **line, **facts},
        )


@metrics.register("seed-agreement")
@dataclass(frozen=True)
class SeedAgreement(_Agreement):
    """Agreement across seeds: mean similarity of the maps of ``seeds`` further seeds
    and the explanation's own, in pairs.

    ``mean_{i < j} s(E_i, E_j)`` over ``seeds + 1`` maps; ``curve`` has the pairs. What
    a sampling method does not agree on with itself it cannot have learnt from the
    model: more samples are needed. `NotApplicable` for a method without a seed, whose
    map is always the same. At the same seed such a method may still be wrong in the
    same way every time.

    -1 to 1, higher is steadier.
    """

    seeds: int = option(2, help="further seeds that are explained with", least=1)
    label: ClassVar[str] = "Agreement across seeds"
    cost: ClassVar[str] = "seeds explanations"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The mean over pairs of seeds."""
        explainer: Any = explainer_of(explanation)
        first = getattr(explainer, "seed", None)
        if not isinstance(first, int):
            raise NotApplicable(code="no-seed", explainer=explanation.explainer)
        found = [explanation.values]
        for seed in range(first + 1, first + 1 + self.seeds):
            found += explained_maps(
                replace(explainer, seed=seed),
                model,
                [(view, explanation.target)],
                1,
                "seeds",
            )
        pairs = [alike(a, b, self.similarity) for a, b in combinations(found, 2)]
        return self._scored(
            pairs, view, explanation, seeds=list(range(first, first + 1 + self.seeds))
        )


@metrics.register("flip-consistency")
@dataclass(frozen=True)
class FlipConsistency(_Agreement):
    """Consistency under a mirror: similarity of the map and of the mirrored image's
    map, mirrored back.

    ``s(E(x), flip(E(flip(x))))``. Networks trained with mirrored images hardly change
    their mind; a method that follows the model should hardly change its map. A sampling
    method draws the same dice for another image, so its noise counts too.

    -1 to 1, higher is steadier.
    """

    label: ClassVar[str] = "Consistency under a flip"
    cost: ClassVar[str] = "1 explanation and 2 passes"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The similarity after mirroring back."""
        mirror = flipped(view)
        (found,) = again(model, explanation, lambda: iter([mirror]), 1, "flip")
        facts = {"changed": changed(model, view, iter([mirror]), 1)}
        return self._scored(
            [alike(explanation.values, found[:, ::-1], self.similarity)],
            view,
            explanation,
            **facts,
        )


@metrics.register("shift-consistency")
@dataclass(frozen=True)
class ShiftConsistency(_Agreement):
    """Consistency under shifts: mean similarity of the map and of the moved images'
    maps, moved back.

    ``mean_d s(E(x), shift_{-d} E(shift_d(x)))`` for ``pixels`` down, up, right and left
    (``curve``, in this order), on the part that both show; what comes in at the border
    repeats it. Fewer pixels than the network's stride ask for more than its grid holds.

    -1 to 1, higher is steadier.
    """

    pixels: int = option(8, help="how far the image is moved", least=1)
    label: ClassVar[str] = "Consistency under shifts"
    cost: ClassVar[str] = "4 explanations and 5 passes"

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The mean over the four directions."""
        if 2 * self.pixels >= min(view.pixels.shape[-2:]):
            raise NotApplicable(
                code="shift-too-large",
                pixels=self.pixels,
                frame=str(tuple(view.pixels.shape[-2:])),
            )
        steps = [
            (self.pixels, 0),
            (-self.pixels, 0),
            (0, self.pixels),
            (0, -self.pixels),
        ]

        def views() -> Iterator[View]:
            return (shifted(view, *step) for step in steps)

        found = again(model, explanation, views, len(steps), "shifts")
        same = [
            self._overlap(explanation.values, values, *step)
            for values, step in zip(found, steps, strict=True)
        ]
        return self._scored(
            same, view, explanation, changed=changed(model, view, views(), len(steps))
        )

    def _overlap(self, still: Array, moved: Array, down: int, right: int) -> float:
        rows, columns = _shared(still.shape[0], down), _shared(still.shape[1], right)
        return alike(
            still[rows[0], columns[0]], moved[rows[1], columns[1]], self.similarity
        )


def _shared(side: int, step: int) -> tuple[slice, slice]:
    """Where the same content lies before and after a shift."""
    return slice(max(-step, 0), side - max(step, 0)), slice(
        max(step, 0), side - max(-step, 0)
    )
