"""Scores of many edits where most are asked of a cheaper network, and the estimand stays the
exact one's.

What LIME, KernelSHAP and RISE make of scores is linear in them. So a draw may stand with
what a cheap network says, put on the exact one's scale, as long as a random part of the
draws is asked of both and carries what the cheap one got wrong for all:

    z_i = p_i + (r_i / f) (y_i - p_i),    p_i = a + b c_i

with ``c`` and ``y`` what the cheap and the exact network say, ``r_i`` whether draw i was
asked of both, ``f`` the share of those. Over the choice of ``r`` the mean of z is y's, so
that every sum over draws keeps its mean: a control variate (Peherstorfer, Willcox &
Gunzburger 2016, multifidelity Monte Carlo) written as pseudo-outcomes (a difference
estimator of survey sampling; Angelopoulos et al. 2023, prediction-powered inference). ``a``
and ``b`` are least squares over the draws asked of both, whose bias is of the order of one
over their number. Standard errors taken from the residuals of z hold as they are: z's
spread has the part that the cheap network adds.

A curve's points are no draws: its value is a sum over all of them. There the cheap network
is asked of every point, and the exact one of two at random in each run of neighbours
(`points`, `summed`): a stratified difference estimator (Cochran 1977, chapters 5 and 5A),
unbiased for the exact network's value, whose standard error comes from the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.types import Array, Cheaper, Fidelity, Model

FIDELITY = (
    "what most draws are asked of: the network itself, or a cheap copy of it, whose errors "
    "a part asked of both takes out; auto: where this machine has one that pays"
)

PILOT = 64
"""Draws that are asked of both before it is known how many are worth it: full passes of most
networks, which take as long for fewer."""

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the draws that may be asked of both."""

WORTHWHILE = 0.9
"""Of the exact network's time at the same variance: ``auto`` takes no less gain."""


STRATUM = 12
"""Neighbouring points of a curve of which two are asked of both."""


@dataclass(frozen=True)
class Asked:
    """Scores (n,) float64 that stand for the exact network's, and how they came about."""

    scores: Array
    facts: dict[str, Any]


def ask(
    fidelity: Fidelity,
    model: Model,
    score: Callable[[Model, Array], Array],
    on: Array,
    together: Array,
    seed: int,
) -> Asked:
    """Scores of the rows of ``on`` (n, S), what each edit keeps.

    ``score(model, rows)`` is (len(rows),), what a model says of some rows. ``together``
    (G, k) are rows that were drawn together, -1 where there is none: they are asked of
    both or not as one. Rows in none of them are no random draws and are asked of the
    exact network alone. With ``auto`` the exact network is asked of everything where the
    cheap one is not worth it.
    """
    everything = np.arange(len(on))
    if fidelity == "exact":
        return Asked(score(model, everything), {})
    found = cheaper_of(model, fidelity)
    if isinstance(found, str) or together.size < 3 * PILOT:
        why = (
            found
            if isinstance(found, str)
            else f"{together.size} draws are too few to ask two networks"
        )
        return Asked(
            score(model, everything), {"fidelity": {"kind": "exact", "why": why}}
        )
    return _of_both(found, fidelity, model, score, on, together, seed)


def cheaper_of(model: Model, fidelity: Fidelity) -> Cheaper | str:
    """A model's cheap copy, or why there is none."""
    if not hasattr(model, "cheaper"):
        return "the model has no cheaper copy"
    found: Cheaper | str = model.cheaper(fidelity)
    return found


def asked_facts(asked: Sequence[Asked]) -> dict[str, Any]:
    """What is to be said of draws that were asked for in several goes."""
    said = [one.facts["fidelity"] for one in asked if "fidelity" in one.facts]
    if not said:
        return {}
    facts = dict(said[-1])
    cheap = [one for one in said if "exact_passes" in one]
    for key in ("exact_passes", "cheap_passes") if cheap else ():
        whole = [len(one.scores) for one in asked]
        facts[key] = sum(
            one.facts["fidelity"].get(key, count if key == "exact_passes" else 0)
            for one, count in zip(asked, whole, strict=True)
        )
    return {"fidelity": facts}


def _of_both(
    cheap: Cheaper,
    fidelity: Fidelity,
    model: Model,
    score: Callable[[Model, Array], Array],
    on: Array,
    together: Array,
    seed: int,
) -> Asked:
    drawn = np.sort(together[together >= 0])
    exact: Array = np.full(len(on), np.nan)
    order = np.random.default_rng([seed, 17]).permutation(len(together))

    def ask_exact(groups: Array) -> None:
        rows = together[groups]
        rows = np.sort(rows[rows >= 0])
        exact[rows] = score(model, rows)

    pilot = math.ceil(PILOT / together.shape[1])
    ask_exact(order[:pilot])
    said: Array = np.full(len(on), np.nan)
    said[drawn] = score(cheap.model, drawn)
    share, gain = _best_share(cheap.cost, exact, said, on, together)
    if fidelity == "auto" and gain > WORTHWHILE:
        rest = np.flatnonzero(np.isnan(exact))
        exact[rest] = score(model, rest)
        facts = {
            "kind": "exact",
            "why": f"{cheap.kind} would not pay",
            "tried": cheap.kind,
        }
        return Asked(exact, {"fidelity": {**facts, "relative_time": round(gain, 3)}})
    count = round(share * len(together))
    ask_exact(order[pilot:count])
    fixed = np.setdiff1d(np.arange(len(on)), drawn)
    if len(fixed):
        exact[fixed] = score(model, fixed)
    both = together[order[:count]]
    both = both[both >= 0]
    told, correlation = _on_the_scale(exact, said, both)
    scores = told.copy()
    scores[both] += (exact[both] - told[both]) * len(drawn) / len(both)
    scores[fixed] = exact[fixed]
    return Asked(
        scores,
        {
            "fidelity": {
                "kind": cheap.kind,
                "exact_passes": len(both) + len(fixed),
                "cheap_passes": len(drawn),
                "cheap_cost": cheap.cost,
                "correlation": correlation,
                "relative_time": round(gain, 3),
            }
        },
    )


def _on_the_scale(exact: Array, said: Array, both: Array) -> tuple[Array, float]:
    """What the cheap network said on the exact one's scale, by least squares over rows
    asked of ``both``, and their correlation there.
    """
    x, y = said[both], exact[both]
    spread = float(x.std() * y.std())
    if spread == 0:
        return said - x.mean() + y.mean(), math.nan
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    slope = covariance / float(x.var())
    return y.mean() + slope * (said - x.mean()), covariance / spread


def _best_share(
    cost: float, exact: Array, said: Array, on: Array, together: Array
) -> tuple[float, float]:
    """The share of draws to ask of both, and what a given variance then costs, in units of
    the exact network alone.

    With ``s2`` the variance that a linear fit leaves of the draws and ``e2`` that of the
    cheap network's error, z has ``s2 + e2 / f`` for ``cost + f``; the exact network alone
    ``s2 + e2`` for 1. Of pairs only the difference counts: a fit cancels the rest.
    """
    asked = together[
        ~np.isnan(exact[together]).any(axis=1) & (together >= 0).all(axis=1)
    ]
    told, _ = _on_the_scale(exact, said, asked.ravel())
    error = _contrast(exact - told, asked)
    e2 = float((error**2).mean())
    whole = together[(together >= 0).all(axis=1)]
    left = _left(_contrast(told, whole), _contrast(on.astype(np.float64), whole))
    s2 = max(left, 1e-30)
    least = math.ceil(PILOT / together.shape[1]) / len(together)  # which are there
    times = {
        share: (s2 + e2 / share) * (cost + share) / (s2 + e2)
        for share in (least, *SHARES)
        if share >= least
    }
    best = min(times, key=times.__getitem__)
    return best, times[best]


def _contrast(values: Array, groups: Array) -> Array:
    """Half the difference of each pair; values less their mean where draws stand alone."""
    if groups.shape[1] == 2:
        half: Array = (values[groups[:, 0]] - values[groups[:, 1]]) / 2
        return half
    alone: Array = values[groups[:, 0]]
    less: Array = alone - alone.mean(axis=0)
    return less


def _left(values: Array, design: Array) -> float:
    """Variance that least squares on the design leaves, per degree of freedom; all of it
    where there are no more rows than columns.
    """
    free = len(values) - design.shape[1]
    if free < 1 or not design.shape[1]:
        return float((values**2).mean())
    found = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - design @ found) ** 2).sum() / free)


# ---- sums over points that are no draws


@dataclass(frozen=True)
class Points:
    """Which points of a curve are asked of which network: ``inner`` of the cheap one,
    ``exact`` (the two ends and some of the inner ones) of the network itself; ``runs`` of
    neighbours (rows, the rows of them asked of both).
    """

    inner: Array
    exact: Array
    runs: Sequence[tuple[Array, Array]]

    def relative_time(self, cost: float) -> float:
        """Of the time of the exact network alone."""
        return (len(self.exact) + cost * len(self.inner)) / (len(self.inner) + 2)


def points(count: int, seed: Sequence[int]) -> Points:
    """A random choice for a curve of ``count`` points, at least 2."""
    inner = np.arange(1, count - 1)
    rng = np.random.default_rng([*seed, 17])
    parts = np.array_split(inner, max(1, math.ceil(len(inner) / STRATUM)))
    runs = [
        (part, np.sort(rng.choice(part, min(2, len(part)), replace=False)))
        for part in parts
    ]
    exact = np.concatenate([[0], *(both for _, both in runs), [count - 1]])
    return Points(inner, exact.astype(np.int64), runs)


def summed(asked: Points, weights: Array, cheap: Array, exact: Array) -> Asked:
    """Scores (n,) whose weighted sum is unbiased for the exact network's, and its
    standard error.

    ``weights`` (n,) are of the points in the sum; ``cheap`` (n,) what the cheap network
    says of the inner ones and ``exact`` (n,) what the exact one says where it was asked;
    elsewhere they are not read. Each run is moved as a whole, by what its two show.
    """
    scores, variance = exact.copy(), 0.0
    for run, both in asked.runs:
        wrong = weights[both] * (exact[both] - cheap[both])
        total = wrong.sum() * len(run) / max(1, len(both))
        whole = weights[run].sum()
        scores[run] = cheap[run] + (total / whole if whole else 0.0)
        if len(both) < len(run):
            unseen = 1 - len(both) / len(run)
            variance += len(run) ** 2 * unseen * wrong.var(ddof=1) / len(both)
    return Asked(scores, {"stderr": math.sqrt(variance)})
