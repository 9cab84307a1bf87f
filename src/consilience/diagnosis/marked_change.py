"""Does a network answer to planted marks otherwise than the one before it?

Plain images say little of a shortcut that was learnt: on images without the mark both
networks may say the same for the same places. Here the same marks are planted in them
for both, and what a mark adds to each class's score is compared, in standard deviations
of that network's own scores of the class. The unit is an image; all marks and classes
are one family (max-T, `simultaneous`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

from consilience.diagnosis.shortcuts import in_full_passes, painted_ahead
from consilience.marks.painting import Mark
from consilience.simultaneous import Simultaneous, simultaneous
from consilience.types import Array, ConsilienceError, Model

SPREAD = 1e-9
"""A class whose scores vary by less than this share of their size has no unit."""


def answers(model: Model, images: Tensor, marks: Sequence[Mark], seed: int) -> Array:
    """Scores (n, 1 + marks, K) float32 of images (n, C, h, w): plain, then under each
    mark.
    """

    def variants() -> Iterable[Tensor]:
        yield images
        for painted in painted_ahead(marks, images, seed):
            yield painted.marked

    rows = torch.cat(list(in_full_passes(model, variants())))
    shaped: Array = rows.numpy().reshape(1 + len(marks), len(images), -1)
    return shaped.transpose(1, 0, 2)


@dataclass(frozen=True, eq=False)
class MarkAnswers:
    """How much more the new network answers to marks: ``difference`` (marks, K) with its
    bounds in standard deviations, ``old`` and ``new`` (marks, K) what each adds; NaN for
    a class whose scores do not vary in a network.

    ``p_within`` and ``p_beyond`` are of the whole: that no mark and class lies beyond
    the margin, and that one does.
    """

    specs: tuple[str, ...]
    old: Array
    new: Array
    difference: Array
    low: Array
    high: Array
    p_within: float
    p_beyond: float
    n: int

    @property
    def largest(self) -> tuple[int, int]:
        """Mark and class of the largest difference."""
        if np.isnan(self.difference).all():
            return 0, 0
        mark, index = divmod(
            int(np.nanargmax(self.difference)), self.difference.shape[1]
        )
        return mark, index

    def table(self, name_of: Callable[[int], str]) -> pd.DataFrame:
        """A row a mark, the class whose answer grew most, the largest first."""
        rows = []
        for place, spec in enumerate(self.specs):
            grew = self.difference[place]
            index = 0 if np.isnan(grew).all() else int(np.nanargmax(grew))
            rows.append(
                {
                    "mark": spec,
                    "class_index": index,
                    "class": name_of(index),
                    "old": self.old[place, index],
                    "new": self.new[place, index],
                    "difference": grew[index],
                    "low": self.low[place, index],
                    "high": self.high[place, index],
                }
            )
        return (
            pd.DataFrame(rows)
            .sort_values("difference", ascending=False, kind="stable")
            .reset_index(drop=True)
        )


def compared(
    new: Array,
    old: Array,
    specs: Sequence[str],
    margin: float,
    level: float,
    seed: int = 0,
) -> MarkAnswers:
    """What answers (n, 1 + marks, K) of two networks to the same images show.

    Bounds are simultaneous and of one side at ``level``. That one answer lies beyond
    the margin is a max-T over all; that none does needs each to be shown to lie within
    (an intersection-union test, by Student's t). Raises `ConsilienceError` where a score
    is not finite, and where no class's varies.
    """
    for whose, scores in (("new", new), ("old", old)):
        if count := np.count_nonzero(~np.isfinite(scores).all((1, 2))):
            raise ConsilienceError(
                f"the {whose} network's scores of {count} of {len(scores)} images, marked "
                f"or plain, are not finite"
            )
    added = {"new": _added(new), "old": _added(old)}
    n, marks, classes = added["new"].shape
    differences = added["new"] - added["old"]
    flat = differences.reshape(n, marks * classes)
    known = np.isfinite(flat).all(0)
    if not known.any():
        raise ConsilienceError(
            "no class's score varies over the images in both networks: what a mark adds "
            "has no unit"
        )
    tested = simultaneous(flat[:, known] - margin, 2 * level - 1, seed)
    p_within, p_beyond = _p(tested)

    def placed(values: Array) -> Array:
        found = np.full(marks * classes, math.nan)
        found[known] = values
        return found.reshape(marks, classes)

    constant = np.isnan(tested.error)
    low, high = (
        np.where(constant, tested.mean, side) for side in (tested.low, tested.high)
    )
    return MarkAnswers(
        tuple(specs),
        added["old"].mean(0),
        added["new"].mean(0),
        placed(tested.mean + margin),
        placed(low + margin),
        placed(high + margin),
        p_within,
        p_beyond,
        n,
    )


def _added(scores: Array) -> Array:
    """What each mark adds to each class (n, marks, K), in standard deviations of the
    plain images' scores; NaN where those do not vary.
    """
    plain = scores[:, 0].astype(np.float64)
    spread = plain.std(0, ddof=1)
    none = spread <= SPREAD * np.maximum(np.abs(plain).max(0), 1e-30)
    unit = np.where(none, math.nan, spread)
    found: Array = (scores[:, 1:].astype(np.float64) - plain[:, None]) / unit
    return found


def _p(shifted: Simultaneous) -> tuple[float, float]:
    """p that some mean is at or above 0, and that all are at or below it."""
    constant = np.isnan(shifted.error)
    beyond = shifted.mean > 0
    with np.errstate(invalid="ignore"):
        t = shifted.mean / shifted.error
    each = np.where(
        constant, np.where(beyond, 1.0, 0.0), scipy.stats.t.cdf(t, shifted.n - 1)
    )
    above = np.where(constant, 0.0, shifted.p)[beyond]
    return float(each.max()), float(above.min(initial=1.0))
