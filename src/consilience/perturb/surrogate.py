"""Surrogates: a linear model of what a model says of edited images, and how sure each
of its weights is.

Fits are weighted least squares, plain or with a penalty, in closed form; the lasso's
path and the penalty of Bayesian ridge are scikit-learn's. Weights are told with the
sandwich that deletion gives: what each draw, or pair of draws, did to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import linalg

from consilience.types import Array, ConsilienceError

Kernel = Literal["cosine", "uniform"]
SurrogateKind = Literal["ridge", "wls", "lasso", "bayesian-ridge"]

WRONG = 0.05
"""How often ``stable`` may be said of the wrong superpixels, all looks of a run
together.
"""
SURE = 0.95
"""From this probability of being among the top on a superpixel is called sure."""
FIRST_LOOK, PER_SUPERPIXEL = 128, 4
"""The weights are not looked at before as many draws, nor before as many for each
superpixel: no variance is known then.
"""
TOLD = 2
"""Of fewer draws for each superpixel no variance is told: the penalty speaks for what
they do not say.
"""
IMAGED = 4096
"""Draws from the distribution of the weights."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Edited images and what was said of them: what a surrogate is fitted to.

    ``on`` (n, S) float64 0 or 1, ``scores`` (n,), kernel ``weights`` (n,), ``groups``
    (G, 1 or 2) rows drawn together, -1 for none.
    """

    on: Array
    scores: Array
    weights: Array
    groups: Array

    def of(self, kept: Array) -> Scored:
        """The same with the superpixels ``kept`` alone."""
        return Scored(self.on[:, kept], self.scores, self.weights, self.groups)

    def regression(self) -> tuple[Array, Array, float]:
        """(design, response, share of the constant): rows times the root of their
        weight, the constant swept out.
        """
        root = np.sqrt(self.weights)
        design = self.on - np.average(self.on, axis=0, weights=self.weights)
        response = self.scores - np.average(self.scores, weights=self.weights)
        return design * root[:, None], response * root, 1 / float(self.weights.sum())

    def solution(self, rest: Array) -> tuple[Array, float]:
        """(coefficients, intercept) from what was fitted to `regression`."""
        means = np.average(self.on, axis=0, weights=self.weights)
        return rest, float(
            np.average(self.scores, weights=self.weights) - means @ rest
        )


@dataclass(frozen=True, eq=False)
class SurrogateFit:
    """A linear surrogate.

    ``coefficients`` (S,), ``intercept``, weighted ``r2``; ``r2_out`` where each draw
    (pair) is told from the others; ``influence`` (G, S), what each draw (pair) did to
    the coefficients. NaN and None where no spread, or no rest, is left.
    """

    coefficients: Array
    intercept: float
    r2: float
    r2_out: float
    influence: Array | None

    @property
    def covariance(self) -> Array:
        """(S, S) of the coefficients: HC3, clustered by what was drawn together; NaN
        where it cannot be known.
        """
        if self.influence is None:
            return np.full((len(self.coefficients),) * 2, np.nan)
        cross: Array = self.influence.T @ self.influence
        return cross


# ---- kernels


def kernel(how: Kernel, on: Array, width: float) -> Array:
    """Weights (n,) of perturbations (n, S).

    ``cosine``: lime's, see `cosine`. ``uniform``: every draw counts alike (as in the
    sampling of GLIME, Tan et al., NeurIPS 2023).
    """
    weights = cosine(on, width) if how == "cosine" else np.ones(len(on))
    if weights.sum() == 0:
        raise ConsilienceError(
            f"lime: kernel_width {width:g} is so narrow that no edited image has any weight"
        )
    return weights


def cosine(on: Array, width: float) -> Array:
    """Weights (n,): ``sqrt(exp(-d**2 / width**2))`` of the cosine distance to all on.

    For bits that distance is ``1 - sqrt(share on)``; it is 1 with nothing on, as
    scikit-learn has it.
    """
    distance = 1 - np.sqrt(on.mean(axis=1))
    weights: Array = np.sqrt(np.exp(-(distance**2) / width**2))
    return weights


def effective(weights: Array) -> float:
    """Kish's effective sample size, ``(sum w)**2 / sum w**2``."""
    return float(weights.sum() ** 2 / (weights**2).sum())


# ---- fits


def fit_surrogate(
    kind: SurrogateKind, data: Scored, alpha: float, features: int
) -> tuple[SurrogateFit, SurrogateFit, dict[str, Array]]:
    """(the surrogate, what its uncertainty is told from, arrays of its own).

    ``ridge`` has penalty ``alpha``, ``wls`` none; ``bayesian-ridge`` the one of the
    largest evidence. ``lasso`` is the densest point of its path with at most
    ``features`` superpixels; it has no variance in closed form, so that of the least
    squares behind it, which is the lasso without its shrinkage, is told.
    """
    if kind == "lasso":
        whole = least_squares(data, 0.0)
        coefficients, arrays = lasso(data, features)
        return _with_coefficients(data, coefficients, whole.r2_out), whole, arrays
    penalty = (
        {"ridge": alpha, "wls": 0.0}[kind]
        if kind != "bayesian-ridge"
        else evidence(data)
    )
    whole = least_squares(data, penalty)
    return (
        whole,
        whole,
        {"penalty": np.array(penalty)} if kind == "bayesian-ridge" else {},
    )


def least_squares(data: Scored, penalty: float) -> SurrogateFit:
    """Weighted least squares with a ridge ``penalty`` on all but the intercept; of
    equals without one, the shortest.

    Leaving out row i (pair i) changes the coefficients by B x_i (1 - h_i)^-1 e_i with B
    the inverse of the penalised moments, h its (2 x 2) part of the hat matrix: no refit
    is needed, and none is approximated.
    """
    design, response, share = data.regression()
    told = len(design) >= TOLD * (design.shape[1] + 1)
    moved = _moved(design, penalty)
    rest = moved.T @ response
    coefficients, intercept = data.solution(rest)
    residuals = response - design @ rest
    deleted = _deleted(data, design, moved, share, residuals)
    influence = None
    if deleted is not None and told:
        influence = np.einsum("gr,grs->gs", deleted, _padded(moved)[data.groups])
    return SurrogateFit(
        coefficients,
        intercept,
        _r2(data, residuals),
        _r2_out(data, deleted),
        influence,
    )


def lasso(data: Scored, features: int) -> tuple[Array, dict[str, Array]]:
    """Coefficients (S,) where the lasso's path last has at most ``features`` of them;
    ``path`` (steps, S) and its penalties.

    ``path_alpha`` (steps,) are penalties as scikit-learn's `Lasso` has them, with
    weights that sum to n.
    """
    from sklearn.linear_model import lars_path

    design, response, _ = data.regression()
    scale = np.sqrt(len(response) / data.weights.sum())
    penalties, _, path = lars_path(design * scale, response * scale, method="lasso")
    sparse = np.flatnonzero(np.count_nonzero(path, axis=0) <= features)
    return path[:, sparse[-1]], {"path": path.T, "path_alpha": penalties}


def evidence(data: Scored) -> float:
    """The ridge penalty of the largest evidence (MacKay 1992, as scikit-learn's
    `BayesianRidge` iterates it).
    """
    from sklearn.linear_model import BayesianRidge

    if np.ptp(data.scores) == 0:
        return 0.0
    found = BayesianRidge().fit(data.on, data.scores, sample_weight=data.weights)
    return float(found.lambda_ / found.alpha_)


def forward(data: Array, scores: Array, weights: Array, count: int) -> Array:
    """``count`` columns, each the one that raises the weighted R^2 of a least-squares
    fit most; the first of equals.

    What lime finds by fitting every candidate anew: the gain of a column, once those
    chosen are swept out of it, is its squared covariance with the scores over its
    variance.
    """
    root = np.sqrt(weights)[:, None]
    columns = (data - np.average(data, axis=0, weights=weights)) * root
    centred = (scores - np.average(scores, weights=weights)) * root[:, 0]
    floor = 1e-12 * np.maximum((columns**2).sum(axis=0), np.finfo(float).tiny)
    chosen: list[int] = []
    for _ in range(count):
        variance = (columns**2).sum(axis=0)
        gain = np.where(
            variance > floor,
            (columns.T @ centred) ** 2 / np.maximum(variance, floor),
            0.0,
        )
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        if variance[best] > floor[best]:
            axis = columns[:, best] / np.sqrt(variance[best])
            columns = columns - np.outer(axis, axis @ columns)
    return np.array(chosen)


def falling(values: Array) -> Array:
    """Indices by falling magnitude; equals keep their order."""
    return np.argsort(-np.abs(values), kind="stable")


def _moved(design: Array, penalty: float) -> Array:
    """(n, S): what each row, times its residual, does to the coefficients, ``X (X'X +
    penalty)^-1``; directions the draws never took are left at zero.

    Of fewer rows than columns it is ``(XX' + penalty)^-1 X``, the same (Hoerl & Kennard
    1970): the smaller of the two matrices is inverted, by Cholesky where there is a
    penalty.
    """
    rows, columns = design.shape
    wide = rows < columns
    moments = design @ design.T if wide else design.T @ design
    if penalty > 0 and len(moments) >= LARGE:
        moments[np.diag_indices_from(moments)] += penalty
        try:
            factor = linalg.cho_factor(moments, lower=True, overwrite_a=True)
            solved = linalg.cho_solve(factor, design if wide else design.T)
            return np.asarray(solved if wide else solved.T)
        except linalg.LinAlgError:  # a penalty that rounding swallows
            moments = design @ design.T if wide else design.T @ design
    inverse = _inverse(moments, penalty, max(rows, columns))
    return inverse @ design if wide else design @ inverse


LARGE = 256
"""From so many on the eigenvectors of a matrix are not asked for where they are not
needed."""


def _inverse(moments: Array, penalty: float, rows: int) -> Array:
    """Inverse of ``moments + penalty``; directions the draws never took are left at
    zero.

    Moments are sums over ``rows``, and so is their rounding: what a direction of none
    has must not pass for a value.
    """
    values, vectors = np.linalg.eigh(moments)
    there = values > max(rows, len(values)) * np.finfo(float).eps * max(
        values[-1], 0.0
    )
    inverse: Array = (
        vectors * np.where(there, 1 / np.where(there, values + penalty, 1), 0)
    ) @ vectors.T
    return inverse


def _padded(rows: Array) -> Array:
    """The rows and one of zeros, which index -1 finds."""
    return np.concatenate([rows, np.zeros_like(rows[:1])])


def _deleted(
    data: Scored, design: Array, moved: Array, share: float, residuals: Array
) -> Array | None:
    """Residuals (G, 1 or 2), weighted by the root, of a fit to the other groups; None
    where a group has no others.
    """
    rows, root = (
        _padded(design)[data.groups],
        _padded(np.sqrt(data.weights))[data.groups],
    )
    hat = (
        _padded(moved)[data.groups] @ rows.transpose(0, 2, 1)
        + share * root[:, :, None] * root[:, None, :]
    )
    left = np.eye(hat.shape[1]) - hat
    if np.linalg.eigvalsh(left).min() < 1e-9:
        return None
    solved: Array = np.linalg.solve(left, _padded(residuals)[data.groups][..., None])[
        ..., 0
    ]
    return solved


def _with_coefficients(
    data: Scored, coefficients: Array, r2_out: float
) -> SurrogateFit:
    design, response, _ = data.regression()
    found, intercept = data.solution(coefficients)
    return SurrogateFit(
        found, intercept, _r2(data, response - design @ coefficients), r2_out, None
    )


def _r2(data: Scored, residuals: Array) -> float:
    """1 - what is left of the weighted spread of the scores; NaN where there was none."""
    if np.ptp(data.scores[data.weights > 0]) == 0:
        return float("nan")
    spread = (
        data.weights
        @ (data.scores - np.average(data.scores, weights=data.weights)) ** 2
    )
    return float(1 - residuals @ residuals / spread)


def _r2_out(data: Scored, deleted: Array | None) -> float:
    """1 - squared error of each group told from the others, over that of the others'
    mean; NaN where nothing varies.
    """
    if deleted is None or np.ptp(data.scores[data.weights > 0]) == 0:
        return float("nan")
    centred = (data.scores - np.average(data.scores, weights=data.weights)) * np.sqrt(
        data.weights
    )
    nothing = np.zeros((len(centred), 0))
    means = _deleted(data, nothing, nothing, 1 / float(data.weights.sum()), centred)
    return (
        float("nan")
        if means is None
        else float(1 - (deleted**2).sum() / (means**2).sum())
    )


# ---- how sure it is


@dataclass(frozen=True, eq=False)
class Certainty:
    """How well the draws tell which ``k`` superpixels have the largest weights.

    ``stderr`` (S,) of the weights, ``p_top`` (S,) probability of each to be among the k
    largest in size, ``p_set`` probability that the k largest are exactly the k there
    should be. NaN where the draws are too few to tell.
    """

    k: int
    stderr: Array
    p_top: Array
    p_set: float

    @property
    def rivals(self) -> tuple[int, int]:
        """The least sure of the k most probable superpixels and the most probable of
        the rest.
        """
        order = np.argsort(-self.p_top, kind="stable")
        return int(order[self.k - 1]), int(order[self.k])


def settled(p_top: Array) -> tuple[Array, Array]:
    """(those of them that are sure, the k most probable): superpixels by their
    ``p_top``; empty where it is NaN.
    """
    if np.isnan(p_top).any():
        return np.empty(0, dtype=int), np.empty(0, dtype=int)
    k = round(float(p_top.sum()))
    top = np.sort(np.argsort(-p_top, kind="stable")[:k])
    return top[p_top[top] >= SURE], top


def certainty(told: SurrogateFit, scores: Array, k: int, seed: int) -> Certainty:
    """From the normal distribution of the weights, with all their covariances, by
    seeded draws.

    Scores are float32: weights nearer to each other than their last digit cannot be
    told apart.
    """
    count = len(told.coefficients)
    k = min(k, count)
    nothing = np.full(count, np.nan)
    if told.influence is None:
        return Certainty(k, nothing, nothing, float("nan"))
    spread = np.sqrt((told.influence**2).sum(axis=0))
    if k == count:  # all are the top: that says nothing of any of them
        return Certainty(k, spread, nothing, float("nan"))
    digit = float(np.finfo(np.float32).eps) * max(
        float(np.abs(scores).max()), float(np.finfo(np.float32).tiny)
    )
    top = among(told.coefficients + _errors(told, digit, seed), k)
    best = falling(told.coefficients)[:k]
    p_set = float(top[:, best].all(axis=1).mean())
    return Certainty(k, spread, top.mean(axis=0), p_set)


def _errors(told: SurrogateFit, digit: float, seed: int) -> Array:
    """Errors (m, S) of the weights, drawn from their normal distribution: by the
    symmetric root of the covariance, the one no rounding turns round; of many
    superpixels as sums of what the draws did to them, which needs no root.
    """
    assert told.influence is not None
    groups, count = told.influence.shape
    rng = np.random.default_rng(seed)
    if count >= LARGE:
        drawn = rng.standard_normal((IMAGED, groups)) @ told.influence
        return np.asarray(drawn + digit * rng.standard_normal((IMAGED, count)))
    values, vectors = np.linalg.eigh(told.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0) + digit**2)) @ vectors.T
    return np.asarray(rng.standard_normal((IMAGED, count)) @ root)


def among(weights: Array, k: int) -> Array:
    """(m, S) bool: which weights of each row are its ``k`` largest in size."""
    top = np.zeros(weights.shape, dtype=bool)
    best = np.argpartition(-np.abs(weights), k - 1, axis=1)[:, :k]
    np.put_along_axis(top, best, True, axis=1)
    return top


def looks(samples: int, count: int) -> tuple[int, ...]:
    """After how many draws the weights of ``count`` superpixels are looked at:
    doubling, and after all ``samples``.

    >>> looks(1000, 25), looks(1000, 300)
    ((128, 256, 512, 1000), (1000,))
    """
    doubling = [FIRST_LOOK << step for step in range(max(samples, 1).bit_length())]
    return (
        *(at for at in doubling if PER_SUPERPIXEL * count <= at < samples),
        samples,
    )


def jaccard(tops: list[set[int]]) -> float:
    """Mean over all pairs of sets of what they share over what they hold together."""
    pairs = [(a, b) for place, a in enumerate(tops) for b in tops[place + 1 :]]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
