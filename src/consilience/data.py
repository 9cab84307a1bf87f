"""Folders, patterns and box files: from what a user names to samples, one image in
memory at a time.
"""

from __future__ import annotations

import glob
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from consilience import images
from consilience.classnames import classes_named
from consilience.files import read_csv
from consilience.image_files import find_images as find_images
from consilience.image_files import passed_over as passed_over
from consilience.registry import unknown
from consilience.types import Box, ConsilienceError, Sample

EDGES = ("x0", "y0", "x1", "y1")
TRUTH_COLUMNS = ("image", "wnid", "class_index", "class", *EDGES)
_WNID = re.compile(r"^n\d{8}[_-]")


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why, in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class KnownTruth:
    """What a truth file says of one image."""

    label: int
    boxes: tuple[Box, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TruthTable:
    """True classes and boxes by image, as a box file names them; ``notes`` say what of
    the file was not used.
    """

    images: Mapping[str, KnownTruth]
    notes: tuple[str, ...] = field(default=())

    def of(self, path: str | Path) -> KnownTruth | None:
        """What is known of a file: the longest end of its path that the truth file
        names, else its bare stem.
        """
        end = self._end_of(path)
        return None if end is None else self.images[end]

    def _end_of(self, path: str | Path) -> str | None:
        """The name in the file that means a path."""
        parts = Path(composed(str(path))).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        ends.append(Path(composed(str(path))).stem)
        return next((end for end in ends if end in self.images), None)

    def unmatched(self, paths: Iterable[str | Path]) -> tuple[str, ...]:
        """Names in the file that mean none of ``paths``."""
        met = {self._end_of(path) for path in paths}
        return tuple(name for name in self.images if name not in met)

    def unmatched_note(self, paths: Sequence[str | Path]) -> str | None:
        """A line on the rows that mean none of ``paths``, with what lies near; None
        where there is none.
        """
        left = self.unmatched(paths)
        if not left:
            return None
        named = ", ".join(map(repr, left[:NAMED])) + (", ..." if left[NAMED:] else "")
        of = f"{len(left)} of {len(self.images)} images in the truth file"
        said = f"{of} are not among those given: {named}"
        near = self._near(left, paths)
        return f"{said} ({near})" if near else said

    def _near(self, left: Sequence[str], paths: Sequence[str | Path]) -> str:
        """The first name that is a path but for case, ending or folder."""
        for name in left:
            for path in paths:
                if self._end_of(path) is not None:
                    continue
                mine, theirs = Path(name), Path(composed(str(path)))
                if mine.name.casefold() == theirs.name.casefold():
                    how = (
                        "folder"
                        if mine.name == theirs.name
                        else "upper or lower case"
                    )
                    return f"{name!r} differs from {str(path)!r} by its {how}"
                if mine.stem.casefold() == theirs.stem.casefold():
                    return f"{name!r} differs from {str(path)!r} by its ending"
        return ""


NAMED = 3


def composed(name: str) -> str:
    """A name with accents as one letter (NFC): file systems and lists spell them either
    way.
    """
    return unicodedata.normalize("NFC", name)


# ---- finding and reading images


def read_image(
    path: str | Path,
    name: str | None = None,
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
) -> Sample:
    """Read one image as a `Sample`, named by its stem unless told.

    ``channels`` are those of the network that it is for: with three it is 8-bit RGB,
    else it is read as it is (`images.read_sample`). ``value_range`` are the values that
    are 0 and 1, for files of other than 8 bits that do not say. Raises
    `ConsilienceError` where it cannot be read.
    """
    return images.read_sample(path, name, channels, value_range)


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each file, unique also where case does not count: its stem, with as
    many folders before it as it takes.

    >>> names_of([Path("a/dog.jpg"), Path("b/dog.jpg"), Path("b/cat.jpg"), Path("b/cat.png")])
    ['a/dog', 'b/dog', 'cat.jpg', 'cat.png']
    """
    twins = _repeated(str(file.with_suffix("")) for file in files)
    bases = [
        file.name if str(file.with_suffix("")).casefold() in twins else file.stem
        for file in files
    ]
    names = list(bases)
    for depth in range(1, max((len(file.parts) for file in files), default=0)):
        clash = _repeated(names)
        if not clash:
            break
        for place, file in enumerate(files):
            if names[place].casefold() in clash:
                names[place] = "/".join((*file.parent.parts[-depth:], bases[place]))
    clash = _repeated(names)
    return [
        str(file) if name.casefold() in clash else name
        for name, file in zip(names, files, strict=True)
    ]


def _repeated(names: Iterable[str]) -> set[str]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name.casefold()] = counts.get(name.casefold(), 0) + 1
    return {name for name, count in counts.items() if count > 1}


def is_one_file(given: str | Path) -> bool:
    """Whether a path names one file, be it there or not: no folder and no pattern."""
    text = str(Path(given).expanduser())
    if os.path.lexists(text):
        return not os.path.isdir(text)  # noqa: PTH112 - Path.is_dir raises for a name too long
    return not glob.has_magic(text)


def read_samples(
    paths: Sequence[str | Path],
    truth: TruthTable | None = None,
    classes: Sequence[str] = (),
    channels: int = 3,
) -> Iterator[Sample | Failure]:
    """Read image after image; one that cannot be read is a `Failure` with its reason,
    and the rest goes on.

    ``truth`` gives labels and boxes. With ``classes``, an image that it does not know
    is labelled by its file's name, where that names exactly one class
    (``n01443537_goldfish.JPEG``). Nothing found raises `ConsilienceError` at once.
    """
    return read_files(find_images(paths), truth, classes, channels)


def read_files(
    files: Sequence[Path],
    truth: TruthTable | None = None,
    classes: Sequence[str] = (),
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
) -> Iterator[Sample | Failure]:
    """`read_samples` of files that were found before; one that is gone, or a link that
    leads nowhere, is a failure like any other.
    """
    for file, name in zip(files, names_of(files), strict=True):
        yield read_file(file, name, truth, classes, channels, value_range)


def read_file(
    file: Path,
    name: str,
    truth: TruthTable | None = None,
    classes: Sequence[str] = (),
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
) -> Sample | Failure:
    """One file of `read_files`, under its name."""
    try:
        sample = read_image(file, name, channels, value_range)
        return labelled(sample, file, truth, classes)
    except ConsilienceError as error:
        return Failure(name, str(error))


def labelled(
    sample: Sample, file: Path, truth: TruthTable | None, classes: Sequence[str]
) -> Sample:
    """A sample with what a truth file knows of its file; else labelled by its name or
    its folder's, where that names exactly one class.
    """
    known = truth.of(file) if truth is not None else None
    if known is None:
        label = label_from_name(file.name, classes)
        if label is None and truth is None:
            label = label_from_folder(file, classes)
        return replace(sample, label=label)
    height, width = sample.pixels.shape[:2]
    boxes = tuple(_inside(box, width, height, file) for box in known.boxes)
    return replace(
        sample, label=known.label, boxes=boxes, notes=sample.notes + known.notes
    )


def _inside(box: Box, width: int, height: int, file: Path) -> Box:
    """A box held to its image; up to a pixel outside is rounding, more is a box file
    made for another size.
    """
    if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
        edges = ", ".join(f"{edge:g}" for edge in (box.x0, box.y0, box.x1, box.y1))
        raise ConsilienceError(
            f"{file}: box {edges} lies outside of the image's {width} x {height} pixels; "
            f"boxes are in pixels of this file"
        )
    return Box(
        box.index,
        max(box.x0, 0.0),
        max(box.y0, 0.0),
        min(box.x1, float(width)),
        min(box.y1, float(height)),
    )


# ---- class names


def label_from_name(name: str, classes: Sequence[str]) -> int | None:
    """The class that a file like ``n01443537_goldfish.JPEG`` is named after; None
    without a WordNet id, or unless one fits.

    Names that two classes share (ImageNet has two cranes and two maillots) say nothing
    and give None.
    """
    stem = Path(name).stem
    if not _WNID.match(stem):
        return None
    fit = classes_named(_WNID.sub("", stem), classes)
    return fit[0] if len(fit) == 1 else None


def label_from_folder(file: Path, classes: Sequence[str]) -> int | None:
    """The class that a file's folder is called (``rose/1.jpg``); None unless one fits.

    A bare number is none: folders are called so for other reasons.
    """
    name = _WNID.sub("", file.absolute().parent.name)
    if not name or name.isdecimal():
        return None
    fit = classes_named(name, classes)
    return fit[0] if len(fit) == 1 else None


# ---- box files


def read_truth(path: str | Path, classes: Sequence[str] = ()) -> TruthTable:
    """Read a CSV of true classes and boxes: a row a box, with a header
    ``image,class_index,x0,y0,x1,y1`` in any order.

    ``class`` may stand for ``class_index`` and gives a name of ``classes``; edges are
    pixels of the image (upper ones exclusive) and may be left out; ``wnid`` is allowed.
    An image with boxes of several classes is labelled by its first row. Comma,
    semicolon or tab. Raises `ConsilienceError` with the line of whatever is wrong.
    """
    file = Path(path)
    rows = _rows(file)
    header = _header(file, rows)
    images: dict[str, list[tuple[int, Box | None]]] = {}
    for line, cells in rows[1:]:
        if any(cells):
            row = _record(f"{file}, line {line}", header, cells)
            index = class_of_row(f"{file}, line {line}", row, classes)
            images.setdefault(_image_of(f"{file}, line {line}", row), []).append(
                (index, box_of_row(f"{file}, line {line}", row, index))
            )
    if not images:
        raise ConsilienceError(f"{file} has a header and no rows")
    unused = [name for name in header if name not in TRUTH_COLUMNS]
    notes = (f"columns not used: {', '.join(unused)}",) if unused else ()
    return TruthTable(
        {name: known_of(found) for name, found in images.items()}, notes
    )


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    rows = read_csv(file, "truth file", ",;\t")
    return [(number, [cell.strip() for cell in row]) for number, row in rows]


def _header(file: Path, rows: list[tuple[int, list[str]]]) -> list[str]:
    header = [name.lower() for name in rows[0][1]] if rows else []
    missing = [name for name in ("image",) if name not in header]
    if "class_index" not in header and "class" not in header:
        missing.append("class_index (or class)")
    if any(name in header for name in EDGES):
        missing += [name for name in EDGES if name not in header]
    if missing:
        raise ConsilienceError(
            f"{file} lacks {', '.join(missing)}; its columns are {', '.join(header) or 'none'}"
        )
    repeated = [name for name in TRUTH_COLUMNS if header.count(name) > 1]
    if repeated:
        raise ConsilienceError(f"{file} has the column {repeated[0]} more than once")
    return header


def _record(where: str, header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ConsilienceError(
            f"{where} has {len(cells)} values for {len(header)} columns"
        )
    return dict(zip(header, cells, strict=True))


def _image_of(where: str, row: Mapping[str, str]) -> str:
    if not row["image"]:
        raise ConsilienceError(f"{where} names no image")
    return composed(row["image"].replace("\\", "/").removeprefix("./"))


def class_of_row(where: str, row: Mapping[str, str], classes: Sequence[str]) -> int:
    """The class of a row with ``class_index`` or ``class``."""
    number, name = row.get("class_index", ""), row.get("class", "")
    if not number:
        return _class_named(where, name, classes)
    if not number.isdecimal() or (classes and int(number) >= len(classes)):
        limit = f"0 to {len(classes) - 1}" if classes else "a whole number from 0"
        raise ConsilienceError(f"{where}: class_index is {limit}; got {number!r}")
    return int(number)


def _class_named(where: str, name: str, classes: Sequence[str]) -> int:
    fit = classes_named(name, classes) if name else []
    if not fit and name.isdecimal() and int(name) < len(classes):
        return int(name)
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise ConsilienceError(
            f"{where}: class {name!r} is number {' and '.join(map(str, fit))}; give class_index"
        )
    raise ConsilienceError(f"{where}: {unknown('class', name, classes, limit=12)}")


def box_of_row(where: str, row: Mapping[str, str], index: int) -> Box | None:
    """The box of a row with its edges ``x0 y0 x1 y1``; None where they are empty."""
    cells = [row.get(edge, "") for edge in EDGES]
    if not any(cells):
        return None
    try:
        x0, y0, x1, y1 = map(float, cells)
    except ValueError:
        raise ConsilienceError(
            f"{where}: a box is four numbers; got {', '.join(cells)}"
        ) from None
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
        raise ConsilienceError(
            f"{where}: a box has x0 < x1 and y0 < y1; got {', '.join(cells)}"
        )
    return Box(index, x0, y0, x1, y1)


def known_of(found: Sequence[tuple[int, Box | None]]) -> KnownTruth:
    """What the rows of one image say of it: the first one's class is its label."""
    label = found[0][0]
    several = len({index for index, _ in found})
    notes = (
        (f"boxes of {several} classes; its label is the first one's",)
        if several > 1
        else ()
    )
    return KnownTruth(label, tuple(box for _, box in found if box is not None), notes)
