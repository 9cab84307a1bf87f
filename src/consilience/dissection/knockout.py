"""Proof by intervention: what classes lose when a unit is knocked out.

A unit is set to zero everywhere in an image and the rest of the network runs on
(`Tail.without`). All numbers are paired: the same image with and without the unit. If a
unit that detects dogs matters to the network as a detector of dogs, knocking it out
must cost the dog classes more than all others; that contrast is tested over images.

Memory: 17 bytes a unit and image (three numbers), 16 bytes a unit and class (running
sums).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy
from torch import Tensor

from consilience import progress, stats
from consilience.dissection.class_groups import Groups, Match, match
from consilience.types import (
    Array,
    ConsilienceError,
    Network,
    Sample,
    ViewMode,
    as_probabilities,
)

LEVEL = 0.95
LOGIT_ROUNDING = 2e-6
"""A contrast this small beside the outputs is what float32 leaves of nothing; it must
not pass for a consistent sign.
"""


@dataclass(frozen=True, eq=False)
class Knockout:
    """What was measured of ``units`` (U,) of one layer over ``images`` (N,), classes
    (K,).

    ``predicted`` and ``labels`` (N,) are classes (a label is -1 where unknown);
    ``lost`` (N, U) is the loss of the predicted class (probability, or the raw output
    where there are none), ``flipped`` (N, U) whether the prediction changed,
    ``correct`` (N, U) whether it was right without the unit, ``contrast`` (N, U) the
    mean loss of the unit's own classes minus that of all others, in raw outputs, NaN
    where the unit's concept has no classes. ``means`` and ``deviations`` (U, K) are
    mean and standard deviation of every class's loss over the images.
    """

    layer: str
    units: Array
    concepts: tuple[str, ...]
    matches: tuple[Match, ...]
    classes: tuple[str, ...]
    images: tuple[str, ...]
    outputs: str
    predicted: Array
    labels: Array
    active: Array
    lost: Array
    flipped: Array
    correct: Array
    contrast: Array
    means: Array
    deviations: Array

    def table(self) -> pd.DataFrame:
        """A row a unit, by the mean loss of the predicted class, the largest first.

        ``lost`` with its 95 % interval, ``flips`` (share of images whose prediction
        changes, Wilson), ``active`` (share of images in which the unit is not zero
        already); for units whose concept has classes ``contrast`` with its interval, p
        (sign flips over images, one-sided: its classes lose more than others) and
        ``p_holm`` over all such units, ``contrast_rank`` (1: no other of these units
        costs those classes more) and ``matched``; ``own_accuracy_lost`` over images
        labelled with them.
        """
        with progress.task("testing units", len(self.units)) as running:
            rows = []
            for place in range(len(self.units)):
                rows.append({**self._loss(place), **self._contrasted(place)})
                running.advance()
        table = pd.DataFrame(rows)
        table["p_holm"] = stats.holm(table["p"].to_numpy(float)) if len(table) else []
        return table.sort_values(
            "lost", ascending=False, kind="stable", ignore_index=True
        )

    def _loss(self, place: int) -> dict[str, Any]:
        lost = stats.mean_interval(self.lost[:, place])
        flips = stats.wilson(int(self.flipped[:, place].sum()), len(self.flipped))
        return {
            "layer": self.layer,
            "unit": int(self.units[place]),
            "concept": self.concepts[place],
            "lost": lost.mean,
            "lost_low": lost.low,
            "lost_high": lost.high,
            "flips": flips.mean,
            "flips_low": flips.low,
            "flips_high": flips.high,
            "active": float(self.active[:, place].mean()),
            "n": lost.n,
        }

    def _contrasted(self, place: int) -> dict[str, Any]:
        found = self.matches[place]
        said = {
            "classes": len(found.classes),
            "matched": found.said(self.classes),
            "how": found.how,
        }
        if not found.classes:
            nothing = (
                "contrast",
                "contrast_low",
                "contrast_high",
                "p",
                "contrast_rank",
                "own_accuracy_lost",
                "own_images",
            )
            return {**dict.fromkeys(nothing, math.nan), **said}
        values = self.contrast[:, place]
        mean = stats.mean_interval(values)
        own = np.isin(self.labels, found.classes)
        right = self.predicted[own] == self.labels[own]
        accuracy = (
            float(right.mean() - self.correct[own, place].mean())
            if own.any()
            else math.nan
        )
        return {
            "contrast": mean.mean,
            "contrast_low": mean.low,
            "contrast_high": mean.high,
            "p": stats.paired_test(values, alternative="greater"),
            "contrast_rank": self._rank(place, found.classes),
            "own_accuracy_lost": accuracy,
            "own_images": int(own.sum()),
            **said,
        }

    def _rank(self, place: int, classes: tuple[int, ...]) -> int:
        """How many of the units cost these classes (less all others) more than this
        one, plus one.
        """
        costs = _contrast(self.means, classes)
        return int((costs > costs[place]).sum()) + 1

    def hurt(self, unit: int, most: int = 5) -> pd.DataFrame:
        """The classes that lose most without ``unit``: ``class_index``, ``class``,
        ``lost`` and its interval, in raw outputs.

        The interval holds for all classes at once (Student's t with Bonferroni's
        correction over the classes): the largest of many must not look sure because it
        was looked for.
        """
        place = self._place(unit)
        means, count = self.means[place], len(self.images)
        order = np.argsort(-means, kind="stable")[:most]
        half = np.full(len(order), math.nan)
        if count > 1:
            quantile = scipy.stats.t.ppf(
                1 - (1 - LEVEL) / (2 * len(means)), count - 1
            )
            half = quantile * self.deviations[place][order] / math.sqrt(count)
        names = [self.classes[index] for index in order]
        low, high = means[order] - half, means[order] + half
        return pd.DataFrame(
            {
                "class_index": order,
                "class": names,
                "lost": means[order],
                "lost_low": low,
                "lost_high": high,
            }
        )

    def _place(self, unit: int) -> int:
        places = np.flatnonzero(self.units == unit)
        if not len(places):
            raise ConsilienceError(
                f"unit {unit} of {self.layer!r} was not knocked out; {len(self.units)} others "
                f"were"
            )
        return int(places[0])


def knockout_verdict(row: Mapping[Any, Any]) -> str:
    """What a unit's contrast shows, as a code; ``row`` is of `Knockout.table`."""
    if not row["classes"]:
        return "no-classes"
    if row["p_holm"] <= 1 - LEVEL:
        return "costs-more"
    return "costs-less" if row["contrast_high"] < 0 else "not-shown"


# ---- the measurement


def knock_out(
    model: Network,
    layer: str,
    units: Sequence[int],
    samples: Sequence[Sample],
    concepts: Sequence[str] | None = None,
    groups: Groups | None = None,
    view: ViewMode | None = None,
) -> Knockout:
    """Knock each of ``units`` out of each of ``samples``, alone.

    ``concepts`` are what the units detect ("" for none), ``groups`` classes by concept
    where names do not tell (`names.read_groups`). Raises `ConsilienceError`.
    """
    if not len(units) or not len(samples):
        raise ConsilienceError(
            f"a knock-out needs units and images; got {len(units)} units and {len(samples)} "
            f"images"
        )
    if len(set(units)) < len(units):
        raise ConsilienceError("a unit is asked for twice")
    named = tuple(concepts) if concepts is not None else ("",) * len(units)
    if len(named) != len(units):
        raise ConsilienceError(f"{len(named)} concepts for {len(units)} units")
    matches = tuple(
        match(concept, model.classes, groups) if concept else Match("", (), "none")
        for concept in named
    )
    found = _Tally(len(units), len(model.classes), matches)
    names = []
    with progress.task("knocking out units", len(samples)) as running:
        for sample in samples:
            names.append(sample.name)
            tail = model.tail(model.view(sample, view).pixels, layer)
            found.add(
                tail.logits, tail.without(list(units)), model.outputs, sample.label
            )
            running.advance()
    return found.finish(layer, np.asarray(units), named, model, tuple(names))


class _Tally:
    """Running sums over images, and the few numbers kept of each."""

    def __init__(self, units: int, classes: int, matches: Sequence[Match]) -> None:
        self.matches = matches
        self.count, self.mean, self.spread = (
            0,
            np.zeros((units, classes)),
            np.zeros((units, classes)),
        )
        self.rows: dict[str, list[Any]] = {
            name: []
            for name in (
                "predicted",
                "labels",
                "active",
                "lost",
                "flipped",
                "correct",
                "contrast",
            )
        }

    def add(
        self, whole: Tensor, without: Tensor, outputs: str, label: int | None
    ) -> None:
        """One image: outputs (1, K) with everything and (U, K) with each unit gone."""
        before, after = whole[0].double().cpu(), without.double().cpu()
        if not (before.isfinite().all() and after.isfinite().all()):
            raise ConsilienceError("the model gives outputs that are not finite")
        loss = (before - after).numpy()
        first, then = int(before.argmax()), after.argmax(dim=1).numpy()
        self._spread(loss)
        kept = {
            "predicted": first,
            "labels": -1 if label is None else label,
            "active": np.any(loss != 0, axis=1),
            "lost": _lost(before, after, first, outputs),
            "flipped": then != first,
            "correct": then == (-1 if label is None else label),
            "contrast": self._contrasts(
                loss, LOGIT_ROUNDING * float(before.abs().max())
            ),
        }
        for name, value in kept.items():
            self.rows[name].append(value)

    def _spread(self, loss: Array) -> None:
        """Mean and sum of squared deviations of each unit's and class's loss, one image
        more (Welford 1962).
        """
        self.count += 1
        apart = loss - self.mean
        self.mean += apart / self.count
        self.spread += apart * (loss - self.mean)

    def _contrasts(self, loss: Array, nothing: float) -> Array:
        pairs = zip(loss, self.matches, strict=True)
        found = np.array(
            [
                _contrast(row[None], one.classes)[0] if one.classes else math.nan
                for row, one in pairs
            ]
        )
        return np.where(np.abs(found) <= nothing, 0.0, found)

    def finish(
        self,
        layer: str,
        units: Array,
        concepts: tuple[str, ...],
        model: Network,
        images: tuple[str, ...],
    ) -> Knockout:
        """Everything as arrays."""
        deviations = np.sqrt(self.spread / max(self.count - 1, 1))
        arrays: dict[str, Any] = {
            name: np.array(rows) for name, rows in self.rows.items()
        }
        about: dict[str, Any] = {
            "concepts": concepts,
            "matches": tuple(self.matches),
            "classes": tuple(model.classes),
        }
        return Knockout(
            layer,
            units,
            images=images,
            outputs=model.outputs,
            means=self.mean,
            deviations=deviations,
            **about,
            **arrays,
        )


def _lost(before: Tensor, after: Tensor, first: int, outputs: str) -> Array:
    """Loss (U,) of the class that was first: its probability, where outputs are logits."""
    before, after = (as_probabilities(one, outputs) for one in (before, after))
    lost: Array = (before[first] - after[:, first]).numpy()
    return lost


def _contrast(loss: Array, classes: tuple[int, ...]) -> Array:
    """Mean loss (U,) of ``classes`` minus the mean loss of all others, of losses (U,
    K).
    """
    own = np.zeros(loss.shape[1], bool)
    own[list(classes)] = True
    if own.all():
        raise ConsilienceError(
            "a concept that goes with every class leaves none to compare with"
        )
    contrast: Array = loss[:, own].mean(axis=1) - loss[:, ~own].mean(axis=1)
    return contrast


__all__ = ["Knockout", "knock_out", "knockout_verdict"]
