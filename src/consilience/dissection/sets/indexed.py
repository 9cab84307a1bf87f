"""Index masks: one image of class numbers a photograph, as Pascal VOC, Cityscapes and
CamVid have them, with a list of what the numbers are called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consilience import data, images
from consilience.dissection.concepts import (
    ConceptSet,
    ImageSource,
    Plane,
    concept_digest,
    concept_sets,
    numbered,
    one_channel,
    spec_of,
)
from consilience.files import read_csv_records, read_json_data, read_text
from consilience.registry import option
from consilience.types import Array, ConsilienceError

VOC_IMAGES, VOC_LABELS = "JPEGImages", "SegmentationClass"
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car"),
    *("cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Classes of Pascal VOC's SegmentationClass by number (Everingham et al., IJCV 2010)."""

NAMES = ("names.txt", "names.json", "names.csv", "classes.txt", "label_colors.txt")
"""Where a list of names is looked for."""

_NUMBERED = re.compile(r"(?P<number>\d+)[\s,:;]+(?P<name>\S.*)")
_COLOURED = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(?P<name>\S.*)")

Colour = tuple[int, int, int]


@concept_sets.register("indexed")
@dataclass(frozen=True)
class IndexedMasks:
    """``images/IMAGE.jpg`` with ``labels/IMAGE.png``, which holds a class number at
    every pixel (grey of 8 or 16 bits, or a palette's indices), and ``names.txt``.

    The names are one a line from number 0, or ``NUMBER NAME``, or JSON or CSV of number
    and name, or, for masks in colours, ``R G B NAME`` (CamVid). ``-`` names nothing: as
    the numbers to ``ignore``, those pixels are unlabelled. A folder with ``JPEGImages``
    and ``SegmentationClass`` is Pascal VOC's and needs no names. Images without a mask
    are passed over, with a count.
    """

    path: str = option("", help="the folder that holds them")
    images: str = option("", help="the folder of images, within it or elsewhere")
    labels: str = option("", help="the folder of masks of numbers")
    names: str = option("", help="the file of names")
    image_ending: str = option(
        "", help="what follows an image's own name: _leftImg8bit of Cityscapes"
    )
    label_ending: str = option(
        "", help="what follows it in its mask's name: _gtFine_labelIds of Cityscapes"
    )
    ignore: tuple[int, ...] = option(
        (255,), help="numbers that are unlabelled pixels, joined by +"
    )
    category: str = option("object", help="what the concepts are called together")

    def open(self) -> ConceptSet:
        """Find images, masks and names, and pair them."""
        folder = Path(self.path)
        shown, masks, left = self._paired(
            _folder(folder, self.images, ("images", VOC_IMAGES)),
            _folder(folder, self.labels, ("labels", VOC_LABELS, "masks")),
        )
        listed = self._listed(folder)
        names = tuple(one.as_posix() for one in shown)
        base = _folder(folder, self.images, ("images", VOC_IMAGES))
        rows = [
            (name, self.category, number + 1)
            for number, name in sorted(listed.names.items())
            if number not in self.ignore
        ]
        source = _IndexSource(
            [base / one for one in shown], masks, listed, frozenset(self.ignore)
        )
        notes = (f"{left} images have no mask and are passed over",) if left else ()
        return ConceptSet(
            spec_of(self),
            concept_digest(names, rows, sorted(listed.colours.items()), self.ignore),
            numbered(rows),
            (self.category,),
            names,
            source,
            notes=notes,
            largest=max(listed.names) + 1,
        )

    def _paired(self, base: Path, labels: Path) -> tuple[list[Path], list[Path], int]:
        """Images (relative to their folder) that have a mask, those masks, and how many
        have none.
        """
        masks = {
            _own_name(file.relative_to(labels), self.label_ending): file
            for file in sorted(labels.rglob("*"))
            if file.suffix.lower() in MASK_SUFFIXES
            and file.stem.endswith(self.label_ending)
        }
        shown = [file.relative_to(base) for file in data.find_images([base])]
        pairs = [
            (one, masks[_own_name(one, self.image_ending)])
            for one in shown
            if _own_name(one, self.image_ending) in masks
        ]
        if not pairs:
            first = next(iter(masks), "none")
            raise ConsilienceError(
                f"concepts {self.path}: none of {len(shown)} images in {base.name} has a "
                f"mask in {labels.name} (an image {shown[0]}, a mask {first}); image_ending= "
                f"and label_ending= say what their names do not share"
            )
        unmatched = len(masks) - len(pairs)
        if unmatched > 0:
            raise ConsilienceError(
                f"concepts {self.path}: {unmatched} of {len(masks)} masks have no image"
            )
        return (
            [one for one, _ in pairs],
            [mask for _, mask in pairs],
            len(shown) - len(pairs),
        )

    def _listed(self, folder: Path) -> ClassList:
        if self.names:
            file = Path(self.names)
            return read_class_list(
                file if file.is_absolute() else _there(folder, file)
            )
        for name in NAMES:
            if (folder / name).is_file():
                return read_class_list(folder / name)
        if (folder / VOC_LABELS).is_dir():
            return ClassList(dict(enumerate(("-", *VOC[1:]))))
        raise ConsilienceError(
            f"concepts {folder}: no list of what the numbers are called ({', '.join(NAMES)}); "
            f"names= names one"
        )


MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Formats that keep numbers as they are; a JPEG does not."""


def _there(folder: Path, file: Path) -> Path:
    return folder / file if (folder / file).is_file() else file


def _folder(folder: Path, given: str, usual: Sequence[str]) -> Path:
    """The folder that is given, within ``folder`` or elsewhere, or the usual one."""
    for one in (given,) if given else usual:
        for there in (folder / one, Path(one)):
            if there.is_dir() and (given or there.parent == folder):
                return there
    raise ConsilienceError(
        f"concepts {folder}: there is no folder {given or ' or '.join(usual)}"
    )


def _own_name(file: Path, ending: str) -> str:
    """A file's name, with its folders, without suffix and ending."""
    return file.with_suffix("").as_posix().removesuffix(ending)


# ---- names


@dataclass(frozen=True)
class ClassList:
    """Names by number; ``colours`` are the numbers of masks in colours; ``whole`` says
    that any other number is a mistake.
    """

    names: dict[int, str]
    colours: dict[Colour, int] = field(default_factory=dict)
    whole: bool = True


def read_class_list(file: Path) -> ClassList:
    """Names of class numbers from a text, JSON or CSV file; raises `ConsilienceError`
    where it is none.
    """
    readers: dict[str, Any] = {".json": _json_list, ".csv": _csv_list}
    try:
        listed: ClassList = readers.get(file.suffix.lower(), _text_list)(file)
    except ConsilienceError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration):
        raise ConsilienceError(
            f"{file} is no list of class numbers and names"
        ) from None
    if not listed.names:
        raise ConsilienceError(f"{file} names no class")
    return listed


def _text_list(file: Path) -> ClassList:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    coloured = [_COLOURED.fullmatch(line) for line in lines]
    if lines and all(coloured):
        found = [one for one in coloured if one]
        colours = {
            (int(one[1]), int(one[2]), int(one[3])): number
            for number, one in enumerate(found)
        }
        if len(colours) < len(found):
            raise ConsilienceError(f"{file} gives one colour to two names")
        return ClassList(
            {number: one["name"].strip() for number, one in enumerate(found)}, colours
        )
    told = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(told):
        return ClassList(
            {int(one["number"]): one["name"].strip() for one in told if one},
            whole=False,
        )
    return ClassList(dict(enumerate(lines)))


def _json_list(file: Path) -> ClassList:
    told = read_json_data(file)
    if isinstance(told, list):
        return ClassList({number: str(name) for number, name in enumerate(told)})
    names = {int(number): str(name) for number, name in told.items()}
    return ClassList(names, whole=False)


def _csv_list(file: Path) -> ClassList:
    rows = read_csv_records(file)
    columns = list(rows[0]) if rows else []
    number = next(
        one for one in ("number", "id", "index", *columns) if one in columns
    )
    name = next(
        one for one in ("name", "label", "class", *columns[1:]) if one in columns
    )
    names = {int(row[number]): row[name] for row in rows}
    return ClassList(names, whole=False)


# ---- the source


@dataclass(frozen=True, eq=False)
class _IndexSource(ImageSource):
    shown: list[Path]
    masks: list[Path]
    listed: ClassList
    ignore: frozenset[int]

    def image(self, index: int) -> Array:
        return images.read_pixels(self.shown[index])[0]

    def files(self, index: int) -> Sequence[Path]:
        return [self.shown[index], self.masks[index]]

    def planes(self, index: int) -> Sequence[Plane]:
        """Numbers plus one, so that 0 is unlabelled."""
        mask, image = self.masks[index], self.shown[index]
        numbers = (
            self._from_colours(images.read_label_map(mask, image), mask)
            if self.listed.colours
            else one_channel(mask, image)
        )
        known = np.isin(numbers, [*self.listed.names, *self.ignore, -1])
        if self.listed.whole and not known.all():
            raise ConsilienceError(
                f"{mask} holds the number {int(numbers[~known].min())}, which has no name; "
                f"names go from 0 to {max(self.listed.names)} (ignore= leaves numbers out)"
            )
        named = [
            number
            for number, name in self.listed.names.items()
            if number not in self.ignore and name.strip() not in ("", "-")
        ]
        return [Plane(0, np.where(np.isin(numbers, named), numbers + 1, 0))]

    def _from_colours(self, values: Array, mask: Path) -> Array:
        """Numbers (H, W) of colours (H, W, 3); -1 where a colour has no name."""
        if values.ndim != 3:
            raise ConsilienceError(
                f"{mask} has one channel; its list names colours (R G B NAME)"
            )
        packed = values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
        numbers = np.full(packed.shape, -1, dtype=np.int64)
        for (red, green, blue), number in self.listed.colours.items():
            numbers[packed == red << 16 | green << 8 | blue] = number
        return numbers
