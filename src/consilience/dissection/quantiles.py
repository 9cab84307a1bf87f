"""The high quantile of every unit of a layer, from a stream of maps, in memory that
does not grow with the stream.

Only the largest values matter: of n values, the quantile q lies at rank n - floor((n -
1) q) from the top. As long as that many fit into the state the quantile is exact,
interpolated as numpy does. Beyond, values are halved as they come in (Munro & Paterson
1980; Manku, Rajagopalan & Lindsay 1998): a full buffer is sorted, every second value
stays and counts for two, and so on up to a top buffer that keeps the largest. Halving a
buffer whose values count for w moves the rank of any value by at most w, so the error
of the result is known: `TailSketch.error`.

Sketches of parts of a stream are merged level by level: of two buffers that wait at one
level one is made, which goes up as any other. The errors of both are added to those of
the halvings that the merge does, so the bound holds for every order of parts; an exact
sketch stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.types import Array, ConsilienceError

LEAST_VALUES = 64
EMPTY = -math.inf


class FloorError(ConsilienceError):
    """Values that were left out would have been needed, for the rows ``units``."""

    def __init__(self, units: Array) -> None:
        super().__init__(
            f"{len(units)} units have fewer values above the floor than their quantile needs"
        )
        self.units = units


class TailSketch:
    """The quantile ``q`` of each of ``units`` rows of a stream of ``total`` values a
    row, with room for ``capacity`` a row.

    Values below ``least`` (U,) are left out and values equal to it only counted: it is
    a guess at what cannot matter, and where it was too high `result` raises
    `FloorError`.

    State: at most 1.5 times ``capacity`` values a row and as many that wait, whatever
    ``total`` is.
    """

    def __init__(
        self,
        units: int,
        total: int,
        q: float,
        capacity: int,
        least: Array | None = None,
    ) -> None:
        if not 0 < q < 1:
            raise ConsilienceError(f"a quantile lies between 0 and 1; got {q:g}")
        if capacity < LEAST_VALUES or total < 1:
            raise ConsilienceError(
                f"a sketch has room for {LEAST_VALUES} values at least, of a stream of one; "
                f"got {capacity}, {total}"
            )
        position = (total - 1) * q
        self.units, self.total, self.q = units, total, q
        self.rank = total - math.floor(position)
        self._share = position - math.floor(position)
        self._levels = (
            0
            if self.rank <= capacity
            else math.ceil(math.log2(2 * self.rank / capacity))
        )
        self._width = (
            capacity if self._levels == 0 else 2 * (capacity // (4 * self._levels))
        )
        top = self.rank if self._levels == 0 else -(-self.rank // 2**self._levels)
        self._top = np.full((units, top), EMPTY, dtype=np.float32)
        self._half: list[Array | None] = [None] * self._levels
        self._turn = [0] * max(self._levels, 1)
        self._waiting: list[tuple[Array, Array]] = []
        self._counts = np.zeros(units, dtype=np.int64)
        self.error = np.zeros(units, dtype=np.int64)
        self.least = None if least is None else least.astype(np.float32)
        self.equal = np.zeros(units, dtype=np.int64)
        self.strange = False
        self.seen = 0

    @property
    def floor(self) -> Array:
        """Values (U,) at or below which nothing can matter any more: the lowest that
        the top still holds, or the guess.
        """
        held = self._top[:, -1]
        return held if self.least is None else np.maximum(held, self.least)

    @property
    def exact(self) -> bool:
        """Whether the quantile will be that of the values themselves."""
        return self._levels == 0

    # -- filling

    def add(self, maps: Tensor, peaks: Tensor | None = None) -> None:
        """Take in maps (N, U, h, w): h w values a row for each of N images; ``peaks``
        (N, U): their maxima, where known.
        """
        self.seen += len(maps) * maps.shape[2] * maps.shape[3]
        if self.least is not None:
            same = maps == torch.tensor(self.least, device=maps.device)[:, None, None]
            self.equal += same.sum(dim=(0, 2, 3)).cpu().numpy()
        peaks = maps.amax(dim=(2, 3)) if peaks is None else peaks
        self.strange |= bool(torch.isnan(peaks).any())
        if (
            self.exact and self.least is None and self.floor.min() == EMPTY
        ):  # nothing can be left out yet
            dense = maps.transpose(0, 1).flatten(1).float().cpu().numpy()
            self._top = _largest(
                np.concatenate([self._top, dense], axis=1), self._top.shape[1]
            )
            return
        rows, values = _above(
            maps, peaks, torch.tensor(self.floor, device=maps.device)
        )
        self._counts += np.bincount(rows, minlength=self.units)
        self._waiting.append((rows, values))
        # to merge early costs time, to merge late lets values wait that a higher floor
        # would have stopped
        enough = max(self._width, self._top.shape[1]) // 4 + 1
        if self._counts.max(initial=0) >= enough or self.floor.min() == EMPTY:
            self._merge(last=False)

    def _merge(self, last: bool) -> None:
        if not self._waiting:
            return
        rows = np.concatenate([part for part, _ in self._waiting])
        values = np.concatenate([part for _, part in self._waiting])
        least = 1 if last or self.exact else self._width
        rest = np.zeros(len(rows), dtype=bool)
        for block, taken in _blocks(rows, values, self.units, self._width, least):
            rest |= taken
            self._enter(block)
        self._waiting = [(rows[~rest], values[~rest])] if not rest.all() else []
        self._counts = np.bincount(rows[~rest], minlength=self.units)

    def _enter(self, block: Array) -> None:
        """A block (U, width), empty places -inf, goes up level by level until it waits
        for its other half or is at the top.
        """
        for level in range(self._levels):
            block = self._halved(block, level)
            half = self._half[level]
            if half is None:
                self._half[level] = block
                return
            block, self._half[level] = np.concatenate([half, block], axis=1), None
        self._top = _largest(
            np.concatenate([self._top, block], axis=1), self._top.shape[1]
        )

    def _halved(self, block: Array, level: int) -> Array:
        self.error += (block > EMPTY).any(axis=1) * 2**level
        first, self._turn[level] = self._turn[level], 1 - self._turn[level]
        ordered = -np.sort(-block, axis=1)
        return np.ascontiguousarray(ordered[:, first::2])

    def merge(self, other: TailSketch) -> None:
        """Take in a sketch of other values of the stream, made with the same
        arguments; ``other`` is used up.
        """
        self.seen += other.seen
        self.strange |= other.strange
        self.error += other.error
        self.equal += other.equal
        self._top = _largest(
            np.concatenate([self._top, other._top], axis=1), self._top.shape[1]
        )
        carried: Array | None = None
        for level in range(self._levels):
            there = (carried, self._half[level], other._half[level])
            held = [one for one in there if one is not None]
            carried = None
            if len(held) > 1:
                carried = np.concatenate(held[:2], axis=1)
                held = held[2:]
                if level + 1 < self._levels:
                    carried = self._halved(carried, level + 1)
            self._half[level] = held[0] if held else None
        if carried is not None:
            self._top = _largest(
                np.concatenate([self._top, carried], axis=1), self._top.shape[1]
            )
        self._waiting += other._waiting
        self._merge(last=False)

    # -- reading

    def result(self) -> tuple[Array, Array]:
        """Quantiles (U,) float32, and by how many ranks (U,) each may be off at most: 0
        where it is exact.

        Raises `ConsilienceError` where fewer values came than were announced, or values
        that are not finite; `FloorError` where too many were left out.
        """
        if self.seen != self.total:
            raise ConsilienceError(
                f"a sketch of {self.total} values a unit was shown {self.seen}"
            )
        self._merge(last=True)
        values, bound = self._exact() if self.exact else self._estimated()
        if self.strange or not np.isfinite(values).all():
            raise ConsilienceError(
                "activations are not finite: a quantile of them says nothing"
            )
        return values, bound

    def _exact(self) -> tuple[Array, Array]:
        if self.least is not None:
            missing = (self._top == EMPTY).sum(axis=1)
            self._check(missing - self.equal)
            rows = np.flatnonzero(missing)
            empty = self._top[rows] == EMPTY
            self._top[rows] = np.where(empty, self.least[rows, None], self._top[rows])
        # the floor-th value from below is the last of the top, the next one stands
        # before it
        low = self._top[:, -1].astype(np.float64)
        high = self._top[:, -2].astype(np.float64) if self.rank > 1 else low
        return (low + self._share * (high - low)).astype(
            np.float32
        ), self.error.copy()

    def _estimated(self) -> tuple[Array, Array]:
        parts = [(self._top, 2**self._levels)]
        parts += [
            (half, 2 ** (level + 1))
            for level, half in enumerate(self._half)
            if half is not None
        ]
        values = np.concatenate([part for part, _ in parts], axis=1)
        weights = np.concatenate(
            [np.full(part.shape[1], weight) for part, weight in parts]
        )
        order = np.argsort(-values, axis=1, kind="stable")
        ranks = np.cumsum(weights[order], axis=1)
        bound = self.error + 2**self._levels
        place = np.argmax(ranks >= self.rank, axis=1)
        found = np.take_along_axis(
            values, np.take_along_axis(order, place[:, None], axis=1), axis=1
        )[:, 0]
        if self.least is not None:
            above = (weights * (values > EMPTY)).sum(axis=1)
            self._check(self.rank - above - self.equal - bound)
            found = np.where(above < self.rank, self.least, found)
        return found, bound

    def _check(self, lacking: Array) -> None:
        """No unit may lack values."""
        if (lacking > 0).any():
            raise FloorError(np.flatnonzero(lacking > 0))

    # -- keeping

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` takes."""
        self._merge(last=False)
        rows, values = (
            self._waiting[0]
            if self._waiting
            else (np.zeros(0, np.int64), np.zeros(0, np.float32))
        )
        halves = {
            f"half{level}": half
            for level, half in enumerate(self._half)
            if half is not None
        }
        plain = {
            "seen": np.array(self.seen),
            "strange": np.array(self.strange),
            "error": self.error,
            "equal": self.equal,
            "turn": np.array(self._turn),
        }
        if self.least is not None:
            plain["least"] = self.least
        filled = int((self._top != EMPTY).any(axis=0).sum())
        return {
            "top": self._top[:, :filled],
            "rows": rows,
            "values": values,
            **plain,
            **halves,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a sketch made alike."""
        held = state["top"]
        self._top[:, : held.shape[1]] = held
        self._top[:, held.shape[1] :] = EMPTY
        self.error, self.seen = state["error"], int(state["seen"])
        self.equal, self.least = state["equal"], state.get("least")
        self.strange = bool(state["strange"])
        self._turn = [int(turn) for turn in state["turn"]]
        self._half = [state.get(f"half{level}") for level in range(self._levels)]
        self._waiting = [(state["rows"], state["values"])]
        self._counts = np.bincount(state["rows"], minlength=self.units)


def _above(maps: Tensor, peaks: Tensor, floor: Tensor) -> tuple[Array, Array]:
    """Unit numbers and values of everything above its unit's floor; NaN counts as
    above, so that it is found.
    """
    images, units = torch.nonzero(~(peaks <= floor), as_tuple=True)
    rows = maps[images, units].flatten(1)
    above = ~(rows <= floor[units, None])
    counts = above.sum(dim=1)
    return torch.repeat_interleave(units, counts).cpu().numpy(), rows[
        above
    ].float().cpu().numpy()


def _blocks(
    rows: Array, values: Array, units: int, width: int, least: int
) -> Iterator[tuple[Array, Array]]:
    """Blocks (U, width) of the values by unit, in the order they came, and which values
    are in the block.

    Only blocks in which some unit has ``least`` values; empty places are -inf.
    """
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=units)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    for number in range(-(-int(counts.max(initial=0)) // width)):
        taken = (place >= number * width) & (place < (number + 1) * width)
        if np.bincount(rows[taken], minlength=1).max() < least:
            return
        block = np.full(
            (units, min(width, int(counts.max()) - number * width)),
            EMPTY,
            dtype=np.float32,
        )
        block[rows[taken], place[taken] - number * width] = values[taken]
        yield block, taken


def _largest(values: Array, count: int) -> Array:
    """The ``count`` largest of every row, in order."""
    return torch.from_numpy(values).topk(count, dim=1).values.numpy()
