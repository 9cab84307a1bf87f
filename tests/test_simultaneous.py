"""Max-T by slow loops, and how often it is wrong where nothing is there."""

import math

import numpy as np
import pytest

from consilience import ConsilienceError
from consilience.simultaneous import DRAWS, simultaneous


def slow(rows, level, seed, draws):
    """Means, critical value and p of a table, a draw and a column at a time."""
    n, count = rows.shape
    mean = [sum(rows[:, k]) / n for k in range(count)]
    spread = [
        math.sqrt(sum((rows[i, k] - mean[k]) ** 2 for i in range(n)) / (n - 1))
        for k in range(count)
    ]
    t = [abs(mean[k]) / spread[k] * math.sqrt(n) for k in range(count)]
    signs = np.random.default_rng(seed).integers(0, 2, (draws, n)) * 2 - 1
    counts = np.random.default_rng(seed + 1).multinomial(n, np.full(n, 1 / n), draws)
    worst = {"flips": [], "resamples": []}
    for b in range(draws):
        flipped, resampled = 0.0, 0.0
        for k in range(count):
            own = [signs[b, i] * (rows[i, k] - mean[k]) for i in range(n)]
            flipped = max(flipped, abs(t_of(own)))
            drawn = [
                rows[i, k] - mean[k] for i in range(n) for _ in range(counts[b, i])
            ]
            resampled = max(resampled, abs(t_of(drawn)))
        worst["flips"].append(flipped)
        worst["resamples"].append(resampled)
    place = math.ceil(level * (draws + 1)) - 1
    critical = max(sorted(values)[place] for values in worst.values())
    p = [
        max(
            (1 + sum(w >= t[k] for w in values)) / (1 + draws)
            for values in worst.values()
        )
        for k in range(count)
    ]
    return mean, [s / math.sqrt(n) for s in spread], critical, p


def t_of(values):
    n = len(values)
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean / spread * math.sqrt(n)


@pytest.mark.parametrize(("level", "seed"), [(0.95, 0), (0.8, 3)])
def test_max_t_by_slow_loops(level, seed):
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(9, 4)) + np.array([0, 0.4, -1.2, 2.5])
    rows[:, 3] += rows[:, 0]  # classes hang together
    found = simultaneous(rows, level, seed, draws=79)
    mean, error, critical, p = slow(rows, level, seed, 79)
    assert found.mean.tolist() == pytest.approx(mean)
    assert found.error.tolist() == pytest.approx(error)
    assert found.critical == pytest.approx(critical, rel=1e-4)
    assert found.p.tolist() == pytest.approx(p)
    assert len(set(p)) > 2
    half = critical * np.array(error)
    assert found.low.tolist() == pytest.approx(
        (np.array(mean) - half).tolist(), rel=1e-4
    )
    assert found.high.tolist() == pytest.approx(
        (np.array(mean) + half).tolist(), rel=1e-4
    )
    assert (found.n, found.level) == (9, level)


def test_tables_side_by_side_are_one_family():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 7))
    whole = simultaneous(rows, draws=99)
    parts = simultaneous([rows[:, :3], rows[:, 3:]], draws=99)
    assert parts.p.tolist() == whole.p.tolist()
    assert parts.critical == whole.critical
    alone = simultaneous(rows[:, :3], draws=99)
    assert alone.critical < whole.critical


def test_many_columns_are_read_in_blocks(monkeypatch):
    from consilience import simultaneous as module

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 11))
    whole = simultaneous(rows, draws=99)
    monkeypatch.setattr(module, "COLUMNS", 4)
    blocks = simultaneous(rows, draws=99)
    assert blocks.p.tolist() == whole.p.tolist()
    assert blocks.critical == pytest.approx(whole.critical)


def test_columns_without_variance_are_not_tested():
    rows = np.random.default_rng(0).normal(size=(10, 3))
    rows[:, 0], rows[:, 1] = 0, 2.5
    found = simultaneous(rows, draws=99)
    assert found.p[0] == 1
    assert math.isnan(found.p[1])
    assert found.mean[1] == 2.5
    assert np.isnan(found.low[:2]).all()
    assert np.isnan(found.error[:2]).all()
    assert np.isfinite([found.p[2], found.low[2]]).all()
    assert found.critical == simultaneous(rows[:, 2:], draws=99).critical


@pytest.mark.parametrize(
    ("rows", "level", "words"),
    [
        (np.zeros((1, 3)), 0.95, "two images; got 1"),
        (np.zeros((5, 3)), 1.0, "between 0 and 1; got 1"),
        (np.full((5, 3), np.nan), 0.95, "15 differences are not finite"),
        ([np.zeros((5, 3)), np.zeros((4, 3))], 0.95, r"same images; got \[4, 5\]"),
    ],
)
def test_what_cannot_be_tested_is_said(rows, level, words):
    with pytest.raises(ConsilienceError, match=words):
        simultaneous(rows, level)


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
@pytest.mark.parametrize("n", [12, 40])
def test_false_alarms_over_a_family_are_rare(kind, n):
    """At most .05 but for what 200 families can show (.05 + 2 standard errors)."""
    rng, alarms = np.random.default_rng(5), 0
    draw = {
        "normal": lambda: rng.normal(size=(n, 30)),
        "skewed": lambda: rng.exponential(size=(n, 30)) - 1,
        "heavy": lambda: rng.standard_t(3, (n, 30)),
    }[kind]
    for seed in range(200):
        rows = draw() + 0.5 * rng.normal(size=(n, 1))
        alarms += simultaneous(rows, seed=seed, draws=199).p.min() <= 0.05
    assert alarms / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_a_shift_of_one_column_is_seen():
    rows = np.random.default_rng(0).normal(size=(40, 500))
    rows[:, 17] += 1.5
    found = simultaneous(rows)
    assert np.flatnonzero(found.p <= 0.05).tolist() == [17]
    assert found.p[17] == pytest.approx(1 / (1 + DRAWS))
    assert found.low[17] > 0
