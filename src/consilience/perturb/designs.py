"""Designs: which superpixels are on in which edited image.

Every design but lime's own makes each row uniform over all ``2**S`` rows, so that a
weighted fit has the same limit whichever is used: that of infinitely many fair coins. A
design changes the variance, and which rows belong together, never what is estimated.
The first rows of a longer design are the shorter one of the same seed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from consilience.types import Array

Draw = Literal["independent", "antithetic", "hadamard", "lime"]

ORDER = 64
"""Smallest Hadamard matrix used: a block is its rows and their complements, 128 draws.

Larger ones gain little.
"""


def draws(how: Draw, samples: int, count: int, seed: int) -> Array:
    """Perturbations (samples, count) bool, True where a superpixel is on.

    ``independent``: fair coins. ``antithetic``: each row is followed by its complement,
    which removes the part of the error that is even in the bits, such as that of every
    interaction of two. ``hadamard``: blocks of an orthogonal array with fold-over (rows
    of a Hadamard matrix and their complements; of strength 3), its columns, signs and
    the order of its rows drawn anew for each block. ``lime``: the numbers lime draws,
    whose first row keeps all.
    """
    if how == "lime":
        legacy = np.random.RandomState(seed)
        on = (
            legacy.randint(0, 2, samples * count).reshape(samples, count).astype(bool)
        )
        on[0] = True
        return on
    rng = np.random.default_rng(seed)
    if how == "independent":
        return rng.integers(0, 2, size=(samples, count), dtype=np.bool_)
    if how == "antithetic":
        return folded(
            rng.integers(0, 2, size=(-(-samples // 2), count), dtype=np.bool_)
        )[:samples]
    matrix = _hadamard(count)
    blocks = [
        folded(_shuffled(matrix, count, rng))
        for _ in range(-(-samples // (2 * len(matrix))))
    ]
    return np.concatenate(blocks)[:samples]


def folded(half: Array) -> Array:
    """Each row (bool) followed by its complement."""
    return np.stack([half, ~half], axis=1).reshape(-1, half.shape[1])


def groups(how: Draw, samples: int) -> Array:
    """Rows that were drawn together (G, 1 or 2), -1 where a pair was cut off: what one
    deletes, or adds up, as one.
    """
    if how in ("independent", "lime"):
        return np.arange(samples)[:, None]
    together = np.arange(samples + samples % 2).reshape(-1, 2)
    return np.where(together < samples, together, -1)


def _hadamard(count: int) -> Array:
    """Sylvester's matrix of the smallest order that is at least ``count`` and `ORDER`,
    True where it is 1.
    """
    from scipy.linalg import hadamard

    order = max(ORDER, 1 << (count - 1).bit_length())
    matrix: Array = hadamard(order) > 0
    return matrix


def _shuffled(matrix: Array, count: int, rng: np.random.Generator) -> Array:
    """``count`` columns at random, each with a sign at random (which alone makes every
    row uniform), rows in any order.
    """
    columns = rng.permutation(matrix.shape[1])[:count]
    flipped: Array = matrix[:, columns] ^ rng.integers(
        0, 2, size=count, dtype=np.bool_
    )
    return flipped[rng.permutation(len(matrix))]
