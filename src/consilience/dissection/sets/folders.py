"""Concept sets in folders: masks by concept, and ADE20K as it is downloaded
(scene-parsing subset or full data set).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    refuse_missing,
    spec_of,
)
from consilience.files import read_json_data, read_text
from consilience.registry import option
from consilience.types import Array, ConsilienceError


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConsilienceError(
            f"concepts {folder.parent}: there is no folder {folder.name}"
        )
    return data.find_images([folder])


# ---- masks by concept


@concept_sets.register("folder")
@dataclass(frozen=True)
class MaskFolders:
    """``images/IMAGE.jpg`` with ``masks/CONCEPT/IMAGE.png`` or
    ``masks/CATEGORY/CONCEPT/IMAGE.png``.

    A mask is any image of any size that covers the image; what is not black is the
    concept.
    """

    path: str = option("", help="the folder with images and masks")

    def open(self) -> ConceptSet:
        """Find images and masks, and check that every mask has its image."""
        folder = Path(self.path)
        images = _images(folder / "images")
        names = tuple(
            file.relative_to(folder / "images").as_posix() for file in images
        )
        masks = sorted(
            file
            for file in (folder / "masks").rglob("*")
            if file.suffix.lower() == ".png" and not file.name.startswith(".")
        )
        if not masks:
            raise ConsilienceError(
                f"concepts {folder}: the folder masks holds no .png"
            )
        keys = list(dict.fromkeys(_key(file, folder / "masks") for file in masks))
        categories = tuple(dict.fromkeys(category for category, _ in keys))
        concepts = numbered(
            (name, category, number)
            for number, (category, name) in enumerate(keys, start=1)
        )
        source = _MaskSource(
            images, _by_image(masks, names, folder, categories, keys)
        )
        return ConceptSet(
            spec_of(self),
            concept_digest(names, keys, len(masks)),
            concepts,
            categories,
            names,
            source,
        )


def _key(mask: Path, folder: Path) -> tuple[str, str]:
    steps = mask.relative_to(folder).parts[:-1]
    if len(steps) not in (1, 2):
        raise ConsilienceError(
            f"{mask}: a mask lies in masks/CONCEPT or masks/CATEGORY/CONCEPT"
        )
    return (steps[0], steps[1]) if len(steps) == 2 else ("concept", steps[0])


def _by_image(
    masks: list[Path],
    names: tuple[str, ...],
    folder: Path,
    categories: tuple[str, ...],
    keys: list[tuple[str, str]],
) -> list[list[tuple[int, int, Path]]]:
    """A list an image of (category, number, mask file)."""
    stems = {Path(name).stem: place for place, name in enumerate(names)}
    if len(stems) < len(names):
        raise ConsilienceError(
            f"concepts {folder}: two images share a name, so their masks cannot be told apart"
        )
    found: list[list[tuple[int, int, Path]]] = [[] for _ in names]
    for mask in masks:
        if mask.stem not in stems:
            raise ConsilienceError(
                f"{mask}: there is no image {mask.stem!r} in images"
            )
        key = _key(mask, folder / "masks")
        found[stems[mask.stem]].append(
            (categories.index(key[0]), keys.index(key) + 1, mask)
        )
    return found


@dataclass(frozen=True, eq=False)
class _MaskSource(ImageSource):
    shown: list[Path]
    masks: list[list[tuple[int, int, Path]]]

    def image(self, index: int) -> Array:
        return images.read_pixels(self.shown[index])[0]

    def files(self, index: int) -> Sequence[Path]:
        return [self.shown[index], *(file for _, _, file in self.masks[index])]

    def planes(self, index: int) -> Sequence[Plane]:
        return [
            Plane(
                category,
                np.where(_shown(file, self.shown[index]), number, 0).astype(np.int64),
            )
            for category, number, file in self.masks[index]
        ]


def _shown(mask: Path, image: Path) -> Array:
    """Where a mask is not black, (H, W) bool."""
    values = images.read_label_map(mask, image)
    channels = values if values.ndim == 3 else values[:, :, None]
    shown: Array = np.asarray(channels.any(axis=2))
    return shown


# ---- ADE20K


@concept_sets.register("ade20k")
@dataclass(frozen=True)
class ADE20K:
    """ADE20K (Zhou et al., CVPR 2017) as downloaded.

    The scene-parsing subset (``ADEChallengeData2016``): ``images/SPLIT/*.jpg``,
    ``annotations/SPLIT/*.png`` with 0 to 150, and ``objectInfo150.txt``. The full data
    set: ``*.jpg`` with ``*_seg.png`` and ``*_parts_N.png`` beside it, number = R // 10
    * 256 + G, and the names in ``*.json`` (2021) or ``*_atr.txt`` (2016).
    """

    path: str = option("", help="the folder with images")
    split: str = option("", help="only images of this split (training, validation)")

    def open(self) -> ConceptSet:
        """Find images and maps, and read the names."""
        folder = Path(self.path)
        found = [
            file
            for file in _images(folder / "images")
            if file.suffix.lower() in (".jpg", ".jpeg")
        ]
        images = [
            file
            for file in found
            if self.split in ("", *file.relative_to(folder / "images").parts)
        ]
        if not images:
            raise ConsilienceError(
                f"concepts {folder}: images holds no "
                f".jpg{f' of split {self.split!r}' * bool(self.split)}"
            )
        names = tuple(
            file.relative_to(folder / "images").as_posix() for file in images
        )
        parsing = (folder / "objectInfo150.txt").is_file()
        return (
            self._parsing(folder, images, names)
            if parsing
            else self._full(images, names)
        )

    def _parsing(
        self, folder: Path, images: list[Path], names: tuple[str, ...]
    ) -> ConceptSet:
        maps = [(folder / "annotations" / name).with_suffix(".png") for name in names]
        refuse_missing(str(folder / "annotations"), maps)
        objects = _object_info(folder / "objectInfo150.txt")
        concepts = numbered(
            (name, "object", number) for number, name in sorted(objects.items())
        )
        digest = concept_digest(names, sorted(objects.items()))
        return ConceptSet(
            spec_of(self),
            digest,
            concepts,
            ("object",),
            names,
            _Parsing(images, maps),
        )

    def _full(self, images: list[Path], names: tuple[str, ...]) -> ConceptSet:
        maps = [_maps(file) for file in images]
        refuse_missing(self.path, [one[0] for one in maps])
        known: dict[str, dict[int, str]] = {"object": {}, "part": {}}
        for file, files in zip(images, maps, strict=True):
            _learn(known, file, files)
        listed = [
            (name, kind, number)
            for kind in known
            for number, name in sorted(known[kind].items())
        ]
        categories = tuple(kind for kind in known if known[kind])
        largest = max((number for _, _, number in listed), default=0)
        source = _Full(images, maps, categories)
        return ConceptSet(
            spec_of(self),
            concept_digest(names, listed),
            numbered(listed),
            categories,
            names,
            source,
            largest=max(largest, 6655),
        )


def _object_info(file: Path) -> dict[int, str]:
    """Number to name; lines of Idx, Ratio, Train, Val, [Stuff,] Name split by tabs."""
    found = {}
    for line in read_text(file).splitlines():
        cells = [cell.strip() for cell in line.split("\t") if cell.strip()]
        if len(cells) > 1 and cells[0].isdecimal():
            found[int(cells[0])] = cells[-1].split(",")[0].strip()
    if not found:
        raise ConsilienceError(f"{file} lists no numbers with names")
    return found


@dataclass(frozen=True, eq=False)
class _Parsing(ImageSource):
    shown: list[Path]
    maps: list[Path]

    def image(self, index: int) -> Array:
        return images.read_pixels(self.shown[index])[0]

    def files(self, index: int) -> Sequence[Path]:
        return [self.shown[index], self.maps[index]]

    def planes(self, index: int) -> Sequence[Plane]:
        return [Plane(0, one_channel(self.maps[index], self.shown[index]))]


def _maps(image: Path) -> list[Path]:
    """Its object map, then its maps of parts, parts of parts ..."""
    parts = sorted(image.parent.glob(f"{image.stem}_parts_*.png"))
    return [image.with_name(f"{image.stem}_seg.png"), *parts]


def _numbers(file: Path, image: Path) -> tuple[Array, Array]:
    """Class numbers and instance numbers (H, W)."""
    pixels = images.read_label_map(file, image)
    if pixels.ndim != 3:
        raise ConsilienceError(f"{file}: a map of ADE20K is RGB; it has one channel")
    return pixels[:, :, 0] // 10 * 256 + pixels[:, :, 1], pixels[:, :, 2]


def _learn(known: dict[str, dict[int, str]], image: Path, maps: list[Path]) -> None:
    """Which number has which name, from what lies beside an image."""
    told = image.with_suffix(".json")
    text = image.with_name(f"{image.stem}_atr.txt")
    if told.is_file():
        for kind, number, name in _from_json(told):
            known[kind].setdefault(number, name)
    elif text.is_file():
        _from_text(known, text, maps, image)
    else:
        raise ConsilienceError(
            f"{image}: neither {told.name} nor {text.name} lies beside it, so its labels have "
            f"no names"
        )


def _from_json(file: Path) -> Iterator[tuple[str, int, str]]:
    try:
        objects: Any = read_json_data(file)["annotation"]["object"]
        for item in objects:
            kind = "part" if item["parts"]["ispart"] else "object"
            yield kind, int(item["name_ndx"]), str(item["name"]).split(",")[0]
    except (KeyError, TypeError, ValueError) as error:
        raise ConsilienceError(
            f"{file} is not as ADE20K writes it: {type(error).__name__} {error}"
        ) from None


def _from_text(
    known: dict[str, dict[int, str]], file: Path, maps: list[Path], image: Path
) -> None:
    """Lines ``instance # part level # occluded # class # raw name # attributes``;
    instances are numbered level by level.
    """
    rows = [re.split(r"\s*#\s*", line) for line in read_text(file).splitlines()]
    for level, path in enumerate(maps):
        names = {
            int(row[0]): row[3].split(",")[0]
            for row in rows
            if len(row) > 3 and row[1].strip() == str(level)
        }
        _pair(known["part" if level else "object"], names, *_numbers(path, image))


def _pair(
    known: dict[int, str], names: dict[int, str], numbers: Array, instances: Array
) -> None:
    """The blue channel ranks a level's instances: its n-th value is the n-th line's."""
    shown = numbers > 0
    ranks = {
        int(value): place for place, value in enumerate(np.unique(instances[shown]))
    }
    order = sorted(names)
    for number, value in sorted(
        {
            (int(n), int(i))
            for n, i in zip(numbers[shown], instances[shown], strict=True)
        }
    ):
        if ranks[value] < len(order):
            known.setdefault(number, names[order[ranks[value]]])


@dataclass(frozen=True, eq=False)
class _Full(ImageSource):
    shown: list[Path]
    maps: list[list[Path]]
    categories: tuple[str, ...]

    def image(self, index: int) -> Array:
        return images.read_pixels(self.shown[index])[0]

    def files(self, index: int) -> Sequence[Path]:
        return [self.shown[index], *self.maps[index]]

    def planes(self, index: int) -> Sequence[Plane]:
        kinds = ["object", *("part" for _ in self.maps[index][1:])]
        return [
            Plane(self.categories.index(kind), _numbers(file, self.shown[index])[0])
            for kind, file in zip(kinds, self.maps[index], strict=True)
            if kind in self.categories
        ]
