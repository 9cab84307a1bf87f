"""Which explainers to use for a network: what an evaluation shows of each against the
controls and against each other, kind of evidence by kind, and what they cost.

Kinds of evidence are never added up. A method is *beaten* where another is shown to be
better on some kind and is not shown to be worse on any; those that nothing beats are
left, the cheapest first. All comparisons, over pairs and kinds, are one Holm family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from consilience import stats
from consilience.evaluation.summary import SIGNIFICANCE

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """What one explanation takes: passes of the network (None where methods do not say) and
    the median of its seconds on this machine.
    """

    passes: float
    seconds: float


@dataclass(frozen=True)
class Standing:
    """One method: its numbers by metric (cells of an evaluation), on which metrics it is
    shown above every control, what it costs, and which methods beat it, on what.
    """

    label: str
    spec: str
    cost: Cost
    cells: Mapping[str, Cell]
    above: tuple[str, ...] = ()
    beaten_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """Two methods on one metric: the mean difference over ``n`` units, turned so that
    above 0 speaks for ``a``, its own 95 % interval, p under Holm over all contests, and
    which is ``better`` (empty: no difference was shown).
    """

    metric: str
    a: str
    b: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    better: str


@dataclass(frozen=True)
class Recommendation:
    """What may be said of methods on one network.

    ``left`` are the methods that nothing beats and that are above every control on some
    metric, the cheapest first; ``unproven`` those that nothing beats either, without
    that. ``metrics`` are those of the evaluation (``summary.described``), with why
    there is no number where there is none; ``refused`` says of methods that do not work
    on this network why. ``out_of_reach`` are metrics of so few units that no difference
    could have been shown over so many comparisons.
    """

    standings: tuple[Standing, ...]
    contests: tuple[Contest, ...]
    left: tuple[str, ...]
    unproven: tuple[str, ...]
    metrics: tuple[Mapping[str, Any], ...]
    refused: Mapping[str, str]
    out_of_reach: tuple[str, ...]

    @property
    def reachable(self) -> bool:
        """Whether a difference could have been shown on any metric."""
        return {one.metric for one in self.contests} > set(self.out_of_reach)

    def table(self) -> pd.DataFrame:
        """A row a method: means by metric with their bounds, cost, on how many metrics
        it is above the controls, and whether it is left.
        """
        rows = []
        for one in self.standings:
            row: dict[str, Any] = {"method": one.label, "spec": one.spec}
            for metric in self.metrics:
                spec = str(metric["spec"])
                cell = one.cells.get(spec, {})
                for key, name in (
                    ("mean", spec),
                    ("low", f"{spec} low"),
                    ("high", f"{spec} high"),
                ):
                    value = cell.get(key)
                    row[name] = math.nan if value is None else float(value)
            row |= {
                "passes": one.cost.passes,
                "seconds": one.cost.seconds,
                "above_controls": len(one.above),
                "beaten_by": ", ".join(one.beaten_by),
                "left": one.label in self.left,
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def undecided(self) -> tuple[tuple[str, str], ...]:
        """Pairs of methods that are left between which no difference was shown on any
        metric.
        """
        told = {
            (one.a, one.b)
            for one in self.contests
            if one.better and {one.a, one.b} <= set(self.left)
        }
        pairs = dict.fromkeys(
            (one.a, one.b)
            for one in self.contests
            if {one.a, one.b} <= set(self.left)
        )
        return tuple(pair for pair in pairs if pair not in told)


def recommendation(
    evaluation: Mapping[str, Any],
    costs: Mapping[str, Cost],
    refused: Mapping[str, str] | None = None,
) -> Recommendation:
    """What an evaluation's summary (`summary.summarise`) says of its methods.

    ``costs`` are by label; methods without a cost (another model's, none) come last.
    """
    columns = [one for one in evaluation["columns"] if one["kind"] == "method"]
    contests = _contests(evaluation["between"])
    labels = [str(one["label"]) for one in columns]
    beaten = {label: _beaten(label, labels, contests) for label in labels}
    unknown = Cost(math.nan, math.nan)
    bounds = {one["spec"]: one["bounds"] for one in evaluation["metrics"]}
    standings = [
        Standing(
            str(one["label"]),
            str(one["spec"]),
            costs.get(one["label"], unknown),
            _cells(evaluation["cells"], one["label"], bounds),
            _above(evaluation["cells"], one["label"]),
            beaten[str(one["label"])],
        )
        for one in columns
    ]
    standings.sort(key=_by_cost)
    free = [one for one in standings if not one.beaten_by]
    return Recommendation(
        tuple(standings),
        contests,
        tuple(one.label for one in free if one.above),
        tuple(one.label for one in free if not one.above),
        tuple(evaluation["metrics"]),
        dict(refused or {}),
        _out_of_reach(contests),
    )


def _by_cost(one: Standing) -> tuple[float, str]:
    seconds = one.cost.seconds
    return (math.inf if math.isnan(seconds) else seconds, one.label)


def _cells(
    cells: Sequence[Cell], label: str, bounds: Mapping[str, Sequence[Any]]
) -> dict[str, Cell]:
    """A method's numbers by metric, the ends of their intervals within the metric's
    bounds.
    """
    found: dict[str, Cell] = {}
    for one in cells:
        if one["column"] != label:
            continue
        ends = {}
        for end, choose, bound in zip(
            ("low", "high"), (max, min), bounds[one["metric"]], strict=True
        ):
            known = [value for value in (one[end], bound) if value is not None]
            ends[end] = choose(known) if one[end] is not None else None
        found[str(one["metric"])] = {**one, **ends}
    return found


def _above(cells: Sequence[Cell], label: str) -> tuple[str, ...]:
    return tuple(
        str(one["metric"])
        for one in cells
        if one["column"] == label and one.get("above") is True
    )


def _contests(between: Sequence[Cell]) -> tuple[Contest, ...]:
    """All pairs on all metrics with at least one unit, under one Holm family."""
    asked = [one for one in between if one["n"]]
    family = stats.holm_family(
        "methods against each other, over metrics",
        {str(at): float(one["p"]) for at, one in enumerate(asked)},
    )
    return tuple(
        _contest(one, family.adjusted[str(at)]) for at, one in enumerate(asked)
    )


def _contest(one: Cell, p_holm: float) -> Contest:
    shown = p_holm <= SIGNIFICANCE
    better = (one["a"] if one["mean"] > 0 else one["b"]) if shown else ""
    return Contest(
        str(one["metric"]),
        str(one["a"]),
        str(one["b"]),
        int(one["n"]),
        float(one["mean"]),
        *_bounds(one),
        float(one["p"]),
        p_holm,
        str(better),
    )


def _bounds(one: Cell) -> tuple[float, float]:
    """Ends of an interval: NaN where a single unit has none."""
    low, high = (
        math.nan if one[end] is None else float(one[end]) for end in ("low", "high")
    )
    return low, high


def _beaten(
    label: str, labels: Sequence[str], contests: Sequence[Contest]
) -> dict[str, tuple[str, ...]]:
    """Who beats a method, and on which metrics."""
    found = {}
    for other in labels:
        mine = [one for one in contests if {one.a, one.b} == {label, other}]
        won = tuple(one.metric for one in mine if one.better == other)
        if won and not any(one.better == label for one in mine):
            found[other] = won
    return found


def _out_of_reach(contests: Sequence[Contest]) -> tuple[str, ...]:
    """Metrics on which the smallest p that there is, over as many tests, is not enough."""
    units: dict[str, int] = {}
    for one in contests:
        units[one.metric] = max(units.get(one.metric, 0), one.n)
    return tuple(
        metric
        for metric, n in units.items()
        if stats.smallest_paired_p(n) * len(contests) > SIGNIFICANCE
    )
