"""What other runs have made already, found by the digest of everything it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from consilience.files import file_stem, place, read_table
from consilience.runs.folder import (
    EXPLANATIONS,
    JOB,
    MAPS,
    RECORD,
    ImageResult,
    result_from,
)
from consilience.runs.shelf import Shelf
from consilience.saved import arrays_from_bytes
from consilience.types import ConsilienceError, Explanation, Sample


@dataclass(eq=False)
class Reuse:
    """Explanations of runs, by their recipe.

    Memory: a digest and a place (about 200 bytes) an explanation of the runs that were
    named, and the image that was read last.
    """

    _places: dict[str, tuple[Shelf, str, str]] = field(default_factory=dict)
    _last: tuple[Path, ImageResult] | None = None
    found: int = 0

    @classmethod
    def of(cls, runs: Sequence[str | Path], but: Path | None = None) -> Reuse:
        """Those of runs, finished or not; a folder of runs stands for all in it."""
        made = cls()
        for given in runs:
            folder = place(given)
            if not folder.is_dir():
                raise ConsilienceError(f"--reuse: {given} does not exist")
            inside = (
                [folder]
                if (folder / JOB).is_file()
                else sorted(file.parent for file in folder.glob(f"*/{JOB}"))
            )
            if not inside:
                raise ConsilienceError(f"--reuse: {given} holds no run")
            for one in inside:
                if but is None or one.resolve() != but.resolve():
                    made._add(one)
        return made

    def _add(self, folder: Path) -> None:
        shelf = Shelf(folder / MAPS, RECORD)
        with suppress(ConsilienceError):
            if (folder / EXPLANATIONS).is_file():
                table = read_table(folder / EXPLANATIONS)
                if "recipe" not in table:
                    return
                rows = table[["recipe", "sample", "column"]]
                for recipe, sample, column in rows.itertuples(index=False):
                    self._places.setdefault(
                        recipe, (shelf, file_stem(sample), str(column))
                    )
                return
        for name in shelf.names():
            with suppress(ConsilienceError, KeyError, TypeError):
                content = shelf.read(name)
                if content is None:
                    continue
                _, meta = arrays_from_bytes(content, name, lambda _: False)
                for row in meta["found"]["rows"]:
                    self._places.setdefault(
                        row["recipe"], (shelf, name, str(row["column"]))
                    )

    def find(self, recipe: str, sample: Sample) -> Explanation | None:
        """The explanation that was made so, of this sample; None where there is none, or
        it is damaged.
        """
        known = self._places.get(recipe)
        if known is None:
            return None
        shelf, name, column = known
        where = shelf.loose(name)
        try:
            if self._last is None or self._last[0] != where:
                content = shelf.read(name)
                if content is None:
                    return None
                self._last = (where, result_from(content, str(where)))
        except ConsilienceError:
            return None
        for item in self._last[1].items:
            if item.column == column:
                self.found += 1
                made = {**item.explanation.provenance, "seconds": 0.0}
                return replace(item.explanation, sample=sample, provenance=made)
        return None
