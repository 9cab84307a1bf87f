"""LIME: a linear surrogate over superpixels that are switched on and off, and how sure
it is of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.perturb.designs import Draw, draws, groups
from consilience.perturb.fidelity import FIDELITY, Asked, ask, asked_facts
from consilience.perturb.fills import Fill, MeanFill
from consilience.perturb.probe import Bits, probe
from consilience.perturb.quickshift import Quickshift
from consilience.perturb.superpixels import Segmenter, segment
from consilience.perturb.surrogate import (
    FIRST_LOOK,
    WRONG,
    Certainty,
    Kernel,
    Scored,
    SurrogateFit,
    SurrogateKind,
    certainty,
    effective,
    falling,
    fit_surrogate,
    forward,
    jaccard,
    kernel,
    least_squares,
    looks,
)
from consilience.registry import explainers, option
from consilience.types import (
    Array,
    ConsilienceError,
    Fidelity,
    Heat,
    Model,
    Target,
    View,
)

AUTO_FORWARD = 6
"""Up to this many features ``auto`` selects forward, above it by weight, as lime does.
"""


@explainers.register("lime")
@dataclass(frozen=True)
class Lime:
    """Local interpretable model-agnostic explanation (Ribeiro, Singh & Guestrin, KDD
    2016, section 3 and equation 1).

    Superpixels are switched on and off at random, the model scores what remains, and a
    ridge regression with weights from an exponential kernel over cosine distance is
    fitted to the scores. As in the package lime, the ``features`` most important
    superpixels are selected and fitted again with ``refit_alpha``. ``values`` paint the
    fit over all; the refit is an extra.

    Every weight comes with its standard error, and every superpixel with the
    probability that it is among the top ``features``; ``until=stable`` draws until
    those are known, or ``samples`` are spent. ``draw`` and ``kernel`` are explained in
    `consilience.perturb.designs` and `consilience.perturb.surrogate`. With ``repeats``
    the fit is to the draws of as many seeds, ``seed`` and those after it, ``samples``
    of each.

    With ``draw="lime"`` the perturbations are those of the first call of
    ``LimeImageExplainer(random_state=seed)`` with a ``random_seed`` given, and weights,
    selection and refit are lime's. lime takes the mean colours in the dtype of its
    image: they are cut to whole numbers on uint8, and equal these only on floats.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "LIME"
    samples: int = option(
        1000,
        help="edited images shown to the model, for each of the repeats; at most, with until=stable",
        least=2,
    )
    segments: Segmenter = option(
        Quickshift(), kind="segmenter", help="how superpixels are cut"
    )
    features: int = option(
        10,
        help="superpixels selected for the refit; a large number keeps all",
        least=1,
    )
    kernel_width: float = option(0.25, help="width of the cosine kernel", above=0)
    alpha: float = option(
        0.01, help="ridge penalty of the fit over all superpixels", least=0
    )
    refit_alpha: float = option(
        1.0, help="ridge penalty of the refit on those selected", least=0
    )
    fill: Fill = option(
        MeanFill(), kind="fill", help="what stands where a superpixel is off"
    )
    draw: Draw = option(
        "antithetic",
        help="fair coins, alone, in complementary pairs or in orthogonal arrays; lime: lime's own",
    )
    selection: Literal["auto", "highest", "forward", "none"] = option(
        "auto",
        help="how features are selected; auto: forward up to 6, else by weight",
    )
    seed: int = option(
        0,
        help="seed of the perturbations; it never reaches the segmentation",
        least=0,
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is explained"
    )
    kernel: Kernel = option(
        "cosine",
        help="weights of the draws: lime's, or all alike",
    )
    surrogate: SurrogateKind = option(
        "ridge",
        help="what is fitted over all superpixels; lasso: the features its path holds last",
    )
    until: Literal["samples", "stable"] = option(
        "samples", help="stop early where the top features are known"
    )
    repeats: int = option(
        1,
        help="runs of as many seeds, fitted together, and how far their top features agree",
        least=1,
    )
    fidelity: Fidelity = option("exact", help=FIDELITY)

    def __post_init__(self) -> None:
        if not self.seed <= 2**32 - self.repeats:
            raise ConsilienceError(
                f"lime: seed lies in [0, 2**32), with its repeats; got {self.seed}"
            )
        if self.until == "stable" and self.draw == "hadamard":
            raise ConsilienceError(
                "lime: until=stable needs draws that tell how sure their weights are; "
                "draw=hadamard does not, draw=antithetic does"
            )
        if self.until == "stable" and self.repeats > 1:
            raise ConsilienceError(
                f"lime: until=stable stops a single run; got repeats={self.repeats}"
            )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The weights painted on the superpixels, (h, w) float32 in units of the score,
        never NaN.

        Extras: ``segments`` (h, w), ``weights`` (S,) of the fit over all, ``refit``
        (S,) with 0 where not selected, ``selected`` (k,) by falling |refit|; ``stderr``
        (S,) of the weights and ``p_top`` (S,), the probability of each to be among the
        top ``features`` by size of weight; as 0-d arrays ``p_set``, that these are the
        very ones, ``intercept``, ``r2`` and ``r2_out`` (each draw, or pair, told from
        the others) of the fit over all, ``r2_refit`` and ``ess``, the effective number
        of samples under the kernel. An r2 is NaN where all scores are the same: there
        was nothing to explain; ``stderr`` and ``p_top`` are NaN where there are too few
        draws to tell. The lasso adds its ``path``.

        Facts: ``verdict``, a code with its facts, and ``stable``, whether the top features are known
        at all but 5 % risk.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "segmentation_seconds"):
            segments = segment(self.segments, view.rgb)
        on, fill = (
            self._draws(int(segments.max()) + 1),
            self.fill.image(view, segments),
        )
        stops = (
            looks(self.samples, on.shape[1]) if self.until == "stable" else (len(on),)
        )
        scores: Array = np.empty(0)
        asked: list[Asked] = []
        for stop in stops:
            with _timed(seconds, "model_seconds"):
                more = on[len(scores) : stop]
                game = partial(_scores, view, segments, more, target, fill)
                asked.append(self._ask(model, game, more, len(asked)))
            scores = np.concatenate([one.scores for one in asked])
            with _timed(seconds, "fit_seconds"):
                whole, told, arrays = fit_surrogate(
                    self.surrogate,
                    self._scored(on, scores),
                    self.alpha,
                    self.features,
                )
                if self.draw == "hadamard":
                    # in one block the product of three columns is a fourth: interactions
                    # look like main effects and leave no residual
                    told = replace(told, influence=None)
                sure = certainty(told, scores, self.features, self.seed)
            if sure.p_set >= 1 - WRONG / len(stops):
                break
        with _timed(seconds, "fit_seconds"):
            extras = {
                "segments": segments,
                **self._extras(on, scores, whole, sure),
                **arrays,
            }
        stable = bool(
            sure.p_set >= 1 - WRONG / len(stops)
            and np.ptp(scores) > 0
            and len(scores) >= FIRST_LOOK  # of fewer the variance itself is not known
        )
        values = torch.from_numpy(extras["weights"][segments]).float()
        facts = self._facts(on, scores, sure, stable)
        return Heat(values, extras, {**facts, **asked_facts(asked), **seconds})

    def _ask(
        self, model: Model, score: Callable[..., Array], on: Array, look: int
    ) -> Asked:
        """Scores of draws, most by a cheaper network where ``fidelity`` says so."""
        number = len(on) // self.repeats
        together = groups(self.draw, number)
        if self.draw == "lime" and look == 0:
            together = together[1:]  # the image itself is there in every draw
        runs = [
            np.where(together < 0, -1, together + place * number)
            for place in range(self.repeats)
        ]
        seed = self.seed + look
        return ask(self.fidelity, model, score, on, np.concatenate(runs), seed)

    def _draws(self, count: int) -> Array:
        """Perturbations (samples * repeats, S) bool, run after run."""
        runs = range(self.seed, self.seed + self.repeats)
        return np.concatenate(
            [draws(self.draw, self.samples, count, seed) for seed in runs]
        )

    def _scored(self, on: Array, scores: Array, run: int | None = None) -> Scored:
        """What is fitted: the draws that have their scores, of all runs or of one."""
        number = min(len(scores), self.samples)
        runs = range(self.repeats) if run is None else (run,)
        drawn = np.concatenate(
            [np.arange(number) + one * self.samples for one in runs]
        )
        together = groups(self.draw, number)
        there = [
            np.where(together < 0, -1, together + place * number)
            for place in range(len(runs))
        ]
        return Scored(
            on[drawn].astype(np.float64),
            scores[drawn],
            kernel(self.kernel, on[drawn], self.kernel_width),
            np.concatenate(there),
        )

    def _extras(
        self, on: Array, scores: Array, whole: SurrogateFit, sure: Certainty
    ) -> dict[str, Array]:
        """The fit over all superpixels, the selection and the refit, and how sure they
        are.
        """
        data = self._scored(on, scores)
        kept = self._select(data, whole.coefficients)
        part = least_squares(data.of(kept), self.refit_alpha)
        refit = np.zeros(on.shape[1])
        refit[kept] = part.coefficients
        numbers = {
            "intercept": whole.intercept,
            "r2": whole.r2,
            "r2_out": whole.r2_out,
            "r2_refit": part.r2,
            "ess": effective(data.weights),
            "p_set": sure.p_set,
        }
        found = {
            "weights": whole.coefficients,
            "refit": refit,
            "selected": kept[falling(part.coefficients)],
        }
        found |= {"stderr": sure.stderr, "p_top": sure.p_top}
        return {
            **found,
            **{name: np.array(float(number)) for name, number in numbers.items()},
        }

    def _select(self, data: Scored, coefficients: Array) -> Array:
        """Indices of the superpixels to refit; lime ranks by a fit of its own alpha
        .01, here by the fit that is shown.
        """
        there = (
            np.count_nonzero(coefficients)
            if self.surrogate == "lasso"
            else len(coefficients)
        )
        count = min(self.features, max(int(there), 1))
        how = self.selection
        if how == "auto":
            how = (
                "forward"
                if self.features <= AUTO_FORWARD and self.surrogate != "lasso"
                else "highest"
            )
        if how == "none":
            return np.arange(len(coefficients))
        if how == "forward":
            return forward(data.on, data.scores, data.weights, count)
        return falling(coefficients)[:count]

    def _facts(
        self, on: Array, scores: Array, sure: Certainty, stable: bool
    ) -> dict[str, Any]:
        samples, count = len(scores), on.shape[1]
        notes = []
        if samples <= count:
            notes.append(
                f"{samples} samples for {count} superpixels: the weights rest on the ridge "
                f"penalty"
            )
        if np.ptp(scores) == 0:
            notes.append(
                "every edited image has the same score: there is nothing to explain"
            )
        facts = {
            "passes": samples,
            "seed": self.seed,
            "superpixels": count,
            "stable": stable,
        }
        facts |= {"verdict": self._verdict(on, scores, sure, stable)}
        if self.repeats > 1:
            facts |= {"jaccard": self._agreement(on, scores, sure.k)}
        return {**facts, "notes": notes} if notes else facts

    def _verdict(
        self, on: Array, scores: Array, sure: Certainty, stable: bool
    ) -> dict[str, Any]:
        """`stability`, or why this design and these options can tell nothing."""
        samples, count = len(scores), on.shape[1]
        if np.ptp(scores) > 0 and self.features >= count:
            return {
                "code": "nothing-left-out",
                "draws": samples,
                "superpixels": count,
            }
        if np.ptp(scores) > 0 and self.draw == "hadamard":
            return {
                "code": "design-cannot-tell",
                "draws": samples,
                "design": self.draw,
            }
        return stability(sure, stable, samples, flat=bool(np.ptp(scores) == 0))

    def _agreement(self, on: Array, scores: Array, k: int) -> float:
        """Mean Jaccard index of the top k of every two runs, each fitted alone."""
        runs = [self._scored(on, scores, run) for run in range(self.repeats)]
        alone = [
            fit_surrogate(self.surrogate, one, self.alpha, self.features)[0]
            for one in runs
        ]
        return jaccard([set(falling(one.coefficients)[:k].tolist()) for one in alone])


def stability(
    sure: Certainty, stable: bool, samples: int, flat: bool = False
) -> dict[str, Any]:
    """Whether the top superpixels are known, as a code with its facts; if not, which
    two may change places.
    """
    facts: dict[str, Any] = {"draws": samples}
    if flat:
        return {"code": "flat", **facts}
    if stable:
        return {"code": "stable", **facts}
    if np.isnan(sure.p_set) or samples < FIRST_LOOK:
        return {"code": "too-few-draws", "superpixels": len(sure.p_top), **facts}
    rivals = [int(one) for one in sure.rivals]
    return {"code": "not-told-apart", "rivals": rivals, "place": sure.k, **facts}


def _scores(
    view: View,
    segments: Array,
    on: Array,
    target: Target,
    fill: Tensor,
    model: Model,
    rows: Array,
) -> Array:
    """What a model says of some rows of ``on``."""
    bits = Bits(segments, on[rows])
    return probe(model, view, bits, target, fill, "lime").numpy().astype(np.float64)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
