"""COCO as downloaded: instance annotations (through pycocotools) or panoptic ones (PNG
files beside the JSON).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from consilience import images
from consilience.dissection.concepts import (
    ConceptSet,
    ImageSource,
    Plane,
    concept_digest,
    concept_sets,
    numbered,
    refuse_missing,
    spec_of,
)
from consilience.files import inside, read_json_data
from consilience.registry import option
from consilience.types import Array, ConsilienceError

COCO_KINDS = ("object", "stuff")


@concept_sets.register("coco")
@dataclass(frozen=True)
class Coco:
    """A COCO JSON file; ``images`` is the folder of images, ``masks`` the folder of
    panoptic PNG files.

    Without ``images``, it is looked for beside the annotations' folder under the name
    that COCO gives it (``val2017`` for ``instances_val2017.json``); without ``masks``,
    the folder named as the JSON file is taken, as COCO unpacks it. Crowds count as
    their class. Things are the category ``object``, ``stuff`` is the other.
    """

    path: str = option("", help="the JSON file")
    images: str = option(
        "", help="folder of the images; empty: found beside", formerly="pictures"
    )
    masks: str = option(
        "", help="folder of the panoptic PNG files; empty: found beside"
    )

    def open(self) -> ConceptSet:
        """Read the annotations and check that images and maps are there."""
        file = Path(self.path)
        told = _read(file)
        panoptic = any("segments_info" in item for item in told["annotations"])
        folder = self._images(file)
        shown: dict[int, list[Any]] = {}
        for item in told["annotations"]:
            shown.setdefault(int(item["image_id"]), []).append(item)
        images = [item for item in told["images"] if int(item["id"]) in shown]
        refuse_missing(
            str(folder),
            [inside(folder, item["file_name"], "the COCO file") for item in images],
        )
        rows = [
            (
                str(item["name"]),
                COCO_KINDS[not item.get("isthing", 1)],
                int(item["id"]),
            )
            for item in told["categories"]
        ]
        categories = tuple(
            kind for kind in COCO_KINDS if kind in {row[1] for row in rows}
        )
        known = {number: categories.index(kind) for _, kind, number in rows}
        _refuse_unknown(file, shown, known)
        annotations = [shown[int(item["id"])] for item in images]
        source: Any = _Instances(folder, images, annotations, known)
        if panoptic:
            source = _Panoptic(folder, images, annotations, known, self._masks(file))
            refuse_missing(
                str(source.maps),
                [source.maps / one[0]["file_name"] for one in annotations],
            )
        else:
            _masks_module()
        names = tuple(str(item["file_name"]) for item in images)
        return ConceptSet(
            spec_of(self),
            concept_digest(names, rows, file.read_bytes()),
            numbered(rows),
            categories,
            names,
            source,
        )

    def _images(self, file: Path) -> Path:
        if self.images:
            return Path(self.images)
        split = file.stem.rpartition("_")[2]
        near = [
            file.parent / split,
            file.parent.parent / split,
            file.parent.parent / "images" / split,
        ]
        found = next((folder for folder in near if folder.is_dir()), None)
        if found is None:
            raise ConsilienceError(
                f"{file}: no folder {split} beside it; name the folder of images: "
                f"coco:{file},images=DIR"
            )
        return found

    def _masks(self, file: Path) -> Path:
        folder = Path(self.masks) if self.masks else file.with_suffix("")
        if not folder.is_dir():
            raise ConsilienceError(
                f"{file}: no folder {folder.name} beside it; name the panoptic maps: "
                f"coco:{file},masks=DIR"
            )
        return folder


def _read(file: Path) -> dict[str, Any]:
    told = read_json_data(file)
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(told, dict) or key not in told
    ]
    if missing:
        raise ConsilienceError(
            f"{file} is no COCO file: it lacks {', '.join(missing)}"
        )
    return dict(told)


def _refuse_unknown(
    file: Path, shown: dict[int, list[Any]], known: dict[int, int]
) -> None:
    for image, items in shown.items():
        for item in items:
            for part in item.get("segments_info", [item]):
                if int(part["category_id"]) not in known:
                    raise ConsilienceError(
                        f"{file}: image {image} shows category {part['category_id']}, which "
                        f"has no name"
                    )


@cache
def _masks_module() -> Any:
    try:
        return import_module("pycocotools.mask")
    except ImportError:
        raise ConsilienceError(
            "COCO's masks need pycocotools: pip install 'consilience[coco]'"
        ) from None


@dataclass(frozen=True, eq=False)
class _Instances(ImageSource):
    folder: Path
    images: list[Any]
    annotations: list[list[Any]]
    known: dict[int, int]

    def image(self, index: int) -> Array:
        return images.read_pixels(
            inside(self.folder, self.images[index]["file_name"], "the COCO file")
        )[0]

    def files(self, index: int) -> Sequence[Path]:
        return [inside(self.folder, self.images[index]["file_name"], "the COCO file")]

    def planes(self, index: int) -> Sequence[Plane]:
        size = int(self.images[index]["height"]), int(self.images[index]["width"])
        masks: dict[int, Array] = {}
        for item in self.annotations[index]:
            number = int(item["category_id"])
            masks[number] = masks.get(number, np.zeros(size, dtype=bool)) | _decoded(
                item["segmentation"], size
            )
        name = self.images[index]["file_name"]
        return [
            Plane(
                self.known[number],
                images.turned_like(
                    np.where(mask, number, 0).astype(np.int64),
                    f"the annotation of {name}",
                    self.folder / name,
                ),
            )
            for number, mask in masks.items()
        ]


def _decoded(segmentation: Any, size: tuple[int, int]) -> Array:
    """Polygons, or run lengths with or without compression, as (H, W) bool."""
    module = _masks_module()
    if isinstance(segmentation, list):
        coded = module.merge(module.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        coded = module.frPyObjects(segmentation, *size)
    else:
        coded = segmentation
    mask: Array = module.decode(coded).astype(bool)
    return mask


@dataclass(frozen=True, eq=False)
class _Panoptic(ImageSource):
    folder: Path
    images: list[Any]
    annotations: list[list[Any]]
    known: dict[int, int]
    maps: Path

    def image(self, index: int) -> Array:
        return images.read_pixels(
            inside(self.folder, self.images[index]["file_name"], "the COCO file")
        )[0]

    def files(self, index: int) -> Sequence[Path]:
        photograph = inside(
            self.folder, self.images[index]["file_name"], "the COCO file"
        )
        return [photograph, self.maps / self.annotations[index][0]["file_name"]]

    def planes(self, index: int) -> Sequence[Plane]:
        """Segment numbers R + 256 G + 65536 B become the numbers of their classes."""
        item = self.annotations[index][0]
        pixels = images.read_label_map(
            self.maps / item["file_name"],
            inside(self.folder, self.images[index]["file_name"], "the COCO file"),
        )
        segments = pixels[:, :, 0] + 256 * pixels[:, :, 1] + 65536 * pixels[:, :, 2]
        numbers = {
            int(part["id"]): int(part["category_id"])
            for part in item["segments_info"]
        }
        found, inverse = np.unique(segments, return_inverse=True)
        classes = np.array([numbers.get(int(one), 0) for one in found])[
            inverse
        ].reshape(segments.shape)
        kinds = np.array(
            [self.known.get(int(one), -1) for one in range(int(classes.max()) + 1)]
        )[classes]
        return [
            Plane(kind, np.where(kinds == kind, classes, 0))
            for kind in sorted(set(self.known.values()))
        ]
