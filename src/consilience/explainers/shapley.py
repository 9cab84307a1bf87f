"""Superpixels as players: Shapley values by regression and by permutations, Banzhaf
values, and leaving one out.

All play the same game: a coalition of superpixels is there, the rest is filled, and the
model's score is what it earns. They differ in the coalitions over which a superpixel's
contribution is averaged, and so in what they estimate. None needs more of the model
than its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import comb
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.perturb.fidelity import FIDELITY, ask
from consilience.perturb.fills import Fill, MeanFill
from consilience.perturb.probe import Bits, probe
from consilience.perturb.quickshift import Quickshift
from consilience.perturb.superpixels import Segmenter, segment
from consilience.registry import explainers, option
from consilience.types import (
    Array,
    ConsilienceError,
    Fidelity,
    Heat,
    Model,
    Target,
    View,
)

# ---- the game


@dataclass(frozen=True, eq=False)
class Coalitions:
    """``count`` coalitions whose members are only worked out when it is their turn:
    ``rows(start, stop)`` is (b, S) bool.
    """

    segments: Array
    count: int
    rows: Callable[[int, int], Array]

    def __len__(self) -> int:
        return self.count

    def chunks(self, image: Tensor, fill: Tensor, size: int) -> Iterator[Tensor]:
        """Edited images (b, 3, h, w), at most ``size`` at a time."""
        for start in range(0, self.count, size):
            yield from Bits(
                self.segments, self.rows(start, min(start + size, self.count))
            ).chunks(image, fill, size)


@dataclass(frozen=True, eq=False)
class Game:
    """The superpixels of one image as players: a coalition earns the score of the image
    with the others filled.
    """

    model: Model
    view: View
    target: Target
    segments: Array
    fill: Tensor
    label: str

    @staticmethod
    def of(
        model: Model,
        view: View,
        target: Target,
        segmenter: Segmenter,
        fill: Fill,
        label: str,
    ) -> Game:
        """The game on an image, cut and filled."""
        segments = segment(segmenter, view.rgb)
        return Game(model, view, target, segments, fill.image(view, segments), label)

    @property
    def players(self) -> int:
        """How many superpixels there are."""
        return int(self.segments.max()) + 1

    def play_drawn(
        self, drawn: DrawnCoalitions, fidelity: Fidelity, seed: int
    ) -> Played:
        """Score nothing, all, and coalitions drawn in pairs, most of them by a cheaper
        network where ``fidelity`` says so.
        """
        on = np.concatenate(
            [np.repeat([[False], [True]], self.players, axis=1), drawn.on]
        )

        def score(model: Model, rows: Array) -> Array:
            bits = Bits(self.segments, on[rows])
            given = self.view, bits, self.target, self.fill, self.label
            return probe(model, *given).double().numpy()

        asked = ask(fidelity, self.model, score, on, _pairs(drawn.groups) + 2, seed)
        none, whole = asked.scores[:2]
        return Played(
            self.segments, float(none), float(whole), asked.scores[2:], asked.facts
        )

    def play(self, count: int, rows: Callable[[int, int], Array]) -> Played:
        """Score nothing, all, and ``count`` coalitions; ``rows(start, stop)`` are the
        members of some of them, (b, S) bool.
        """
        ends = np.repeat([[False], [True]], self.players, axis=1)

        def both(start: int, stop: int) -> Array:
            return np.concatenate(
                [ends[start:stop], rows(max(start - 2, 0), max(stop - 2, 0))]
            )

        coalitions = Coalitions(self.segments, count + 2, both)
        scores = (
            probe(
                self.model, self.view, coalitions, self.target, self.fill, self.label
            )
            .double()
            .numpy()
        )
        return Played(self.segments, float(scores[0]), float(scores[1]), scores[2:])


@dataclass(frozen=True, eq=False)
class Played:
    """What coalitions earned: ``values`` (n,) float64, and beside them nothing and all."""

    segments: Array
    none: float
    all: float
    values: Array
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """What all earn beyond nothing."""
        return self.all - self.none

    def heat(self, weights: Array, stderr: Array | None, **facts: Any) -> Heat:
        """Weights painted on their superpixels; ``facts`` that are None are left out."""
        extras = {
            "segments": self.segments,
            "weights": weights,
            "none": np.array(self.none),
            "all": np.array(self.all),
        }
        if stderr is not None:
            extras["stderr"] = stderr
        known = {name: value for name, value in facts.items() if value is not None}
        made = {"passes": len(self.values) + 2, "superpixels": len(weights)}
        made |= {**known, **self.facts}
        return Heat(torch.from_numpy(weights[self.segments]).float(), extras, made)


def every(players: int) -> Array:
    """All 2^S coalitions, (2^S, S) bool: row r holds the players whose bit is set in r."""
    numbers = np.arange(2**players)[:, None]
    bits: Array = np.bitwise_and(numbers >> np.arange(players), 1).astype(bool)
    return bits


def enumerable(players: int, passes: int) -> bool:
    """Whether every coalition can be shown within ``passes``."""
    return players < 63 and 2**players <= passes


# ---- regression


@dataclass(frozen=True, eq=False)
class ShapleyFit:
    """Least-squares coefficients (S,) and their standard errors; NaN where the rows are
    too few for them, and ``undecided`` where they cannot tell the coefficients apart.
    """

    coefficients: Array
    stderr: Array
    undecided: bool = False

    def notes(self, rows: str) -> list[str] | None:
        """What must be said of a fit to so many ``rows``."""
        players = len(self.coefficients)
        if self.undecided:
            return [
                f"{rows} cannot tell {players} superpixels apart: the values of least size "
                f"are shown"
            ]
        if np.isnan(self.stderr).any():
            return [f"{rows} are too few to say how sure the values are"]
        return None


def fitted(
    design: Array, values: Array, weights: Array, groups: Array, rank: int
) -> ShapleyFit:
    """Weighted least squares of ``values`` (n,) on ``design`` (n, S), of least norm
    where the rows leave a choice.

    ``groups`` (n,) numbers rows that were drawn together, as many in each; -1 is a row
    that was not drawn but must be there. The standard errors are those of the draw
    alone, from what leaving out each group does to the coefficients (HC3 by groups:
    MacKinnon & White 1985; exactly, from the hat matrix); without its ``(I - H)^-1`` a
    small draw explains itself, and intervals are too narrow. ``rank`` is how many
    coefficients there are to find; NaN where a group alone decides one of them.
    """
    root = np.sqrt(weights)[:, None]
    weighed, aims = design * root, values * root[:, 0]
    found, _, reached, _ = np.linalg.lstsq(weighed, aims, rcond=None)
    drawn = np.flatnonzero(groups >= 0)
    unknown = np.full(design.shape[1], np.nan)
    if not len(drawn):
        return ShapleyFit(found, np.zeros(design.shape[1]))
    count = int(groups.max()) + 1
    fixed = len(design) - len(drawn)
    few = count < 2 or count + fixed / 2 < LEAST_PAIRS_EACH * rank
    if reached < rank or few:
        return ShapleyFit(found, unknown, reached < rank)
    together = drawn[np.argsort(groups[drawn], kind="stable")].reshape(count, -1)
    bread = np.linalg.pinv(weighed.T @ weighed)
    rows = weighed[together]
    open_share = np.eye(rows.shape[1]) - rows @ bread @ rows.transpose(0, 2, 1)
    if np.linalg.eigvalsh(open_share).min() < DECIDES_ALONE:
        return ShapleyFit(found, unknown)
    residual = (aims - weighed @ found)[together]
    left_out = np.linalg.solve(open_share, residual[..., None])
    shifts = (rows * left_out).sum(axis=1) @ bread
    shifts -= shifts.mean(axis=0)
    return ShapleyFit(found, np.sqrt((shifts**2).sum(axis=0) * count / (count - 1)))


LEAST_PAIRS_EACH = 1.5
"""Pairs a coefficient below which there are no standard errors: where one has barely
more than one, intervals cover .83 and less (docs/perturbation.md)."""

DECIDES_ALONE = 1e-6
"""What a group leaves open of its own values: below it the fit goes through them."""


# ---- Shapley values by regression


@dataclass(frozen=True, eq=False)
class DrawnCoalitions:
    """Coalitions (n, S) bool with their ``weights`` in the regression, and ``groups``
    as `fitted` takes them.
    """

    on: Array
    weights: Array
    groups: Array


def kernel_mass(players: int) -> Array:
    """Share of Shapley's kernel that falls on coalitions of 1 .. S-1 players:
    proportional to 1 / (k (S - k)).
    """
    sizes = np.arange(1, players)
    mass = 1.0 / (sizes * (players - sizes))
    share: Array = mass / mass.sum()
    return share


def whole_sizes(players: int, budget: int) -> int:
    """How many sizes from either end can be shown in full, each within its share of
    what is left of the budget.
    """
    mass, left, taken = kernel_mass(players), float(budget), 0
    while 2 * (taken + 1) <= players:
        size = taken + 1
        both = 1 if 2 * size == players else 2
        share = both * mass[taken] / mass[taken : players - 1 - taken].sum()
        if left * share < both * comb(players, size) - 1e-9:
            return taken
        left, taken = left - both * comb(players, size), size
    return taken


def of_size(players: int, size: int) -> Array:
    """All coalitions of ``size`` players, (C(S, size), S) bool."""
    from itertools import combinations

    members = np.array(list(combinations(range(players), size)))
    on = np.zeros((len(members), players), dtype=bool)
    np.put_along_axis(on, members, True, axis=1)
    return on


def shapley_draws(players: int, budget: int, seed: int) -> DrawnCoalitions:
    """Coalitions for the regression: whole sizes from both ends as far as they fit, the
    rest drawn with its complements.

    The drawn sizes are spread evenly over what is left of the kernel (a systematic
    sample), members of a size at random.
    """
    if enumerable(players, budget + 2):
        on = every(players)[1:-1]
        size = on.sum(axis=1)
        share = kernel_mass(players)[size - 1] / [
            comb(players, int(one)) for one in size
        ]
        return DrawnCoalitions(on, share, np.full(len(on), -1))
    taken = whole_sizes(players, budget)
    mass = kernel_mass(players)
    blocks = [
        of_size(players, size)
        for end in range(1, taken + 1)
        for size in (end, players - end)
    ]
    on = np.concatenate([np.empty((0, players), dtype=bool), *blocks])
    weights = np.concatenate(
        [
            np.empty(0),
            *(
                np.full(len(block), mass[block[0].sum() - 1] / len(block))
                for block in blocks
            ),
        ]
    )
    pairs = (budget - len(on)) // 2
    some = _of_sizes(
        _sizes(mass[taken : players - 1 - taken], pairs, seed) + taken + 1,
        players,
        seed,
    )
    share = mass[taken : players - 1 - taken].sum() / max(2 * pairs, 1)
    return DrawnCoalitions(
        np.concatenate([on, np.stack([some, ~some], axis=1).reshape(-1, players)]),
        np.concatenate([weights, np.full(2 * pairs, share)]),
        np.concatenate([np.full(len(on), -1), np.repeat(np.arange(pairs), 2)]),
    )


def _sizes(mass: Array, count: int, seed: int) -> Array:
    """``count`` indices into ``mass``, proportional to it: evenly spaced quantiles from
    a random start.
    """
    start = np.random.default_rng([seed, 0]).random()
    at = (np.arange(count) + start) / max(count, 1)
    return np.minimum(
        np.searchsorted(np.cumsum(mass) / mass.sum(), at, side="right"), len(mass) - 1
    )


def _of_sizes(sizes: Array, players: int, seed: int) -> Array:
    """Random coalitions (n, S) of the given sizes."""
    numbers = np.random.default_rng([seed, 1]).random((len(sizes), players))
    ranks: Array = numbers.argsort(axis=1).argsort(axis=1)
    return ranks < sizes[:, None]


@explainers.register("kernelshap")
@dataclass(frozen=True)
class KernelShap:
    """Kernel SHAP (Lundberg & Lee, NeurIPS 2017, theorem 2) on superpixels: Shapley
    values by weighted linear regression.

    A coalition z of k of S superpixels weighs ``(S - 1) / (C(S, k) k (S - k))``, and
    the values are the least-squares fit that sums to f(all) - f(none), exactly,
    whatever the draw. With 2^S at most ``samples`` every coalition is shown, and the
    values are the Shapley values. Else the sizes next to none and all are shown in full
    where they fit, and the rest is drawn in complementary pairs.

    This is no LIME: LIME's kernel favours coalitions near the whole image and its
    weights are the slopes of a local surrogate; a Shapley value shares the difference
    to the filled image among the superpixels, averaged over all orders in which they
    come. Superpixels that are off are filled, so the game is the one against that
    baseline.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Kernel SHAP"
    samples: int = option(
        1000,
        help="edited images shown to the model at most, nothing and all of it included",
        least=4,
    )
    segments: Segmenter = option(
        Quickshift(), kind="segmenter", help="how superpixels are cut"
    )
    fill: Fill = option(
        MeanFill(), kind="fill", help="what stands where a superpixel is off"
    )
    seed: int = option(0, help="seed of the coalitions", least=0)
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is shared out"
    )
    fidelity: Fidelity = option("exact", help=FIDELITY)

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The values painted on the superpixels, (h, w) float32 in units of the score.

        Extras: ``segments`` (h, w), ``weights`` and ``stderr`` (S,), 0-d ``none`` and
        ``all``. ``stderr`` is that of the draw: 0 where every coalition was shown, NaN
        where there are too few to tell the superpixels apart.
        """
        game = Game.of(model, view, target, self.segments, self.fill, self.label)
        players = game.players
        drawn = shapley_draws(players, self.samples - 2, self.seed)
        played = game.play_drawn(drawn, self.fidelity, self.seed)
        found = efficient(drawn, played.values - played.none, played.gain)
        notes = found.notes(f"{len(drawn.on)} coalitions")
        exact = bool((drawn.groups < 0).all()) and len(drawn.on) == 2**players - 2
        made = {"seed": self.seed, "exact": exact, "notes": notes}
        return played.heat(found.coefficients, found.stderr, **made)


def _pairs(groups: Array) -> Array:
    """Rows (G, 2) of each pair that was drawn."""
    drawn = np.flatnonzero(groups >= 0)
    return drawn[np.argsort(groups[drawn], kind="stable")].reshape(-1, 2)


def efficient(drawn: DrawnCoalitions, values: Array, gain: float) -> ShapleyFit:
    """Weighted least squares under the constraint that the coefficients sum to
    ``gain``.

    Every coefficient is its equal share of the gain and a departure; departures sum to
    0, for they lie in the row space of a design whose rows do.
    """
    on = drawn.on.astype(np.float64)
    share = on.mean(axis=1)
    players = on.shape[1]
    departures = fitted(
        on - share[:, None],
        values - share * gain,
        drawn.weights,
        drawn.groups,
        players - 1,
    )
    found = departures.coefficients - departures.coefficients.mean()
    return replace(departures, coefficients=found + gain / players)


# ---- Shapley values by permutations


@explainers.register("shapley")
@dataclass(frozen=True)
class Shapley:
    """Shapley values of superpixels by sampling orders (Castro, Gómez & Tejada 2009;
    Štrumbelj & Kononenko 2014, algorithm 1).

    ``phi_i`` is the mean over orders of what the score gains when superpixel i comes
    after those before it. Each order is followed by its reverse (antithetic; Mitchell
    et al. 2022). Within each order the gains sum to f(all) - f(none).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Shapley values"
    permutations: int = option(
        32,
        help="orders, every second one the reverse of the one before; each takes S - 1 passes",
        least=2,
    )
    segments: Segmenter = option(
        Quickshift(), kind="segmenter", help="how superpixels are cut"
    )
    fill: Fill = option(
        MeanFill(),
        kind="fill",
        help="what stands where a superpixel has not come yet",
    )
    seed: int = option(
        0, help="seed of the orders; more of them begin with the same ones", least=0
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is shared out"
    )

    def __post_init__(self) -> None:
        if self.permutations % 2:
            raise ConsilienceError(
                f"shapley: permutations come in pairs; got {self.permutations}"
            )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The values painted on the superpixels, (h, w) float32 in units of the score.

        Extras: ``segments`` (h, w), ``weights`` and ``stderr`` (S,), 0-d ``none`` and
        ``all``. ``stderr`` is that of the mean over pairs of orders, NaN below 16 orders.
        """
        game = Game.of(model, view, target, self.segments, self.fill, self.label)
        places = player_orders(game.players, self.permutations, self.seed)
        played = game.play(places.shape[0] * (game.players - 1), steps(places))
        marginals = gains(played, places)
        pairs = marginals.reshape(-1, 2, game.players).mean(axis=1)
        fit = ShapleyFit(marginals.mean(axis=0), moderated_stderr(pairs))
        notes = fit.notes(f"{self.permutations} orders")
        return played.heat(fit.coefficients, fit.stderr, seed=self.seed, notes=notes)


def player_orders(players: int, count: int, seed: int) -> Array:
    """The place (count, S) of each player in each order; every second order is the
    reverse of the one before.
    """
    rng = np.random.default_rng(seed)
    forward = np.array([rng.permutation(players) for _ in range(count // 2)]).reshape(
        -1, players
    )
    return np.stack([forward, players - 1 - forward], axis=1).reshape(-1, players)


def steps(places: Array) -> Callable[[int, int], Array]:
    """The coalitions on the way through orders (n, S), those of 1 to S - 1 players,
    order after order.
    """
    between = max(places.shape[1] - 1, 1)

    def rows(start: int, stop: int) -> Array:
        order, step = np.divmod(np.arange(start, stop), between)
        return places[order] <= step[:, None]

    return rows


def gains(played: Played, places: Array) -> Array:
    """What each player adds in each order, (n, S); ``played`` are the coalitions of
    `steps`.
    """
    count = len(places)
    none, whole = np.full((count, 1), played.none), np.full((count, 1), played.all)
    earned = np.hstack([none, played.values.reshape(count, -1), whole])
    return np.take_along_axis(np.diff(earned, axis=1), places, axis=1)


LEAST_PAIRS = 8
"""Pairs of orders below which Shapley values have no standard error: intervals of four
pairs cover .89 and less (docs/perturbation.md)."""

PRIOR_PAIRS = 4
"""How many pairs the mean variance of all players counts for in each player's own."""


def moderated_stderr(samples: Array) -> Array:
    """Standard error (S,) of the mean over rows (n, S), NaN for fewer than eight.

    A player who decides rarely was seen not to decide at all in a few orders; its own
    variance is then far too small. So each is drawn towards the mean of all, as
    ``((n - 1) s^2 + 4 mean(s^2)) / (n + 3)`` (the moderated variance of Smyth 2004,
    with a fixed prior).
    """
    count = len(samples)
    if count < LEAST_PAIRS:
        return np.full(samples.shape[1], np.nan)
    own = samples.var(axis=0, ddof=1)
    pooled = ((count - 1) * own + PRIOR_PAIRS * own.mean()) / (
        count - 1 + PRIOR_PAIRS
    )
    found: Array = np.sqrt(pooled / count)
    return found


# ---- Banzhaf values


@explainers.register("banzhaf")
@dataclass(frozen=True)
class Banzhaf:
    """Banzhaf values of superpixels (Banzhaf 1965; Wang & Jia, AISTATS 2023): the mean
    gain over all coalitions alike.

    ``beta_i = E f(z | i on) - E f(z | i off)`` for fair coins z. Every draw is shown
    with its complement. ``estimator=msr`` is Wang & Jia's maximum sample reuse: each
    image tells of all superpixels at once, by the difference of two means.
    ``regression`` goes to the same values (the best linear fit under fair coins has
    these slopes; Hammer & Holzman 1992) and is free of what the other superpixels do
    linearly; it needs more pairs than superpixels. Where 2^S + 2 is at most ``samples``
    every coalition is shown, and both are the exact values.

    Unlike Shapley values they do not sum to f(all) - f(none); in exchange their order
    is the surest under noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Banzhaf values"
    samples: int = option(
        1000, help="edited images shown to the model at most", least=4
    )
    segments: Segmenter = option(
        Quickshift(), kind="segmenter", help="how superpixels are cut"
    )
    fill: Fill = option(
        MeanFill(), kind="fill", help="what stands where a superpixel is off"
    )
    estimator: Literal["regression", "msr"] = option(
        "regression", help="slopes of a linear fit, or differences of means"
    )
    seed: int = option(
        0,
        help="seed of the coalitions; more of them begin with the same ones",
        least=0,
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is weighed"
    )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The values painted on the superpixels, (h, w) float32 in units of the score.

        Extras: ``segments`` (h, w), ``weights`` and ``stderr`` (S,), 0-d ``none`` and
        ``all``. ``stderr`` is that of the draw: 0 where every coalition was shown, NaN
        where there are too few to tell.
        """
        game = Game.of(model, view, target, self.segments, self.fill, self.label)
        exact = enumerable(game.players, self.samples - 2)
        on = (
            every(game.players)[: 2 ** (game.players - 1)]
            if exact
            else self._pairs(game.players)
        )
        both = np.stack([on, ~on], axis=1).reshape(-1, game.players)
        played = game.play(len(both), lambda start, stop: both[start:stop])
        swings, signs = played.values[::2] - played.values[1::2], 2.0 * on - 1.0
        found = self._fit(signs, swings, exact)
        return played.heat(
            found.coefficients,
            found.stderr,
            seed=self.seed,
            exact=exact,
            notes=found.notes(f"{len(on)} pairs"),
        )

    def _pairs(self, players: int) -> Array:
        count = (self.samples - 2) // 2
        return np.random.default_rng(self.seed).integers(
            0, 2, (count, players), dtype=np.bool_
        )

    def _fit(self, signs: Array, swings: Array, exact: bool) -> ShapleyFit:
        """Values from what pairs of complements differ by."""
        pairs, players = signs.shape
        if not exact and self.estimator == "regression":
            return fitted(signs, swings, np.ones(pairs), np.arange(pairs), players)
        contributions = signs * swings[:, None]
        values = contributions.mean(axis=0)
        if exact:
            return ShapleyFit(values, np.zeros(players))
        if pairs < LEAST_MSR_PAIRS:
            return ShapleyFit(values, np.full(players, np.nan))
        return ShapleyFit(values, contributions.std(axis=0, ddof=1) / np.sqrt(pairs))


LEAST_MSR_PAIRS = 31
"""Pairs below which differences of means have no standard error (docs/perturbation.md)."""


# ---- one at a time


@explainers.register("ablation")
@dataclass(frozen=True)
class Ablation:
    """Leaving one superpixel out (Robnik-Šikonja & Kononenko 2008; Zeiler & Fergus
    2014): ``f(x) - f(x without i)``.

    The cheapest question, S + 1 passes and no draw. Where two superpixels show the same
    thing, removing either changes nothing: both then look unimportant.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Ablation of superpixels"
    segments: Segmenter = option(
        Quickshift(), kind="segmenter", help="how superpixels are cut"
    )
    fill: Fill = option(
        MeanFill(), kind="fill", help="what stands where the superpixel was"
    )
    score: Literal["logit", "probability"] = option(
        "probability", help="which number of the class is lost"
    )

    def explain(self, model: Model, view: View, target: Target) -> Heat:
        """The losses painted on the superpixels, (h, w) float32 in units of the score.

        Extras: ``segments`` (h, w), ``weights`` (S,), 0-d ``none`` and ``all``.
        """
        game = Game.of(model, view, target, self.segments, self.fill, self.label)
        players = game.players
        played = game.play(
            players,
            lambda start, stop: np.arange(players) != np.arange(start, stop)[:, None],
        )
        return played.heat(played.all - played.values, None)
