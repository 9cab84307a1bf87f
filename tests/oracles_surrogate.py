"""Slow, literal formulas for designs, surrogates and their uncertainty, and functions
of bits whose answers are known.
"""

from itertools import combinations, permutations, product

import numpy as np
from oracles_lime import cosine_kernel


def every_mask(count):
    """All 2**S rows of bits."""
    return np.array(list(product([False, True], repeat=count)))


def curved_function(count, seed, third=0.25):
    """A smooth function of bits with main effects, interactions of two and of three:
    (n, S) bool to (n,) as float32.
    """
    rng = np.random.default_rng(seed)
    main = rng.normal(size=count) * np.where(rng.random(count) < 0.4, 1, 0.25)
    pairs = np.triu(rng.normal(size=(count, count)), 1) * 0.25
    triples, size = rng.integers(0, count, (60, 3)), rng.normal(size=60) * third

    def function(on):
        z = on.astype(float) - 0.5
        raised = z @ main + ((z @ pairs) * z).sum(axis=1)
        raised = (
            raised
            + 2
            * (z[:, triples[:, 0]] * z[:, triples[:, 1]] * z[:, triples[:, 2]])
            @ size
        )
        return (1 / (1 + np.exp(-raised))).astype(np.float32).astype(float)

    return function


def tied_function(count, k, seed, gap=0.001):
    """Weights whose limit is k, ..., 2, 1 + gap, 1, .1, ..., under interactions that
    make the noise: (n, S) bool to (n,).
    """
    rng = np.random.default_rng(seed)
    wanted = np.array(
        [*np.arange(k, 1, -1.0), 1 + gap, 1.0, *np.full(count - k - 1, 0.1)]
    )
    pairs, triples = (
        np.triu(rng.normal(size=(count, count)), 1),
        rng.permuted(np.tile(np.arange(count), (9, 1)), axis=1)[:, :3],
    )

    def noise(on):
        z = on.astype(float) - 0.5
        return ((z @ pairs) * z).sum(axis=1) + 4 * z[:, triples].prod(axis=2).sum(
            axis=1
        )

    moved = wanted - exact_limit(noise, count)[0]
    return lambda on: noise(on) + on @ moved


def exact_limit(function, count, weigh=lambda on: cosine_kernel(on, 0.25)):
    """Weighted least squares over all 2**S masks, each as likely: what every design
    must tend to. (S,), intercept.
    """
    on = every_mask(count)
    design, weights = np.hstack([np.ones((len(on), 1)), on]), weigh(on)
    solution = np.linalg.lstsq(
        design * np.sqrt(weights)[:, None],
        function(on) * np.sqrt(weights),
        rcond=None,
    )[0]
    return solution[1:], solution[0]


def refitted(on, scores, weights, alpha):
    """Ridge with a free intercept by the normal equations: (intercept,
    coefficients...).
    """
    design = np.hstack([np.ones((len(on), 1)), np.asarray(on, float)])
    penalty = alpha * np.eye(design.shape[1])
    penalty[0, 0] = 0
    return np.linalg.solve(
        (design.T * weights) @ design + penalty, (design.T * weights) @ scores
    )


def hc3(on, scores, weights, alpha):
    """MacKinnon & White's HC3 written out: the bread times the sum of x x' w^2 e^2 / (1
    - h)^2 times the bread.
    """
    design = np.hstack([np.ones((len(on), 1)), np.asarray(on, float)])
    penalty = alpha * np.eye(design.shape[1])
    penalty[0, 0] = 0
    bread = np.linalg.inv(
        sum(w * np.outer(x, x) for w, x in zip(weights, design, strict=True))
        + penalty
    )
    beta = bread @ sum(
        w * x * y for w, x, y in zip(weights, design, scores, strict=True)
    )
    meat = np.zeros_like(bread)
    for x, y, w in zip(design, scores, weights, strict=True):
        leverage = w * x @ bread @ x
        meat += np.outer(x, x) * (w * (y - x @ beta) / (1 - leverage)) ** 2
    return (bread @ meat @ bread)[1:, 1:]


def jackknife(on, scores, weights, alpha, together):
    """Sum of the squared changes of the coefficients when each group is left out and
    all is fitted again.
    """
    whole = refitted(on, scores, weights, alpha)[1:]
    covariance = np.zeros((len(whole), len(whole)))
    for rows in together:
        rest = np.setdiff1d(np.arange(len(on)), [row for row in rows if row >= 0])
        change = whole - refitted(on[rest], scores[rest], weights[rest], alpha)[1:]
        covariance += np.outer(change, change)
    return covariance


def told_from_the_others(on, scores, weights, alpha, together):
    """R^2 out of sample by fitting anew without each group, against the weighted mean
    of the others.
    """
    ours = means = 0.0
    for rows in together:
        rows = [row for row in rows if row >= 0]
        rest = np.setdiff1d(np.arange(len(on)), rows)
        beta = refitted(on[rest], scores[rest], weights[rest], alpha)
        mean = weights[rest] @ scores[rest] / weights[rest].sum()
        for row in rows:
            ours += (
                weights[row]
                * (scores[row] - beta[0] - on[row].astype(float) @ beta[1:]) ** 2
            )
            means += weights[row] * (scores[row] - mean) ** 2
    return 1 - ours / means


def shapley(function, count):
    """Shapley values by their definition: the mean, over all orders of arrival, of what
    each adds when it comes.
    """
    known = {
        tuple(row): value
        for row, value in zip(
            every_mask(count), function(every_mask(count)), strict=True
        )
    }
    values, orders = np.zeros(count), list(permutations(range(count)))
    for order in orders:
        there = [False] * count
        for player in order:
            before = known[tuple(there)]
            there[player] = True
            values[player] += known[tuple(there)] - before
    return values / len(orders)


def mean_jaccard(sets):
    return float(
        np.mean(
            [
                len(set(a) & set(b)) / len(set(a) | set(b))
                for a, b in combinations(sets, 2)
            ]
        )
    )
