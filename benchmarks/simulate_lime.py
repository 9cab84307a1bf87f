"""How often LIME's statements are wrong, simulated in the hard regime. Run: make simulate

Functions of bits whose limit under infinitely many draws is known: strong interactions
of three and four superpixels, XOR, saturated probabilities, and a mixture; 5 to 100
superpixels, 64 to 1,000 draws. Printed for each: the share of 95 % intervals that hold
the limit, how often a superpixel called sure is not among the top, and how often a set
called stable, with all looks of until=stable, is a wrong one.

A place is not counted as wrong where the limit itself is tied to a thousandth.
"""

import argparse

import numpy as np

from consilience.perturb.designs import draws, groups
from consilience.perturb.surrogate import (
    FIRST_LOOK,
    SURE,
    WRONG,
    Scored,
    certainty,
    cosine,
    falling,
    least_squares,
    looks,
)

WIDTH, PENALTY = 0.25, 0.01
SIZES = (5, 10, 20, 30, 60, 100)
DRAWS = (64, 128, 300, 500, 1000)


def function_of(name, count):
    """f of bits (n, S): what the model says of edited images."""
    rng = np.random.default_rng(7)
    last = min(4, count - 1)
    if name == "and of 3":
        return lambda x: 0.2 + 0.5 * x[:, :3].all(axis=1) + 0.05 * x[:, min(3, last)]
    if name == "and of 4":
        return lambda x: 0.1 + 0.7 * x[:, :4].all(axis=1) + 0.03 * x[:, last]
    if name == "xor of 3":
        return lambda x: (
            0.5 * (x[:, 0] ^ x[:, 1] ^ x[:, 2])
            + 0.05 * x[:, min(3, last)]
            + 0.02 * x[:, last]
        )
    weights = rng.normal(size=count)
    if name == "saturated":
        return lambda x: 1 / (1 + np.exp(4 - 6 * (x @ weights - weights.sum() / 2)))
    triples = [rng.choice(count, 3, replace=False) for _ in range(6)]
    sizes = rng.normal(size=6)
    return lambda x: (
        0.3 * (x @ weights)
        + sum(
            size * x[:, some].all(axis=1)
            for size, some in zip(sizes, triples, strict=True)
        )
    )


def limit_of(function, count):
    """The surrogate's weights under 200,000 draws, by the normal equations."""
    on = draws("antithetic", 200_000, count, 12345)
    design = np.column_stack([np.ones(len(on)), on])
    weighed = design * cosine(on, WIDTH)[:, None]
    return np.linalg.solve(design.T @ weighed, weighed.T @ function(on))[1:]


def fitted(on, scores):
    """The surrogate of some draws."""
    data = Scored(
        on.astype(float), scores, cosine(on, WIDTH), groups("antithetic", len(on))
    )
    return least_squares(data, PENALTY)


def simulated(name, count, number, runs, top):
    """Coverage, wrong shares of sure superpixels, wrong shares of stable sets."""
    function = function_of(name, count)
    limit = limit_of(function, count)
    edge = np.sort(np.abs(limit))[-top]
    possible = np.abs(limit) >= edge - 1e-3  # those that may hold a place
    held = told = sure = not_top = stable = wrong = 0
    for seed in range(runs):
        on = draws("antithetic", number, count, seed)
        scores = function(on).astype(np.float32).astype(float)
        fit = fitted(on, scores)
        found = certainty(fit, scores, top, seed)
        if not np.isnan(found.stderr).any():
            off = np.abs(fit.coefficients - limit)
            held += int((off <= 1.96 * found.stderr + 1e-9).sum())
            told += count
            called = found.p_top >= SURE
            sure += int(called.sum())
            not_top += int((called & ~possible).sum())
        stops = looks(number, count)
        for stop in stops:
            fit = fitted(on[:stop], scores[:stop])
            found = certainty(fit, scores[:stop], top, seed)
            if stop >= FIRST_LOOK and found.p_set >= 1 - WRONG / len(stops):
                stable += 1
                wrong += not possible[falling(fit.coefficients)[:top]].all()
                break
    share = held / told if told else float("nan")
    return share, not_top, sure, wrong, stable


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--top", type=int, default=3)
    asked = parser.parse_args()
    print(
        "function | superpixels | draws | covered | sure, wrong | stable, wrong of runs"
    )
    for name in ("and of 3", "and of 4", "xor of 3", "saturated", "mixture"):
        for count in SIZES:
            for number in DRAWS:
                found = simulated(name, count, number, asked.runs, asked.top)
                share, not_top, sure, wrong, stable = found
                said = f"{not_top} of {sure} | {wrong} of {stable} of {asked.runs}"
                print(
                    f"{name} | {count} | {number} | {share:.3f} | {said}", flush=True
                )


if __name__ == "__main__":
    main()
