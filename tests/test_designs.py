"""Designs: every row is uniform, pairs are complements, blocks are orthogonal, and no
design moves what is estimated.
"""

from itertools import combinations, product

import numpy as np
import pytest
from oracles_lime import cosine_kernel
from oracles_surrogate import every_mask
from scipy.stats import chi2

from consilience.perturb.designs import draws, groups

OURS = ("independent", "antithetic", "hadamard")


def test_draws_of_lime_are_its_own():
    numbers = np.random.RandomState(3).randint(0, 2, 50 * 6).reshape(50, 6)
    numbers[0] = 1
    np.testing.assert_array_equal(draws("lime", 50, 6, 3), numbers.astype(bool))


@pytest.mark.parametrize("how", [*OURS, "lime"])
@pytest.mark.parametrize("count", [1, 5, 25, 70])
def test_a_longer_design_begins_with_the_shorter_and_the_seed_matters(how, count):
    on = draws(how, 301, count, 2)
    assert (on.dtype, on.shape) == (np.dtype(bool), (301, count))
    np.testing.assert_array_equal(draws(how, 100, count, 2), on[:100])
    assert (draws(how, 301, count, 3) != on).mean() > 0.3


@pytest.mark.parametrize("how", OURS)
@pytest.mark.parametrize("row", [0, 1, 63, 70, 127, 128])
def test_each_row_is_each_of_all_masks_as_often(how, row):
    """3,000 seeds over the 2**5 masks: chi-squared; the first row is a draw as any
    other.
    """
    seen = np.zeros(32)
    for seed in range(3000):
        seen[int(draws(how, 129, 5, seed)[row] @ (1 << np.arange(5)))] += 1
    assert ((seen - 3000 / 32) ** 2 / (3000 / 32)).sum() < chi2.ppf(0.9995, 31)


@pytest.mark.parametrize("how", OURS)
@pytest.mark.parametrize(("count", "samples"), [(3, 7), (9, 100), (12, 300)])
def test_weighted_moments_are_those_of_all_masks_on_average(how, count, samples):
    """Everything a weighted fit uses, sum w, w z, w z z' and w z y, compared with the
    mean over all 2**S masks.
    """
    rng = np.random.default_rng(count)
    triple, main = rng.normal(size=3), rng.normal(size=count)

    def moments(on):
        weights = cosine_kernel(on, 0.25)[:, None]
        z = np.hstack([np.ones((len(on), 1)), on])
        scores = (
            on @ main
            + on[:, :3].prod(axis=1) * triple[0]
            + (on[:, 0] ^ on[:, 1]) * triple[1]
        )
        return np.concatenate(
            [((z * weights).T @ z).ravel(), (z * weights).T @ scores]
        ) / len(on)

    exact = moments(every_mask(count))
    found = np.array(
        [moments(draws(how, samples, count, seed)) for seed in range(150)]
    )
    error = (found.mean(axis=0) - exact) / np.maximum(
        found.std(axis=0) / np.sqrt(len(found)), 1e-12
    )
    assert np.abs(error[found.std(axis=0) > 1e-12]).max() < 4.7
    np.testing.assert_allclose(
        found.mean(axis=0)[found.std(axis=0) <= 1e-12],
        exact[found.std(axis=0) <= 1e-12],
        atol=1e-9,
    )


@pytest.mark.parametrize("how", ["antithetic", "hadamard"])
def test_pairs_are_complements_and_grouped(how):
    on = draws(how, 255, 20, 1)
    together = groups(how, 255)
    assert together.shape == (128, 2)
    for one, other in together[:-1]:
        np.testing.assert_array_equal(on[one], ~on[other])
    assert list(together[-1]) == [254, -1]
    assert sorted(together.ravel())[1:] == list(range(255))
    np.testing.assert_array_equal(groups("independent", 5), np.arange(5)[:, None])


@pytest.mark.parametrize(
    ("count", "block"), [(4, 128), (25, 128), (64, 128), (65, 256)]
)
def test_blocks_are_orthogonal_arrays_of_strength_three(count, block):
    """In every block any three columns show each of the eight patterns equally often."""
    on = draws("hadamard", 3 * block, count, 0)
    columns = list(combinations(range(count), 3))[:: max(1, count**3 // 3000)]
    for part in np.split(on, 3):
        for triple in columns:
            seen = [
                int((part[:, triple] == pattern).all(axis=1).sum())
                for pattern in product([False, True], repeat=3)
            ]
            assert seen == [block // 8] * 8
    assert (on[:block] != on[block : 2 * block]).any()


def test_independent_draws_are_fair_coins():
    on = draws("independent", 4000, 25, 0)
    np.testing.assert_allclose(on.mean(axis=0), 0.5, atol=0.5 * 4.5 / np.sqrt(4000))
    covariance = np.cov(on.T.astype(float)) - np.eye(25) / 4
    assert np.abs(covariance).max() < 0.25 * 5 / np.sqrt(4000)
