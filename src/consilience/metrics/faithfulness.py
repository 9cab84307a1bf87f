"""Faithfulness without a curve: do the map's values foretell what the score loses when
parts of the image go?

Correlations over random sets of pixels, squares and ranks; the order itself; and what
the top of the map is good for alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.metrics.perturbation import (
    EditPlan,
    Probing,
    Ranked,
    ScoreKind,
    first,
    map_of,
    open_ended,
    options_turn,
    pearson,
    ranks,
    read_as,
    removal_stops,
)
from consilience.perturb.fills import Fill, NeutralFill
from consilience.registry import metrics, option
from consilience.types import Array, Explanation, Model, NotApplicable, Score, View

READS = "which number of the class is followed: probability or logit"

# ---- random sets of pixels


@dataclass(frozen=True, eq=False)
class Subsets:
    """Random sets of pixels of a frame, replaced by the fill: ``packed`` (n, bytes) has
    a bit a pixel, an eighth of a byte.
    """

    packed: Array
    frame: tuple[int, int]

    def __len__(self) -> int:
        return len(self.packed)

    def sets(self, size: int) -> Iterator[Array]:
        """Sets (b, h w) of 0 and 1, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield np.unpackbits(
                self.packed[start : start + size],
                axis=1,
                count=self.frame[0] * self.frame[1],
            )

    def sums(self, values: Array) -> Array:
        """Sums (n,) of a map (h, w) over each set."""
        return np.concatenate(
            [
                np.where(some, values.ravel(), 0.0).sum(axis=1)
                for some in self.sets(32)
            ]
        )

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        for some in self.sets(size):
            gone = (
                torch.from_numpy(some)
                .to(image.device)
                .bool()
                .reshape(-1, 1, *self.frame)
            )
            yield torch.where(gone, fill, image)


@lru_cache(maxsize=2)
def drawn(sizes: tuple[int, ...], frame: tuple[int, int], seed: int) -> Subsets:
    """A set of each size (0 leaves the image), equally likely of all, the same for all
    methods; kept, a bit a pixel.
    """
    count = frame[0] * frame[1]
    rows = []
    for number, size in enumerate(sizes):
        keys = np.random.default_rng([seed, number, size]).random(count)
        some = np.zeros(count, dtype=np.uint8)
        if size:
            some[np.argpartition(keys, size - 1)[:size]] = 1
        rows.append(np.packbits(some))
    return Subsets(np.stack(rows), frame)


@metrics.register("faithfulness-correlation")
@dataclass(frozen=True)
class FaithfulnessCorrelation(Probing):
    """Faithfulness correlation (Bhatt, Weller & Moura, IJCAI 2020, definition 2): does
    the map foretell what random sets cost?

    ``corr_S(sum_{i in S} v_i, f(x) - f(x_S))`` over ``subsets`` random sets S of the
    share ``share`` of the pixels, x_S the image with S replaced by the fill. A pixel
    goes with all its channels. Not applicable where the map or the score does not vary
    over the sets. Known failure: a scattered set of pixels takes about the same from
    every object, so that the score moves for other reasons than the map's; and
    correlation asks for values that add up, which a CAM never promised.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Faithfulness correlation"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    cost: ClassVar[str] = "subsets + 1 passes"
    subsets: int = option(100, help="random sets of pixels", least=3)
    share: float = option(
        0.05,
        help="share of the pixels in a set, above 0 and below 1",
        above=0,
        most=1,
    )
    fill: Fill = option(NeutralFill(), kind="fill", help="what a pixel becomes")
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(0, help="seed of the sets, the same for all methods", least=0)

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        size = max(1, round(self.share * values.size))
        keeps = drawn((0,) + (size,) * self.subsets, _frame(values), self.seed)
        sums = keeps.sums(values)[1:]

        def finish(scores: Array) -> Score:
            return Score(
                pearson(sums, scores[0] - scores[1:]),
                facts={"passes": len(scores), "seed": self.seed},
            )

        return EditPlan(
            keeps,
            self.fill.image(view, None),
            read_as(explanation.target, self.reads),
            finish,
        )


@metrics.register("sensitivity-n")
@dataclass(frozen=True)
class SensitivityN(Probing):
    """Sensitivity-n (Ancona et al., ICLR 2018, definition 1 and section 4): correlation
    with the loss by sets of n pixels.

    ``corr_S(sum_{i in S} v_i, f(x) - f(x_S))`` over random sets of n pixels, for
    ``sizes`` values of n evenly spaced on a logarithmic scale from ``low`` to ``high``
    (shares of the image); the value is the mean over n, the curve (2, sizes) has the
    shares and each n's correlation, nan where the score or the map does not vary over
    the sets. The paper goes from a single pixel to .8 of the image, with 100 sets each.

    Quantus correlates over the images of a batch, with nested sets in the order of the
    map: another quantity. Known failures as of faithfulness correlation; small n are
    lost in rounding.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Sensitivity-n"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    cost: ClassVar[str] = "sizes x subsets + 1 passes"
    sizes: int = option(6, help="values of n", least=1)
    subsets: int = option(50, help="random sets of each size", least=3)
    low: float = option(
        0.01, help="smallest n as a share of the pixels", above=0, most=1
    )
    high: float = option(
        0.8, help="largest n as a share of the pixels", above=0, most=1
    )
    fill: Fill = option(NeutralFill(), kind="fill", help="what a pixel becomes")
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(0, help="seed of the sets, the same for all methods", least=0)

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        counts = (
            np.rint(np.geomspace(self.low, self.high, self.sizes) * values.size)
            .astype(int)
            .clip(1)
        )
        keeps = drawn(
            (0, *np.repeat(counts, self.subsets).tolist()), _frame(values), self.seed
        )
        sums = keeps.sums(values)[1:].reshape(len(counts), -1)

        def finish(scores: Array) -> Score:
            losses = (scores[0] - scores[1:]).reshape(sums.shape)
            return self._finish(
                counts / values.size,
                [_or_nan(*pair) for pair in zip(sums, losses, strict=True)],
                len(scores),
            )

        return EditPlan(
            keeps,
            self.fill.image(view, None),
            read_as(explanation.target, self.reads),
            finish,
        )

    def _finish(self, shares: Array, found: list[float], passes: int) -> Score:
        if np.isnan(found).all():
            raise NotApplicable(code="nothing-varies")
        return Score(
            float(np.nanmean(found)),
            np.stack([shares, found]),
            {"passes": passes, "seed": self.seed},
        )


def _or_nan(a: Array, b: Array) -> float:
    try:
        return pearson(a, b)
    except NotApplicable:
        return float("nan")


def _frame(values: Array) -> tuple[int, int]:
    return values.shape[0], values.shape[1]


# ---- infidelity


@dataclass(frozen=True, eq=False)
class Squares:
    """Squares of ``side`` pixels at ``corners`` (n, 2), top and left, replaced by the
    fill.
    """

    corners: Array
    side: int

    def __len__(self) -> int:
        return len(self.corners)

    @staticmethod
    def draw(count: int, side: int, frame: tuple[int, int], seed: int) -> Squares:
        """Squares that lie whole in the frame, all places equally likely; the same for
        all methods.
        """
        free = [length - side + 1 for length in frame]
        return Squares(
            np.random.default_rng([seed, *frame]).integers(0, free, (count, 2)), side
        )

    def sums(self, values: Array) -> Array:
        """Sums (n,) of a map (h, w) over each square."""
        total = np.pad(values, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
        top, left = self.corners.T
        low, right = top + self.side, left + self.side
        sums: Array = (
            total[low, right]
            - total[top, right]
            - total[low, left]
            + total[top, left]
        )
        return sums

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        for start in range(0, len(self), size):
            part = self.corners[start : start + size]
            images = image.repeat(len(part), 1, 1, 1)
            for base_image, (top, left) in zip(images, part.tolist(), strict=True):
                place = (
                    slice(None),
                    slice(top, top + self.side),
                    slice(left, left + self.side),
                )
                base_image[place] = fill[0][place]
            yield images


@dataclass(frozen=True, eq=False)
class _AfterImage:
    """The image itself, then what another `Keeps` makes of it."""

    rest: Squares

    def __len__(self) -> int:
        return 1 + len(self.rest)

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        yield image
        yield from self.rest.chunks(image, fill, size)


@metrics.register("infidelity")
@dataclass(frozen=True)
class Infidelity(Probing):
    """Infidelity (Yeh et al., NeurIPS 2019, definition 2.1): the squared error of the
    map's forecast of what squares cost.

    ``E_I (b I.v - (f(x) - f(x - I)))^2`` over squares at random places that are
    replaced by the fill (the paper's square removal). With ``values=contribution`` I is
    1 on the square: the map's sum over it is the forecast (LIME, Shapley values,
    gradient times input, occlusion). With ``values=gradient`` I is the change of the
    pixels, summed over channels. Maps of different methods have no common unit, so by
    default b is the factor that makes the error least (the paper's optimal scaling,
    section 4); ``scaled=false`` takes b = 1, the definition itself. Units of the score,
    squared: at best 0.

    Known failure: a model whose score hardly moves makes every map good; beside the
    mean square of the losses (``facts["nothing"]``, the infidelity of a map of zeros)
    the number can be judged.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Infidelity"
    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, np.inf)
    cost: ClassVar[str] = "squares + 1 passes"
    squares: int = option(200, help="squares at random places", least=2)
    size: float = option(
        0.25,
        help="side of a square as a share of the frame's shorter side, above 0 and up to 1",
        above=0,
        most=1,
    )
    values: Literal["contribution", "gradient"] = option(
        "contribution", help="what the map's values are said to be"
    )
    scaled: bool = option(True, help="scale the map so that its error is least")
    fill: Fill = option(NeutralFill(), kind="fill", help="what a square becomes")
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(
        0, help="seed of the places, the same for all methods", least=0
    )

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        fill = self.fill.image(view, None)
        if self.values == "gradient":
            values = (
                values * (view.pixels - fill)[0].sum(dim=0).double().cpu().numpy()
            )
        keeps = Squares.draw(
            self.squares,
            max(1, round(self.size * min(values.shape))),
            _frame(values),
            self.seed,
        )
        forecast = keeps.sums(values)
        target = read_as(explanation.target, self.reads)
        return EditPlan(
            _AfterImage(keeps),
            fill,
            target,
            lambda scores: self._finish(forecast, scores[0] - scores[1:]),
        )

    def _finish(self, forecast: Array, losses: Array) -> Score:
        factor = _least_squares(forecast, losses) if self.scaled else 1.0
        value = float(np.mean((factor * forecast - losses) ** 2))
        return Score(
            value,
            facts={
                "factor": factor,
                "nothing": float(np.mean(losses**2)),
                "passes": len(losses) + 1,
            },
        )


def _least_squares(forecast: Array, losses: Array) -> float:
    power = float(forecast @ forecast)
    return float(forecast @ losses) / power if power > 0 else 0.0


# ---- by rank


@metrics.register("faithfulness-estimate")
@dataclass(frozen=True)
class FaithfulnessEstimate(Probing):
    """Faithfulness estimate (Alvarez-Melis & Jaakkola, NeurIPS 2018, section 4): does a
    pixel's value foretell its own loss?

    ``corr_k(mean_{i in P_k} v_i, f(x) - f(x_{P_k}))``, P_k the k-th of ``groups``
    groups of pixels of neighbouring rank, each replaced by the fill alone; groups are
    of equal size up to one pixel, so that means stand for sums. The paper takes
    features one by one; single pixels of a photograph change nothing. Pixels of equal
    value come in a random order, the same for all methods. Not applicable where the map
    or the score does not vary.

    Known failure: groups by rank differ from map to map, so that two maps are asked
    different questions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Faithfulness estimate"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    cost: ClassVar[str] = "groups + 1 passes"
    groups: int = option(100, help="groups of pixels of equal size, by rank", least=3)
    fill: Fill = option(NeutralFill(), kind="fill", help="what a pixel becomes")
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(
        0, help="seed of the order among pixels of equal value", least=0
    )

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them: first the image itself, then a group at a
        time.
        """
        values = map_of(view, explanation)
        rank, edges = (
            ranks(values, self.seed),
            removal_stops(values.size, self.groups),
        )
        ordered = np.empty(values.size)
        ordered[rank.ravel()] = values.ravel()
        means = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
        keeps = Ranked(rank, np.concatenate([[0], edges[:-1]]), edges)

        def finish(scores: Array) -> Score:
            losses = scores[0] - scores[1:]
            return Score(
                pearson(means, losses),
                np.stack([means, losses]),
                {"passes": len(scores)},
            )

        return EditPlan(
            keeps,
            self.fill.image(view, None),
            read_as(explanation.target, self.reads),
            finish,
        )


@metrics.register("monotonicity")
@dataclass(frozen=True)
class Monotonicity(Probing):
    """Monotonicity (Arya et al., AI Explainability 360, 2019, section 5): does every
    pixel brought back raise the score?

    On the fill, pixels are brought back from the least relevant to the most in
    ``steps`` equal steps; the value is the share of steps at which the score does not
    fall by more than ``slack``. ``strict=true`` is the paper's own: 1 if there is no
    fall at all, else 0. Pixels of equal value come in a random order, the same for all
    methods. The curve is (2, steps + 1): the share shown, the score.

    Quantus replaces fill by fill, so that nothing is ever brought back and every map
    gets 1. Known failure: a score that stays at 0 until the last pixel does not fall
    either, so that maps of noise do well.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Monotonicity"
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    cost: ClassVar[str] = "steps + 1 passes"
    binary: ClassVar[bool] = False
    steps: int = option(
        50, help="steps of equal size from the fill to the image", least=1
    )
    strict: bool = option(False, help="1 where the score never falls, else 0")
    slack: float = option(
        1e-6, help="a fall by no more than this is none: it may be rounding", least=0
    )
    fill: Fill = option(
        NeutralFill(), kind="fill", help="what the image is brought back on"
    )
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(
        0, help="seed of the order among pixels of equal value", least=0
    )

    def __post_init__(self) -> None:
        options_turn(self, binary=self.strict)

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them."""
        values = map_of(view, explanation)
        stop = removal_stops(values.size, self.steps)
        keeps = first(ranks(-values, self.seed), stop, reveal=True)
        target = read_as(explanation.target, self.reads)
        return EditPlan(
            keeps,
            self.fill.image(view, None),
            target,
            lambda found: self._finish(stop / values.size, found),
        )

    def _finish(self, shares: Array, scores: Array) -> Score:
        rises = np.diff(scores) >= -self.slack
        value = float(rises.all()) if self.strict else float(rises.mean())
        return Score(value, np.stack([shares, scores]), {"passes": len(scores)})


# ---- the top alone


@dataclass(frozen=True)
class _Top(Probing):
    """What sufficiency and comprehensiveness share: the mean loss over shares of the
    most relevant pixels.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    cost: ClassVar[str] = "shares + 1 passes"
    alone: ClassVar[bool] = False
    shares: tuple[float, ...] = option(
        (0.01, 0.05, 0.1, 0.2, 0.5),
        help="shares of the pixels taken as the rationale",
        above=0,
        most=1,
    )
    fill: Fill = option(NeutralFill(), kind="fill", help="what the rest becomes")
    reads: ScoreKind = option("probability", help=READS)
    seed: int = option(
        0, help="seed of the order among pixels of equal value", least=0
    )

    def __post_init__(self) -> None:
        open_ended(self, self.reads == "logit")

    def plan(self, model: Model, view: View, explanation: Explanation) -> EditPlan:
        """Edits and what is made of them: first the image itself, then a share at a
        time.
        """
        values = map_of(view, explanation)
        count = np.rint(np.array(self.shares) * values.size).astype(np.int64)
        stop = np.concatenate([[values.size if self.alone else 0], count])
        keeps = first(ranks(values, self.seed), stop, reveal=self.alone)
        target = read_as(explanation.target, self.reads)
        return EditPlan(keeps, self.fill.image(view, None), target, self._finish)

    def _finish(self, scores: Array) -> Score:
        losses = scores[0] - scores[1:]
        return Score(
            float(losses.mean()),
            np.stack([self.shares, losses]),
            {"full": float(scores[0]), "passes": len(scores)},
        )


@metrics.register("comprehensiveness")
@dataclass(frozen=True)
class Comprehensiveness(_Top):
    """Comprehensiveness (DeYoung et al., ERASER, ACL 2020, equation 1): what is lost
    without the map's most relevant pixels.

    ``mean_k (f(x) - f(x without r_k))``, r_k the share k of the pixels that the map
    ranks first; the shares are the paper's (its AOPC, section 4). A high value says
    that nothing else would have done. The curve is (2, shares): the share, the loss.
    Known failures as of deletion.
    """

    label: ClassVar[str] = "Comprehensiveness"
    higher_is_better: ClassVar[bool] = True


@metrics.register("sufficiency")
@dataclass(frozen=True)
class Sufficiency(_Top):
    """Sufficiency (DeYoung et al., ERASER, ACL 2020, equation 2): what is lost where
    only the most relevant pixels are left.

    ``mean_k (f(x) - f(r_k))``, r_k the share k of the pixels that the map ranks first,
    on the fill; the shares are the paper's (its AOPC, section 4). A low value, at times
    below 0, says that the rationale does alone. The curve is (2, shares): the share,
    the loss. Quantus has another quantity under this name (Dasgupta et al. 2022). Known
    failures as of insertion.
    """

    label: ClassVar[str] = "Sufficiency"
    higher_is_better: ClassVar[bool] = False
    alone: ClassVar[bool] = True
