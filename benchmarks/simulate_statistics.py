"""How often intervals hold and tests reject what is true, simulated. Run: make simulate

Four tables: intervals of a mean, tests of paired differences whose mean is 0, standard
errors of games of superpixels, and the shift test on independent smooth maps. Each row
is a distribution whose answer is known; the hard ones are skewed, mostly equal, rare and
large, or of few independent positions.
"""

import argparse
import math

import numpy as np
from scipy import ndimage

from consilience.agreement.overlap import shift_test
from consilience.explainers.shapley import (
    Banzhaf,
    Played,
    efficient,
    gains,
    moderated_stderr,
    player_orders,
    shapley_draws,
    steps,
)
from consilience.stats import mean_interval, paired_test, sign_flip_test

SIZES = (5, 8, 12, 20, 40, 100)


def mostly(rest, share):
    """Values of ``rest`` with probability ``share``, else 0."""
    return lambda rng, n: rest(rng, n) * (rng.random(n) < share)


DISTRIBUTIONS = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "t, 3 degrees": (lambda rng, n: rng.standard_t(3, n), 0.0),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "beta(5, 1/2)": (lambda rng, n: rng.beta(5, 0.5, n), 5 / 5.5),
    "lognormal": (lambda rng, n: rng.lognormal(size=n), math.exp(0.5)),
    "0, or exponential in .3": (mostly(lambda r, n: r.exponential(size=n), 0.3), 0.3),
    "0, or exponential in .1": (mostly(lambda r, n: r.exponential(size=n), 0.1), 0.1),
}


def intervals(runs):
    """Share of 95 % intervals that hold the mean, and in how many runs there is none."""
    rng = np.random.default_rng(1)
    for name, (draw, mean) in DISTRIBUTIONS.items():
        cells = []
        for count in SIZES:
            found = [mean_interval(draw(rng, count)) for _ in range(runs)]
            told = [one for one in found if not math.isnan(one.low)]
            held = np.mean([one.low <= mean <= one.high for one in told])
            none = (
                f" (none in {1 - len(told) / runs:.2f})" if len(told) < runs else ""
            )
            cells.append(f"{held:.3f}{none}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


DIFFERENCES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential, long tail above": lambda rng, n: rng.exponential(size=n) - 1,
    "exponential, long tail below": lambda rng, n: 1 - rng.exponential(size=n),
    "gamma(1/2), long tail below": lambda rng, n: 0.5 - rng.gamma(0.5, size=n),
    "lognormal, long tail below": lambda rng, n: (
        math.exp(0.5) - rng.lognormal(size=n)
    ),
    ".1, or -.9 in one of ten": lambda rng, n: 0.1 - (rng.random(n) < 0.1),
}


def tests_of_means(runs):
    """Share of p at most .05 for a mean above 0 that is 0: sign flips, and the test."""
    rng = np.random.default_rng(2)
    for name, draw in DIFFERENCES.items():
        cells = []
        for count in SIZES[:-1]:
            drawn = [draw(rng, count) for _ in range(runs)]
            rejected = [
                np.mean([test(x, alternative="greater") <= 0.05 for x in drawn])
                for test in (sign_flip_test, paired_test)
            ]
            cells.append(f"{rejected[0]:.3f}, {rejected[1]:.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def game_of(name, players):
    """What coalitions (n, S) earn."""
    rng = np.random.default_rng(7)
    weights = rng.normal(size=players)
    if name == "three together":
        return lambda on: 0.2 + 0.5 * on[:, :3].all(axis=1) + 0.05 * on[:, 3]
    if name == "xor of three":
        return lambda on: 0.5 * (on[:, 0] ^ on[:, 1] ^ on[:, 2]) + 0.05 * on[:, 3]
    if name == "saturated":
        return lambda on: 1 / (1 + np.exp(4 - 6 * (on @ weights - weights.sum() / 2)))
    triples = [rng.choice(players, 3, replace=False) for _ in range(6)]
    sizes = rng.normal(size=6)
    return lambda on: (
        0.3 * (on @ weights)
        + sum(s * on[:, t].all(axis=1) for s, t in zip(sizes, triples, strict=True))
    )


def estimate_of(how, game, players, number, seed):
    """Values and standard errors (S,) of one run."""
    none, whole = game(np.array([[False] * players, [True] * players]))
    if how == "kernelshap":
        drawn = shapley_draws(players, number - 2, seed)
        fit = efficient(drawn, game(drawn.on) - none, whole - none)
        return fit.coefficients, fit.stderr
    if how == "shapley":
        places = player_orders(players, number, seed)
        earned = game(steps(places)(0, number * (players - 1)))
        played = Played(np.arange(players), none, whole, earned)
        pairs = gains(played, places).reshape(-1, 2, players).mean(axis=1)
        return pairs.mean(axis=0), moderated_stderr(pairs)
    estimator = "msr" if how.endswith("msr") else "regression"
    rng = np.random.default_rng(seed)
    on = rng.integers(0, 2, ((number - 2) // 2, players), dtype=np.bool_)
    explainer = Banzhaf(samples=number, estimator=estimator)
    fit = explainer._fit(2.0 * on - 1, game(on) - game(~on), False)
    return fit.coefficients, fit.stderr


BUDGETS = {
    "kernelshap": ((64, 128, 256, 512, 1000), 20_000),
    "banzhaf": ((64, 128, 256, 512, 1000), 40_000),
    "banzhaf, msr": ((34, 64, 128, 512, 1000), 40_000),
    "shapley": ((16, 32, 64), 4000),
}


def games(runs):
    """Share of values within 1.96 standard errors, the least over games and players;
    runs without standard errors are left out and counted.
    """
    for how, (budgets, many) in BUDGETS.items():
        for number in budgets:
            least, where, without, total = 1.0, "", 0, 0
            for name in ("three together", "xor of three", "saturated", "triples"):
                for players in (10, 20, 30, 60):
                    game = game_of(name, players)
                    limits = [
                        estimate_of(how, game, players, many, 10_000 + seed)[0]
                        for seed in range(5)
                    ]
                    limit, held = np.mean(limits, axis=0), []
                    for seed in range(runs):
                        values, stderr = estimate_of(how, game, players, number, seed)
                        total += 1
                        if np.isnan(stderr).any():
                            without += 1
                            continue
                        held.append(np.abs(values - limit) <= 1.96 * stderr + 1e-9)
                    if held and np.mean(held) < least:
                        least, where = float(np.mean(held)), f"{name}, {players}"
            print(
                f"| {how} | {number} | {least:.3f} ({where}) | {without / total:.2f} |",
                flush=True,
            )


SIDE = 56


def enlarged(grid):
    """A coarse map as class activation maps are enlarged."""
    zoom = SIDE / grid.shape[0]
    return ndimage.zoom(grid, zoom, order=1, grid_mode=True, mode="nearest")


def gaussian(rng, sigma):
    """A Gaussian field cut out of a larger one."""
    margin = 4 * sigma
    noise = rng.normal(size=(SIDE + 2 * margin,) * 2)
    return ndimage.gaussian_filter(noise, sigma)[margin:-margin, margin:-margin]


def superpixels(rng, count=40):
    """Random weights of the cells nearest to random points."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    points = rng.uniform(0, SIDE, (count, 2))
    squares = (rows[..., None] - points[:, 0]) ** 2
    nearest = (squares + (columns[..., None] - points[:, 1]) ** 2).argmin(axis=-1)
    return rng.normal(size=count)[nearest]


def blob(rng):
    """One blob anywhere, of any size."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    (y, x), size = rng.uniform(0, SIDE, 2), rng.uniform(4, 16)
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))


MAPS = {
    "grids of 7 x 7": (lambda rng: enlarged(rng.normal(size=(7, 7))),) * 2,
    "smooth grids of 7 x 7": (
        lambda rng: enlarged(
            ndimage.gaussian_filter(rng.normal(size=(13, 13)), 1)[3:10, 3:10]
        ),
    )
    * 2,
    "grids of 14 x 14": (lambda rng: enlarged(rng.exponential(size=(14, 14))),) * 2,
    "superpixels, grid of 7 x 7": (
        superpixels,
        lambda rng: enlarged(rng.normal(size=(7, 7))),
    ),
    "superpixels": (superpixels,) * 2,
    "Gaussian fields, sigma 1/14": (lambda rng: gaussian(rng, 4),) * 2,
    "Gaussian fields, sigma 1/7": (lambda rng: gaussian(rng, 8),) * 2,
    "Gaussian fields, sigma 1/4": (lambda rng: gaussian(rng, 14),) * 2,
    "one blob each": (blob,) * 2,
}


def shifts(runs):
    """Share of independent maps whose shift p is at most .05 and .01."""
    rng = np.random.default_rng(4)
    for name, (first, second) in MAPS.items():
        found = []
        for _ in range(runs):
            maps, share = (first(rng), second(rng)), rng.choice([0.1, 0.2, 0.3])
            found.append(
                shift_test(*(one > np.quantile(one, 1 - share) for one in maps))
            )
        p = np.array([one.p for one in found])
        positions = np.median([one.positions for one in found])
        rejected = f"{np.mean(p <= 0.05):.3f} | {np.mean(p <= 0.01):.3f}"
        print(f"| {name} | {positions:.0f} | {rejected} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument(
        "table", nargs="*", default=["intervals", "tests", "games", "shifts"]
    )
    asked = parser.parse_args()
    tables = {
        "intervals": intervals,
        "tests": tests_of_means,
        "games": lambda runs: games(max(1, runs // 12)),
        "shifts": shifts,
    }
    for name in asked.table:
        print(f"\n{name}: {tables[name].__doc__}", flush=True)
        tables[name](asked.runs)


if __name__ == "__main__":
    main()
