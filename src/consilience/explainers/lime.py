"""LIME: a linear surrogate over superpixels that are switched on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from consilience import images
from consilience.probe import Bits, Fill, Mean, probe
from consilience.registry import explainers, option
from consilience.segment import Quickshift, Segmenter, segment
from consilience.types import Array, ConsilienceError, Heat, Model, Target, View

AUTO_FORWARD = 6
"""Up to this many features ``auto`` selects forward, above it by weight, as lime does."""


@explainers.register("lime")
@dataclass(frozen=True)
class Lime:
    """Local interpretable model-agnostic explanation (Ribeiro, Singh & Guestrin, KDD 2016, section 3 and equation 1).

    Superpixels are switched on and off at random, the model scores what remains, and a ridge regression with weights from an
    exponential kernel over cosine distance is fitted to the scores. As in the package lime, the ``features`` most important
    superpixels are selected and fitted again with ``refit_alpha``. ``values`` paint the fit over all; the refit is an extra.

    With ``draw="lime"`` the perturbations are those of the first call of ``LimeImageExplainer(random_state=seed)`` with a
    ``random_seed`` given, and weights, selection and refit are lime's. lime takes the mean colours in the dtype of its picture:
    they are cut to whole numbers on uint8, and equal these only on floats.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "LIME"
    samples: int = option(1000, help="edited pictures shown to the model; the first is the picture itself")
    segments: Segmenter = option(Quickshift(), kind="segmenter", help="how superpixels are cut")  # noqa: RUF009
    features: int = option(10, help="superpixels selected for the refit; a large number keeps all")
    kernel_width: float = option(0.25, help="width of the kernel over cosine distance")
    alpha: float = option(0.01, help="ridge penalty of the fit over all superpixels")
    refit_alpha: float = option(1.0, help="ridge penalty of the refit on those selected")
    fill: Fill = option(Mean(), kind="fill", help="what stands where a superpixel is off")  # noqa: RUF009
    draw: Literal["independent", "lime"] = option("independent", help="fair coins from numpy's Generator, or lime's own draws")
    selection: Literal["auto", "highest", "forward", "none"] = option(
        "auto", help="how features are selected; auto: forward up to 6, else by weight"
    )
    seed: int = option(0, help="seed of the perturbations; it never reaches the segmentation")
    score: Literal["logit", "probability"] = option("probability", help="which number of the class is explained")

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConsilienceError(f"lime: samples must be at least 2; got {self.samples}")
        if self.features < 1:
            raise ConsilienceError(f"lime: features must be at least 1; got {self.features}")
        if not 0 < self.kernel_width < np.inf:
            raise ConsilienceError(f"lime: kernel_width must be positive; got {self.kernel_width:g}")
        for name, alpha in (("alpha", self.alpha), ("refit_alpha", self.refit_alpha)):
            if not 0 <= alpha < np.inf:
                raise ConsilienceError(f"lime: {name} must not be negative; got {alpha:g}")
        if not 0 <= self.seed < 2**32:
            raise ConsilienceError(f"lime: seed lies in [0, 2**32); got {self.seed}")

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The weights painted on the superpixels, (h, w) float32 in units of the score, never NaN.

        Extras: ``segments`` (h, w), ``weights`` (S,) of the fit over all, ``refit`` (S,) with 0 where not selected,
        ``selected`` (k,) by falling |refit|, and as 0-d arrays ``intercept`` and ``r2`` of the fit over all, ``r2_refit`` and
        ``ess``, the effective number of samples under the kernel. An r2 is NaN where all scores are the same: there was
        nothing to explain.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "segmentation_seconds"):
            segments = segment(self.segments, images.to_array(view.pixels))
        on = draws(self.draw, self.samples, int(segments.max()) + 1, self.seed)
        with _timed(seconds, "model_seconds"):
            scores = probe(model, view, Bits(segments, on), target, self.fill.image(view, segments), "lime").numpy()
        with _timed(seconds, "fit_seconds"):
            extras = {"segments": segments, **self._surrogate(on, scores.astype(np.float64))}
        values = torch.from_numpy(extras["weights"][segments]).float()
        return Heat(values, extras, {**self._facts(on, scores), **seconds})

    def _surrogate(self, on: Array, scores: Array) -> dict[str, Array]:
        """The fit over all superpixels, the selection and the refit."""
        data, weights = on.astype(np.float64), kernel(on, self.kernel_width)
        whole = _ridge(data, scores, weights, self.alpha)
        kept = self._select(data, scores, weights, whole.coef_)
        part = _ridge(data[:, kept], scores, weights, self.refit_alpha)
        refit = np.zeros(on.shape[1])
        refit[kept] = part.coef_
        numbers = {
            "intercept": whole.intercept_,
            "r2": _r2(whole, data, scores, weights),
            "r2_refit": _r2(part, data[:, kept], scores, weights),
            "ess": effective(weights),
        }
        found = {"weights": whole.coef_, "refit": refit, "selected": kept[_falling(part.coef_)]}
        return {**found, **{name: np.array(float(number)) for name, number in numbers.items()}}

    def _select(self, data: Array, scores: Array, weights: Array, coefficients: Array) -> Array:
        """Indices of the superpixels to refit; lime ranks by a fit of its own alpha .01, here by the fit that is shown."""
        count = min(self.features, data.shape[1])
        how = self.selection
        if how == "auto":
            how = "forward" if self.features <= AUTO_FORWARD else "highest"
        if how == "none":
            return np.arange(data.shape[1])
        if how == "forward":
            return forward(data, scores, weights, count)
        return _falling(coefficients)[:count]

    def _facts(self, on: Array, scores: Array) -> dict[str, Any]:
        samples, count = on.shape
        notes = []
        if samples <= count:
            notes.append(f"{samples} samples for {count} superpixels: the weights rest on the ridge penalty")
        if np.ptp(scores) == 0:
            notes.append("every edited picture has the same score: there is nothing to explain")
        facts: dict[str, Any] = {"passes": samples, "seed": self.seed, "superpixels": count}
        return {**facts, "notes": notes} if notes else facts


def draws(how: Literal["independent", "lime"], samples: int, count: int, seed: int) -> Array:
    """Perturbations (samples, count) bool, each superpixel on with probability 1/2; the first row keeps all.

    ``independent``: a longer draw begins with the shorter one of the same seed. ``lime``: the numbers lime draws.
    """
    if how == "lime":
        legacy = np.random.RandomState(seed)
        on = legacy.randint(0, 2, samples * count).reshape(samples, count).astype(bool)
    else:
        on = np.random.default_rng(seed).integers(0, 2, size=(samples, count), dtype=np.bool_)
    on[0] = True
    return on


def kernel(on: Array, width: float) -> Array:
    """Weights (n,) of perturbations (n, S): ``sqrt(exp(-d**2 / width**2))`` of the cosine distance to all on.

    For bits that distance is ``1 - sqrt(share on)``; it is 1 with nothing on, as scikit-learn has it.
    """
    distance = 1 - np.sqrt(on.mean(axis=1))
    weights: Array = np.sqrt(np.exp(-(distance**2) / width**2))
    return weights


def effective(weights: Array) -> float:
    """Kish's effective sample size, ``(sum w)**2 / sum w**2``."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def forward(data: Array, scores: Array, weights: Array, count: int) -> Array:
    """``count`` columns, each the one that raises the weighted R^2 of a least-squares fit most; the first of equals.

    What lime finds by fitting every candidate anew: the gain of a column, once those chosen are swept out of it, is its
    squared covariance with the scores over its variance.
    """
    root = np.sqrt(weights)[:, None]
    columns = (data - np.average(data, axis=0, weights=weights)) * root
    centred = (scores - np.average(scores, weights=weights)) * root[:, 0]
    floor = 1e-12 * np.maximum((columns**2).sum(axis=0), np.finfo(float).tiny)
    chosen: list[int] = []
    for _ in range(count):
        variance = (columns**2).sum(axis=0)
        gain = np.where(variance > floor, (columns.T @ centred) ** 2 / np.maximum(variance, floor), 0.0)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        if variance[best] > floor[best]:
            axis = columns[:, best] / np.sqrt(variance[best])
            columns = columns - np.outer(axis, axis @ columns)
    return np.array(chosen)


def _ridge(data: Array, scores: Array, weights: Array, alpha: float) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=alpha).fit(data, scores, sample_weight=weights)


def _r2(fitted: Any, data: Array, scores: Array, weights: Array) -> float:
    if np.ptp(scores[weights > 0]) == 0:
        return float("nan")
    return float(fitted.score(data, scores, sample_weight=weights))


def _falling(values: Array) -> Array:
    """Indices by falling magnitude; equals keep their order."""
    return np.argsort(-np.abs(values), kind="stable")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[name] = perf_counter() - start
