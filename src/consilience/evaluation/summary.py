"""From rows of numbers to what may be said: means with intervals, paired tests under
Holm, marks, orders, correlations, curves.

Every metric is summed up for itself. Nothing is averaged over metrics: they have units
of their own, and contradict each other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import pandas as pd

from consilience import registry, stats
from consilience.evaluation.columns import TableColumn
from consilience.types import OF_IMAGE, Array, Metric, Score

SIGNIFICANCE = 0.05
CURVE_POINTS = 51
"""Points at which curves are averaged."""
FIELDS = ("sample", "digest", "column", "metric", "kind", "value", "code", "facts")
ScoreRow = Mapping[str, Any]


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table, which has its columns also where there is no row."""
    return pd.DataFrame(rows, columns=list(FIELDS)).astype({"value": float})


def summarise(
    rows: Sequence[ScoreRow],
    metrics: Mapping[str, Metric],
    columns: Sequence[TableColumn],
    seed: int = 0,
    absent: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything of ``evaluation.json`` that follows from the rows; see `cell`,
    `against_controls`, `between` and `orders`.

    ``absent`` says of metrics why they have no row at all.
    """
    table = as_table(rows)
    wide = {spec: _wide(table, spec, columns) for spec in metrics}
    found: dict[str, list[dict[str, Any]]] = {
        "cells": [],
        "against_controls": [],
        "between": [],
        "orders": [],
    }
    for spec, metric in metrics.items():
        against = against_controls(
            spec, wide[spec], columns, metric.higher_is_better, seed
        )
        marks = {
            column.label: mark(column, against)
            for column in columns
            if column.kind == "method"
        }
        of_metric = table[table["metric"] == spec]
        found["cells"] += [
            {
                **cell(spec, metric, column.label, of_metric, seed),
                **marks.get(column.label, {}),
            }
            for column in columns
        ]
        found["against_controls"] += against
        found["between"] += between(
            spec, wide[spec], columns, metric.higher_is_better, seed
        )
        found["orders"] += rank_orders(
            spec, wide[spec], columns, metric.higher_is_better, seed
        )
    return {
        "metrics": [
            {
                **described(spec, metric),
                "units": len(wide[spec]),
                "absent": (absent or {}).get(spec, ""),
            }
            for spec, metric in metrics.items()
        ],
        "columns": [vars(column) for column in columns],
        "alpha": SIGNIFICANCE,
        **found,
        "correlations": correlations(wide, metrics, columns),
    }


def described(spec: str, metric: Metric) -> dict[str, Any]:
    """What a table says of a metric."""
    cls: Any = type(metric)
    return {
        "spec": spec,
        "full": registry.spell(metric, full=True),
        "label": getattr(metric, "label", cls.spelled),
        "what": registry.summary_of(cls),
        "higher_is_better": bool(metric.higher_is_better),
        "bounds": list(metric.bounds),
        "binary": bool(getattr(metric, "binary", False)),
        "cost": str(getattr(metric, "cost", "")),
        "unit": unit_of(metric),
    }


def unit_of(metric: Metric) -> str:
    """What a metric has one number of: an image, or a mosaic of images.

    It is what is resampled and what signs flip of.
    """
    return str(getattr(metric, "unit", "image"))


def _wide(
    table: pd.DataFrame, spec: str, columns: Sequence[TableColumn]
) -> pd.DataFrame:
    """Values of one metric, a row an image, a column a column; NaN where it does not
    apply.
    """
    part = table[table["metric"] == spec]
    wide = part.pivot(index="sample", columns="column", values="value")
    return wide.reindex(
        index=list(dict.fromkeys(part["sample"])),
        columns=[column.label for column in columns],
    )


# ---- one number of the table


def cell(
    spec: str, metric: Metric, label: str, of_metric: pd.DataFrame, seed: int
) -> dict[str, Any]:
    """Mean and interval over images of one metric and column, and on how many images it
    does not apply, and why.
    """
    mine = of_metric[of_metric["column"] == label]
    values = mine["value"].dropna().to_numpy(float)
    found = interval(values, bool(getattr(metric, "binary", False)), seed)
    lost = mine[mine["value"].isna()]
    reasons = Counter(
        (str(code), _of_any_image(facts))
        for code, facts in zip(lost["code"], lost["facts"], strict=True)
    ).most_common(5)
    return {
        "metric": spec,
        "column": label,
        "n": found.n,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "interval": found.method,
        "not_applicable": int(mine["value"].isna().sum()),
        "reasons": [
            {"code": code, "facts": json.loads(facts), "images": count}
            for (code, facts), count in reasons
        ],
    }


def _of_any_image(facts: str) -> str:
    """Facts of a reason without those that differ from image to image."""
    known = json.loads(facts) if facts else {}
    return json.dumps(
        {key: part for key, part in known.items() if key not in OF_IMAGE}
    )


def interval(values: Array, binary: bool, seed: int = 0) -> stats.Interval:
    """Wilson's interval where outcomes are 0 or 1, else `stats.mean_interval`."""
    if binary and np.isin(values, (0.0, 1.0)).all():
        return stats.wilson(int(values.sum()), values.size)
    return stats.mean_interval(values, seed=seed)


# ---- paired differences


def paired(wide: pd.DataFrame, a: str, b: str, higher_is_better: bool) -> Array:
    """Differences over the images on which both have a value, turned so that above 0
    speaks for ``a``.
    """
    both = wide[[a, b]].dropna().to_numpy(float)
    gaps: Array = (both[:, 0] - both[:, 1]) * (1 if higher_is_better else -1)
    return gaps


def against_controls(
    spec: str,
    wide: pd.DataFrame,
    columns: Sequence[TableColumn],
    higher_is_better: bool,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every method against every control: one-sided `stats.paired_test` over images, one
    Holm family a metric.

    A method's controls are random, centre, edges, constant (and others of the run) and
    its own map of another class.
    """
    pairs = [
        (m.label, c.label)
        for m in columns
        if m.kind == "method"
        for c in controls_of(m, columns)
    ]
    return _tested(
        f"{spec}: methods above controls",
        spec,
        wide,
        pairs,
        higher_is_better,
        "greater",
        seed,
    )


def controls_of(
    method: TableColumn, columns: Sequence[TableColumn]
) -> list[TableColumn]:
    """What a method has to beat."""
    return [
        column
        for column in columns
        if column.kind == "control" or column.of == method.label
    ]


def between(
    spec: str,
    wide: pd.DataFrame,
    columns: Sequence[TableColumn],
    higher_is_better: bool,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Methods against each other: two-sided `stats.paired_test` over images, one Holm
    family a metric.
    """
    pairs = list(
        combinations(
            [column.label for column in columns if column.kind == "method"], 2
        )
    )
    return _tested(
        f"{spec}: methods against each other",
        spec,
        wide,
        pairs,
        higher_is_better,
        "two-sided",
        seed,
    )


def _tested(
    family: str,
    spec: str,
    wide: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    higher_is_better: bool,
    alternative: stats.Alternative,
    seed: int,
) -> list[dict[str, Any]]:
    gaps = [paired(wide, *pair, higher_is_better) for pair in pairs]
    p = {
        str(i): stats.paired_test(x, seed, alternative) if x.size else math.nan
        for i, x in enumerate(gaps)
    }
    adjusted = stats.holm_family(family, p)
    rows = []
    for number, ((a, b), x) in enumerate(zip(pairs, gaps, strict=True)):
        found = stats.mean_interval(x, seed=seed)
        smallest = (
            stats.smallest_paired_p(x.size, alternative) * adjusted.size
            if x.size
            else math.nan
        )
        rows.append(
            {
                "metric": spec,
                "a": a,
                "b": b,
                "n": x.size,
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "d_z": stats.effect_size(x),
                "p": p[str(number)],
                "p_holm": adjusted.adjusted[str(number)],
                "family": family,
                "tests": adjusted.size,
                "smallest_p": min(1.0, smallest),
            }
        )
    return rows


def mark(method: TableColumn, against: Sequence[ScoreRow]) -> dict[str, Any]:
    """Whether a method is above every control: ``above`` True, False, or None where
    that could not be asked of all; and the controls.

    ``not_above`` are controls whose Holm-corrected p is above .05, ``untested`` those
    that share no image with a value. ``reachable`` is False where so few images could
    not have shown it, whatever the numbers.
    """
    mine = [row for row in against if row["a"] == method.label]
    tested = [row for row in mine if not math.isnan(row["p"])]
    untested = [row["b"] for row in mine if math.isnan(row["p"])]
    below = [row["b"] for row in tested if not row["p_holm"] <= SIGNIFICANCE]
    return {
        "above": False if below else None if untested or not tested else True,
        "not_above": below,
        "untested": untested,
        "reachable": all(row["smallest_p"] <= SIGNIFICANCE for row in tested),
    }


# ---- orders of methods, agreement of metrics


def rank_orders(
    spec: str,
    wide: pd.DataFrame,
    columns: Sequence[TableColumn],
    higher_is_better: bool,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mean ranks, their stability and the critical difference: over methods and
    controls that have values, on shared images.

    Maps of another class are left out: they rank with their methods, not with the
    field. Nothing where fewer than two columns share two images.
    """
    labels = [
        column.label
        for column in columns
        if column.kind != "other" and wide[column.label].notna().any()
    ]
    whole = wide[labels].dropna()
    if len(labels) < 2 or len(whole) < 2:
        return []
    values = whole.to_numpy(float)
    stable = stats.rank_stability(values, higher_is_better, seed)
    critical = stats.critical_difference(values, higher_is_better)
    return [
        {
            "metric": spec,
            "columns": labels,
            "n": len(whole),
            "rank_by_mean": stable.mean_rank.tolist(),
            "rank_low": stable.low.tolist(),
            "rank_high": stable.high.tolist(),
            "kept": stable.kept.tolist(),
            "resamples": stable.resamples,
            "mean_ranks": critical.mean_ranks.tolist(),
            "critical_difference": critical.difference,
            "groups": [list(group) for group in critical.groups],
            "friedman_chi2": critical.chi2,
            "friedman_p": critical.p,
        }
    ]


def correlations(
    wide: Mapping[str, pd.DataFrame],
    metrics: Mapping[str, Metric],
    columns: Sequence[TableColumn],
) -> list[dict[str, Any]]:
    """Spearman of every two metrics over images within each method, turned so that
    above 0 is agreement on what is good.
    """
    methods = [column.label for column in columns if column.kind == "method"]
    of_images = {
        spec: metric for spec, metric in metrics.items() if unit_of(metric) == "image"
    }
    turned = {
        spec: _turned(wide[spec], methods, metric.higher_is_better)
        for spec, metric in of_images.items()
    }
    found = []
    for a, b in combinations(of_images, 2):
        correlation = stats.metric_correlation(
            *(one.to_numpy(float) for one in turned[a].align(turned[b], join="inner"))
        )
        within = dict(zip(methods, correlation.within.tolist(), strict=True))
        found.append({"a": a, "b": b, "mean": correlation.mean, "within": within})
    return found


def _turned(
    wide: pd.DataFrame, methods: Sequence[str], higher_is_better: bool
) -> pd.DataFrame:
    return wide[list(methods)] * (1 if higher_is_better else -1)


# ---- curves


class KeptScores(Protocol):
    """The kept numbers of one image."""

    def get(self, metric: str, column: str) -> Any:
        """A number with its ``value`` and ``curve`` under a metric's full spelling and
        a column; None where there is none.
        """


def mean_curves(
    images: Iterable[KeptScores],
    metrics: Mapping[str, Metric],
    columns: Sequence[TableColumn],
) -> dict[str, list[dict[str, Any]]]:
    """Mean curves (with Student's t bands at every point) of metrics that have them,
    read image by image; and what a metric gathers over a data set, where it does
    (one threshold for all images).
    """
    specs = {
        spec: registry.spell(metric, full=True) for spec, metric in metrics.items()
    }
    sums = {(spec, column.label): _Band() for spec in metrics for column in columns}
    scores: dict[tuple[str, str], list[Score]] = {}
    gathering = {
        spec for spec, metric in metrics.items() if hasattr(metric, "gather")
    }
    for image in images:
        for (spec, label), band in sums.items():
            kept = image.get(specs[spec], label)
            if kept is None or kept.value is None or kept.curve is None:
                continue
            if spec in gathering:
                scores.setdefault((spec, label), []).append(
                    Score(kept.value, kept.curve)
                )
            elif kept.curve.ndim == 2 and len(kept.curve) == 2:
                band.add(kept.curve)
    return {
        "curves": list(_bands(sums)),
        "gathered": [
            _gathered(metrics[key[0]], key, some) for key, some in scores.items()
        ],
    }


class _Band:
    """Running mean and variance of curves on one grid (Welford 1962)."""

    def __init__(self) -> None:
        self.n, self.low, self.high = 0, math.inf, -math.inf
        self.mean, self.m2 = np.zeros(CURVE_POINTS), np.zeros(CURVE_POINTS)

    def add(self, curve: Array) -> None:
        """One more curve (2, n), x rising; those of other ends than the first are
        scaled to them.
        """
        x = (curve[0] - curve[0, 0]) / max(float(curve[0, -1] - curve[0, 0]), 1e-12)
        values = np.interp(np.linspace(0, 1, CURVE_POINTS), x, curve[1])
        self.low, self.high = (
            min(self.low, float(curve[0, 0])),
            max(self.high, float(curve[0, -1])),
        )
        self.n += 1
        step = values - self.mean
        self.mean += step / self.n
        self.m2 += step * (values - self.mean)

    def half(self) -> Array:
        """Half of the 95 % band (GRID,), NaN for one curve."""
        if self.n < 2:
            return np.full(CURVE_POINTS, math.nan)
        from scipy.stats import t

        width: Array = t.ppf(0.975, self.n - 1) * np.sqrt(
            self.m2 / (self.n - 1) / self.n
        )
        return width


def _bands(sums: Mapping[tuple[str, str], _Band]) -> Iterator[dict[str, Any]]:
    for (spec, label), band in sums.items():
        if band.n:
            x = np.linspace(band.low, band.high, CURVE_POINTS)
            rounded = {"x": x, "mean": band.mean, "half": band.half()}
            lists = {
                key: np.round(values, 6).tolist() for key, values in rounded.items()
            }
            yield {"metric": spec, "column": label, "n": band.n, **lists}


def _gathered(
    metric: Any, key: tuple[str, str], scores: Sequence[Score]
) -> dict[str, Any]:
    found = metric.gather(scores)
    return {
        "metric": key[0],
        "column": key[1],
        "value": found.value,
        "facts": dict(found.facts),
    }
