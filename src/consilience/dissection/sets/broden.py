"""The Broden layout (Bau et al., Network Dissection, CVPR 2017), as downloaded.

``index.csv`` has a row an image: ``image,split,ih,iw,sh,sw`` and a column a category,
whose cells hold PNG files and bare numbers joined by ``;``. A PNG holds number = R +
256 G, 0 = unlabelled; a bare number labels the whole image. ``label.csv`` names the
numbers, ``category.csv`` the categories, ``c_CATEGORY.csv`` the labels of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience import images
from consilience.dissection.concepts import (
    LABEL_GRID,
    ConceptSet,
    ImageSource,
    Plane,
    concept_digest,
    concept_sets,
    numbered,
    refuse_missing,
    spec_of,
)
from consilience.files import inside, read_csv, read_csv_records
from consilience.registry import option
from consilience.types import Array, ConsilienceError

CsvRows = list[dict[str, str]]


@concept_sets.register("broden")
@dataclass(frozen=True)
class Broden:
    """A folder in the layout of Broden."""

    path: str = option("", help="the folder with index.csv")
    split: str = option("", help="only images of this split (train, val)")

    def open(self) -> ConceptSet:
        """Read and check the tables; label maps are checked when they are read."""
        folder = Path(self.path)
        index = [
            row
            for row in _table(folder / "index.csv", ("image",))
            if self.split in ("", row.get("split", ""))
        ]
        if not index:
            raise ConsilienceError(
                f"{folder / 'index.csv'} has no images{self._of_split(folder)}"
            )
        categories = _categories(folder, index[0])
        labels = _labels(folder)
        source = _Source(folder, index, categories, _largest(labels))
        source.check()
        concepts = numbered(
            row for name in categories for row in _listed(folder, name, labels)
        )
        nameless = sum(not name for name in labels.values())
        notes = (
            (f"labels without a name, which never win: {nameless}",)
            if nameless
            else ()
        )
        tables = (folder / name for name in ("index.csv", "label.csv"))
        return ConceptSet(
            spec_of(self),
            concept_digest(self.split, *(table.read_bytes() for table in tables)),
            concepts,
            categories,
            tuple(row["image"] for row in index),
            source,
            _grid(index),
            notes,
            _largest(labels),
        )

    def _of_split(self, folder: Path) -> str:
        if not self.split:
            return ""
        there = sorted(
            {row.get("split", "") for row in _table(folder / "index.csv", ("image",))}
        )
        return f" of split {self.split!r}; there is {', '.join(there)}"


# ---- the tables


def _table(file: Path, needed: tuple[str, ...]) -> CsvRows:
    rows = read_csv_records(file)
    header = [name for _, cells in read_csv(file)[:1] for name in cells]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ConsilienceError(
            f"{file} lacks {', '.join(missing)}; its columns are {', '.join(header) or 'none'}"
        )
    return rows


def _categories(folder: Path, row: dict[str, str]) -> tuple[str, ...]:
    """In the order of index.csv, as category.csv names them."""
    named = [line["name"] for line in _table(folder / "category.csv", ("name",))]
    absent = [name for name in named if name not in row]
    if absent:
        raise ConsilienceError(
            f"{folder / 'index.csv'} has no column for category {absent[0]!r} of category.csv"
        )
    return tuple(name for name in row if name in named)


def _labels(folder: Path) -> dict[int, str]:
    """Name by number; "" for one without a name."""
    file = folder / "label.csv"
    rows = _table(file, ("number", "name"))
    labels = {
        _number(row["number"], file): row["name"].strip().strip("-")
        and row["name"].strip()
        for row in rows
    }
    labels.pop(0, None)
    if len(labels) < len([row for row in rows if row["number"].strip() != "0"]):
        raise ConsilienceError(f"{file} gives a number twice")
    return labels


def _largest(labels: dict[int, str]) -> int:
    return max(labels, default=0)


def _listed(
    folder: Path, category: str, labels: dict[int, str]
) -> list[tuple[str, str, int]]:
    """The concepts of a category: (name, category, number)."""
    file = folder / f"c_{category}.csv"
    numbers = [_number(row["number"], file) for row in _table(file, ("number",))]
    unknown = [number for number in numbers if number and number not in labels]
    if unknown:
        raise ConsilienceError(
            f"{file} lists number {unknown[0]}; label.csv goes to {_largest(labels)} and does "
            f"not have it"
        )
    return [(labels[number], category, number) for number in numbers if number]


def _number(text: str, file: Path) -> int:
    if not text.strip().isdecimal():
        raise ConsilienceError(
            f"{file}: a label's number is a whole number from 0; got {text!r}"
        )
    return int(text)


def _grid(index: CsvRows) -> tuple[int, int]:
    """The size of the label maps where all have one, else the common one."""
    sizes = {(row.get("sh") or "", row.get("sw") or "") for row in index}
    if len(sizes) == 1:
        height, width = sizes.pop()
        if (
            height.isdecimal()
            and width.isdecimal()
            and min(int(height), int(width)) > 0
        ):
            return int(height), int(width)
    return LABEL_GRID


# ---- images and maps


@dataclass(frozen=True, eq=False)
class _Source(ImageSource):
    folder: Path
    index: CsvRows
    categories: tuple[str, ...]
    largest: int

    def image(self, index: int) -> Array:
        return images.read_pixels(self._file(self.index[index]["image"]))[0]

    def _file(self, name: str) -> Path:
        return inside(self.folder / "images", name, "index.csv")

    def files(self, index: int) -> Sequence[Path]:
        row = self.index[index]
        cells = [cell for name in self.categories for cell in _cells(row[name])]
        maps = [cell for cell in cells if not cell.isdecimal()]
        return [self._file(name) for name in (row["image"], *maps)]

    def planes(self, index: int) -> Sequence[Plane]:
        row = self.index[index]
        cells = (
            (place, cell)
            for place, name in enumerate(self.categories)
            for cell in _cells(row[name])
        )
        return [
            Plane(place, int(cell) if cell.isdecimal() else self._map(row, cell))
            for place, cell in cells
        ]

    def _map(self, row: dict[str, str], name: str) -> Array:
        file = self._file(name)
        pixels = images.read_label_map(file, self._file(row["image"]))
        size = (row.get("sh") or "", row.get("sw") or "")
        shape = tuple(map(str, pixels.shape[:2]))
        if all(size) and size not in (shape, shape[::-1]):  # turned as its image
            raise ConsilienceError(
                f"{file} is {pixels.shape[0]} x {pixels.shape[1]}; index.csv says {size[0]} x "
                f"{size[1]}"
            )
        if pixels.ndim == 2:
            return pixels
        numbers: Array = pixels[:, :, 0] + 256 * pixels[:, :, 1]
        return numbers

    def check(self) -> None:
        """Every file is there, and every bare number is a label."""
        files = []
        for row in self.index:
            files.append(self._file(row["image"]))
            for name in self.categories:
                for cell in _cells(row[name]):
                    if not cell.isdecimal():
                        files.append(self._file(cell))
                    elif not 0 < int(cell) <= self.largest:
                        raise ConsilienceError(
                            f"index.csv labels {row['image']} with {name} number {cell}; "
                            f"label.csv goes from 1 to {self.largest}"
                        )
        refuse_missing(str(self.folder / "images"), files)


def _cells(cell: str | None) -> list[str]:
    return [part.strip() for part in (cell or "").split(";") if part.strip()]
