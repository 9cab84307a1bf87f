"""Two dissections compared: which concepts both networks detect, and
which only one of them does.

A concept is known by its name and category. Shared concepts are compared with chance:
two networks that each detect many of a set's concepts share some whatever they are (two
sets of these sizes drawn from all concepts that could be detected).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy

from consilience.agreement.overlap import expected_iou
from consilience.types import ConsilienceError

ConceptKey = tuple[str, str]
Which = Literal["detector", "significant"]
ALL = "all layers"
WORD_CATEGORY = "word"
"""The category of what CLIP-Dissect says."""


# ---- one side


@dataclass(frozen=True, eq=False)
class ComparedSide:
    """One of the two: its name, a row for each unit that detects something (`ROWS`),
    how many units each layer has, and the concepts that could have been detected
    (None where that is not known).
    """

    name: str
    found: pd.DataFrame
    units: Mapping[str, int]
    possible: frozenset[ConceptKey] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers, in order."""
        return tuple(self.units)

    def rows(self, layer: str | None = None) -> pd.DataFrame:
        """Units that detect something, of one layer or all."""
        return (
            self.found if layer is None else self.found[self.found["layer"] == layer]
        )

    def concepts(self, layer: str | None = None) -> frozenset[ConceptKey]:
        """What they detect."""
        rows = self.rows(layer)
        return frozenset(zip(rows["concept"], rows["category"], strict=True))

    def only(self, layers: Sequence[str]) -> ComparedSide:
        """The same with these layers alone; raises `ConsilienceError` for a layer that
        it has not.
        """
        unknown = [name for name in layers if name not in self.units]
        if unknown:
            raise ConsilienceError(
                f"{self.name} has no layer {unknown[0]!r}; there is: {', '.join(self.layers)}"
            )
        kept = {name: self.units[name] for name in layers}
        return ComparedSide(
            self.name,
            self.found[self.found["layer"].isin(layers)],
            kept,
            self.possible,
        )


ROWS = ("layer", "unit", "concept", "category", "score")


def side(
    name: str,
    table: pd.DataFrame,
    concepts: pd.DataFrame | None = None,
    which: Which = "detector",
) -> ComparedSide:
    """A side from a dissection's tables: ``table`` a row a unit, ``concepts`` a row a
    concept with ``eligible``.

    ``which`` says what counts as detecting: an IoU over the threshold, or significance
    under the null.
    """
    if which not in table:
        raise ConsilienceError(
            f"{name} has no column {which!r}; it was dissected without a null"
        )
    known = table["concept"].astype(str) != ""
    found = table[table[which].fillna(False).astype(bool) & known].rename(
        columns={"iou": "score"}
    )
    possible = None
    if concepts is not None:
        able = concepts[concepts["eligible"].astype(bool)]
        possible = frozenset(
            zip(
                able["concept"].astype(str), able["category"].astype(str), strict=True
            )
        )
    return ComparedSide(
        name, found[list(ROWS)].reset_index(drop=True), _sizes(table), possible
    )


def side_of_words(
    name: str, words: pd.DataFrame, possible: Sequence[str] | None = None
) -> ComparedSide:
    """A side from words (`words.Words.table`): every unit that has a word detects it;
    ``possible`` is the word list.
    """
    found = words[words["word"].astype(str) != ""].rename(
        columns={"word": "concept", "word_score": "score"}
    )
    able = (
        None
        if possible is None
        else frozenset((word, WORD_CATEGORY) for word in possible)
    )
    return ComparedSide(
        name,
        found.assign(category=WORD_CATEGORY)[list(ROWS)].reset_index(drop=True),
        _sizes(words),
        able,
    )


def _sizes(table: pd.DataFrame) -> dict[str, int]:
    return {
        str(layer): int(count)
        for layer, count in table.groupby("layer", sort=False).size().items()
    }


# ---- the two


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two sides and the layers that are compared.

    Everything is a table, labelled by the sides' own names.
    """

    a: ComparedSide
    b: ComparedSide
    pairs: tuple[tuple[str, str], ...] = field(default=())

    def jaccard(self) -> pd.DataFrame:
        """A row a pair of layers, then one over `ALL`: ``a``, ``b``, ``concepts_a``,
        ``concepts_b``, ``shared``, ``jaccard``.

        All of it is of the concepts that both sides could have detected: what one
        concept set has and the other has not says nothing of the networks; how many
        detected ones that leaves out is ``left_out``. ``expected`` is the mean Jaccard
        index of two sets of these sizes drawn from that pool, exactly; ``p`` the chance
        of as many shared concepts or more. Both are NaN, and nothing is left out, where
        it is not known what could be detected.
        """
        pairs = [
            (first, second, self.a.concepts(first), self.b.concepts(second))
            for first, second in self.pairs
        ]
        pairs.append((ALL, ALL, self.a.concepts(), self.b.concepts()))
        return pd.DataFrame([self._overlap(*pair) for pair in pairs])

    def _overlap(
        self,
        first: str,
        second: str,
        mine: frozenset[ConceptKey],
        other: frozenset[ConceptKey],
    ) -> dict[str, Any]:
        able = self._able()
        left_out = 0
        if able is not None:
            left_out = len((mine | other) - able)
            mine, other = mine & able, other & able
        shared, either = len(mine & other), len(mine | other)
        pool = None if able is None else len(able)
        known = pool is not None and either > 0
        expected = (
            expected_iou(pool or 1, len(mine), len(other)) if known else math.nan
        )
        p = (
            float(scipy.stats.hypergeom.sf(shared - 1, pool, len(mine), len(other)))
            if known
            else math.nan
        )
        jaccard = shared / either if either else math.nan
        sizes = {"concepts_a": len(mine), "concepts_b": len(other), "shared": shared}
        return {
            "a": first,
            "b": second,
            **sizes,
            "jaccard": jaccard,
            "expected": expected,
            "p": p,
            "left_out": left_out,
        }

    def _able(self) -> frozenset[ConceptKey] | None:
        """The concepts that both could have detected."""
        if self.a.possible is None or self.b.possible is None:
            return None
        return self.a.possible & self.b.possible

    def concepts(self) -> pd.DataFrame:
        """A row a concept that either detects, most units first: ``where`` is both, a
        or b; units and best score of each.
        """
        counts = [
            Counter(zip(one.found["concept"], one.found["category"], strict=True))
            for one in (self.a, self.b)
        ]
        best = [_best(one.found) for one in (self.a, self.b)]
        rows = [
            self._concept(concept, counts, best)
            for concept in sorted(self.a.concepts() | self.b.concepts())
        ]
        columns = [
            "concept",
            "category",
            "where",
            "units_a",
            "units_b",
            "best_a",
            "best_b",
        ]
        table = pd.DataFrame(rows, columns=columns)
        order = (-(table["units_a"] + table["units_b"])).argsort(kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def _concept(
        self,
        concept: ConceptKey,
        counts: Sequence[Counter[ConceptKey]],
        best: Sequence[Mapping[Any, float]],
    ) -> list[Any]:
        units = [int(count[concept]) for count in counts]
        where = "both" if all(units) else "a" if units[0] else "b"
        return [
            *concept,
            where,
            *units,
            *(scores.get(concept, math.nan) for scores in best),
        ]

    def categories(self) -> pd.DataFrame:
        """A row a category: units and unique concepts of each side."""
        names = list(
            dict.fromkeys([*self.a.found["category"], *self.b.found["category"]])
        )
        columns: dict[str, list[int]] = {}
        for letter, one in (("a", self.a), ("b", self.b)):
            columns[f"units_{letter}"] = [
                int((one.found["category"] == name).sum()) for name in names
            ]
            columns[f"concepts_{letter}"] = [
                sum(category == name for _, category in one.concepts())
                for name in names
            ]
        return pd.DataFrame({"category": names, **columns})

    def layers(self) -> pd.DataFrame:
        """A row a side and layer: ``side``, ``layer``, ``units``, ``labelled``,
        ``unique``, their ``mean_score``.
        """
        rows = [
            _layer(one, layer) for one in (self.a, self.b) for layer in one.layers
        ]
        return pd.DataFrame(rows)

    def by_layer(self, most: int = 20) -> pd.DataFrame:
        """Units by concept (rows, the ``most`` frequent) and (side, layer) (columns):
        what a heat map shows.
        """
        wanted = self.concepts().head(most)
        columns = [
            (one.name, layer) for one in (self.a, self.b) for layer in one.layers
        ]
        table = pd.DataFrame(
            index=wanted["concept"],
            columns=pd.MultiIndex.from_tuples(columns),
            dtype=int,
        )
        at = 0
        for one in (self.a, self.b):
            for layer in one.layers:
                rows = one.rows(layer)
                count = Counter(zip(rows["concept"], rows["category"], strict=True))
                table.iloc[:, at] = [
                    count[pair]
                    for pair in zip(
                        wanted["concept"], wanted["category"], strict=True
                    )
                ]
                at += 1
        return table.astype(int)

    def frequencies(self) -> pd.DataFrame:
        """How many concepts are detected by just ``units`` units: a row a number of
        units, with a column for each side.
        """
        owned = [
            Counter(zip(one.found["concept"], one.found["category"], strict=True))
            for one in (self.a, self.b)
        ]
        counts = [Counter(count.values()) for count in owned]
        numbers = sorted({*counts[0], *counts[1]})
        a, b = ([count[number] for number in numbers] for count in counts)
        return pd.DataFrame({"units": numbers, "concepts_a": a, "concepts_b": b})

    def headline(self) -> str:
        """The comparison over all layers in a sentence."""
        from consilience.show.words import comparison_headline

        return comparison_headline(self)


def _best(found: pd.DataFrame) -> dict[Any, float]:
    return {
        key: float(value)
        for key, value in found.groupby(["concept", "category"], sort=False)["score"]
        .max()
        .items()
    }


def _layer(one: ComparedSide, layer: str) -> dict[str, Any]:
    rows = one.rows(layer)
    mean = float(np.mean(rows["score"])) if len(rows) else math.nan
    counts = {
        "units": one.units[layer],
        "labelled": len(rows),
        "unique": len(one.concepts(layer)),
    }
    return {"side": one.name, "layer": layer, **counts, "mean_score": mean}


def compare_sides(a: ComparedSide, b: ComparedSide) -> Comparison:
    """Hold two sides against each other: layers of the same name, else as many layers
    in their order, else only all of them.

    The sides' names are what plots and tables are labelled with, so they must differ;
    raises `ConsilienceError`.
    """
    if a.name == b.name:
        raise ConsilienceError(
            f"both sides are called {a.name!r}; a comparison needs two names"
        )
    common = [(name, name) for name in a.layers if name in b.units]
    if not common and len(a.layers) == len(b.layers):
        common = list(zip(a.layers, b.layers, strict=True))
    return Comparison(a, b, tuple(common))
