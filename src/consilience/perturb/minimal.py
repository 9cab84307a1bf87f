"""The fewest parts that are enough, and the fewest without which it is not: searches over
subsets of superpixels, each with its passes as certificate.

A property of a subset is anything that can be asked of a network in a pass. Nothing is
assumed of it: a subset may be enough while a larger one is not, so that only asking all
subsets shows that none is smaller. Short of that a subset is irreducible: not enough
any more if any one of its parts is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from consilience.types import Array

Ask = Callable[[Array], Array]
"""Subsets (n, S) bool to margins (n,): enough where above 0."""

CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset (S,) bool that is enough, its ``margin``, how many ``passes`` it took to
    find, and whether it is known that none is smaller (``smallest``).
    """

    on: Array
    margin: float
    passes: int
    smallest: bool

    @property
    def size(self) -> int:
        """How many parts."""
        return int(self.on.sum())


def smallest(ask: Ask, free: Array) -> Subset | None:
    """The smallest subset of the ``free`` parts (S,) that is enough, of several the one
    of the largest margin, by asking every subset; None where there is none.

    Sizes are asked one after the other, so that it stops at the first that has one.
    """
    places = np.flatnonzero(free)
    passes = 0
    for size in range(len(places) + 1):
        best: tuple[float, Array] | None = None
        for subsets in _of_size(places, size, len(free)):
            margins = ask(subsets)
            passes += len(subsets)
            at = int(margins.argmax())
            if margins[at] > 0 and (best is None or margins[at] > best[0]):
                best = (float(margins[at]), subsets[at])
        if best is not None:
            return Subset(best[1], best[0], passes, True)
    return None


def _of_size(places: Array, size: int, count: int) -> Iterator[Array]:
    """All subsets of some places of a size, (n, S) bool, some at a time."""
    from itertools import combinations, islice

    chosen = combinations(places.tolist(), size)
    while part := list(islice(chosen, CHUNK)):
        subsets = np.zeros((len(part), count), bool)
        for row, members in enumerate(part):
            subsets[row, list(members)] = True
        yield subsets


def irreducible(ask: Ask, free: Array) -> Subset | None:
    """A small subset of the ``free`` parts (S,) that is enough and of which no part can
    be left out; None where none was met.

    Grown by the part that adds most until it is enough, and cut from all free parts by
    the part that is missed least; each pruned of what it can do without; the smaller,
    of two alike that of the larger margin.
    """
    whole = float(ask(free[None])[0])
    found = [_grown(ask, free)]
    passes = 1 + found[0][1]
    if whole > 0:
        cut, more = _cut(ask, free.copy())
        passes += more
        found.append((cut, 0))
    subsets = []
    for on, _ in found:
        if on is not None:
            pruned, margin, more = _pruned(ask, on)
            passes += more
            subsets.append((int(pruned.sum()), -margin, pruned))
    if not subsets:
        return None
    _, margin, on = min(subsets, key=lambda one: one[:2])
    return Subset(on, -margin, passes, False)


def _grown(ask: Ask, free: Array) -> tuple[Array | None, int]:
    """Parts added one by one, and the passes; None where all of them are not enough."""
    on, passes = np.zeros_like(free), 0
    while (free & ~on).any():
        left = np.flatnonzero(free & ~on)
        tried = np.repeat(on[None], len(left), axis=0)
        tried[np.arange(len(left)), left] = True
        margins = ask(tried)
        passes += len(left)
        on = tried[int(margins.argmax())]
        if margins.max() > 0:
            return on, passes
    return None, passes


def _cut(ask: Ask, on: Array) -> tuple[Array, int]:
    """Parts left out while what is left is enough, and the passes: of those that can go
    alone up to a quarter at once, fewer where together they cannot; at the end none
    can go alone.
    """
    passes = 0
    while on.any():
        members = np.flatnonzero(on)
        margins = ask(_each_left_out(on))
        passes += len(members)
        order = np.argsort(-margins, kind="stable")
        spare = members[order[: np.count_nonzero(margins > 0)]]
        if not len(spare):
            break
        count = min(len(spare), max(1, len(members) // 4))
        while count > 1:
            fewer = on.copy()
            fewer[spare[:count]] = False
            passes += 1
            if ask(fewer[None])[0] > 0:
                break
            count //= 2
        on = on.copy()
        on[spare[:count]] = False
    return on, passes


def _pruned(ask: Ask, on: Array) -> tuple[Array, float, int]:
    """Without what can be left out, its margin, and the passes."""
    on, more = _cut(ask, on)
    return on, float(ask(on[None])[0]), more + 1


def _each_left_out(on: Array) -> Array:
    members = np.flatnonzero(on)
    tried = np.repeat(on[None], len(members), axis=0)
    tried[np.arange(len(members)), members] = False
    return tried
