"""Slow, literal formulas for coalition values and mask methods, and games of known
answers.
"""

from itertools import combinations, permutations
from math import comb, factorial

import numpy as np
import torch

from consilience.types import ClassTarget


class Table:
    """A model that looks up what it earns: any game at all of the superpixels that are
    not black.
    """

    id, spec, classes, outputs, can = (
        "table",
        None,
        ("first", "second"),
        "logits",
        frozenset(),
    )

    def __init__(self, table, segments, batch=32):
        self.table, self.batch, self.seen = (
            torch.as_tensor(table, dtype=torch.float64),
            batch,
            0,
        )
        self.spots = [
            np.argwhere(segments == number)[0]
            for number in range(int(segments.max()) + 1)
        ]

    def scores(self, pixels):
        self.seen += len(pixels)
        on = torch.stack(
            [pixels[:, 0, y, x] > 0.5 for y, x in self.spots], dim=1
        ).long()
        earned = self.table[(on << torch.arange(on.shape[1])).sum(dim=1)]
        return torch.stack([earned, -earned], dim=1).float()


def white(side):
    return np.full((side, side, 3), 255, dtype=np.uint8)


def logit():
    return ClassTarget(0, "first", "logit")


def random_table(players, seed=0, linear=1.0):
    """A game with main effects, interactions of every order and noise, in float32 as
    models answer.
    """
    rng = np.random.default_rng(seed)
    on = np.array(
        [
            [number >> player & 1 for player in range(players)]
            for number in range(2**players)
        ]
    )
    effects = linear * rng.normal(size=players)
    return (
        on @ effects
        + np.sin(on @ rng.normal(size=players))
        + 0.2 * rng.normal(size=2**players)
    ).astype(np.float32)


def number_of(members):
    return sum(1 << member for member in members)


def exact_shapley(table, players):
    """Shapley's formula over all coalitions without the player."""
    values = np.zeros(players)
    for player in range(players):
        others = [one for one in range(players) if one != player]
        for size in range(players):
            share = (
                factorial(size) * factorial(players - size - 1) / factorial(players)
            )
            for members in combinations(others, size):
                without = number_of(members)
                values[player] += share * (
                    float(table[without | 1 << player]) - float(table[without])
                )
    return values


def shapley_over_orders(table, players):
    """The same as the mean over all S! orders."""
    values = np.zeros(players)
    for order in permutations(range(players)):
        there = 0
        for player in order:
            values[player] += float(table[there | 1 << player]) - float(table[there])
            there |= 1 << player
    return values / factorial(players)


def exact_banzhaf(table, players):
    values = np.zeros(players)
    for player in range(players):
        for number in range(2**players):
            if not number >> player & 1:
                values[player] += float(table[number | 1 << player]) - float(
                    table[number]
                )
    return values / 2 ** (players - 1)


def kernel_weight(players, size):
    """Theorem 2 of Lundberg & Lee."""
    return (players - 1) / (comb(players, size) * size * (players - size))


def constrained_least_squares(on, values, weights, none, gain):
    """min sum w (v - none - z phi)^2 with sum(phi) = gain, by Lagrange's equations."""
    players = on.shape[1]
    left = np.zeros((players + 1, players + 1))
    right = np.zeros(players + 1)
    for row, value, weight in zip(on.astype(float), values, weights, strict=True):
        left[:players, :players] += 2 * weight * np.outer(row, row)
        right[:players] += 2 * weight * row * (value - none)
    left[:players, players] = left[players, :players] = 1
    right[players] = gain
    return np.linalg.solve(left, right)[:players]


def rise_mask(on, shift, frame):
    """One mask of section 3.2: the grid enlarged to one cell more than the frame
    (half-pixel centres), cut at the offset.
    """
    cell = [int(np.ceil(side / len(on))) for side in frame]
    mask = np.empty(frame)
    for y in range(frame[0]):
        for x in range(frame[1]):
            spots = []
            for at, offset, size in ((y, shift[0], cell[0]), (x, shift[1], cell[1])):
                length = (len(on) + 1) * size
                place = (at + offset + 0.5) * len(on) / length - 0.5
                place = min(max(place, 0.0), len(on) - 1.0)
                low = int(np.floor(place))
                spots.append((low, min(low + 1, len(on) - 1), place - low))
            (y0, y1, fy), (x0, x1, fx) = spots
            top = (1 - fx) * on[y0, x0] + fx * on[y0, x1]
            bottom = (1 - fx) * on[y1, x0] + fx * on[y1, x1]
            mask[y, x] = (1 - fy) * top + fy * bottom
    return mask


def hsic_of(bits, scores, width):
    """tr(K H L H) / (n - 1)^2 with whole Gram matrices."""
    n = len(scores)
    centring = np.eye(n) - np.ones((n, n)) / n
    gram = np.array(
        [[np.exp(-((a - b) ** 2) / (2 * width**2)) for b in scores] for a in scores]
    )
    same = np.array([[float(a == b) for b in bits] for a in bits])
    return np.trace(same @ centring @ gram @ centring) / (n - 1) ** 2
