"""The top images of a unit, cut by its mask, as one small strip: what a person looks at
to judge a label.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from consilience import images, progress
from consilience.dissection.concepts import ConceptSet
from consilience.dissection.result import Dissection
from consilience.dissection.tally import unit_masks
from consilience.files import file_stem, write_bytes
from consilience.show import colours
from consilience.types import Array, Network

FOLDER = "tiles"
SIDE, GAP, IMAGES, UNITS, QUALITY = 88, 3, 4, 300, 72
"""Pixels of a tile and between tiles, tiles in a strip, strips in a page (some 8 kB
each), and the quality they are kept in.
"""
WIDTH = IMAGES * (SIDE + GAP) - GAP

UnitKey = tuple[str, int]


def strip_path(folder: Path, layer: str, unit: int) -> Path:
    """Where a unit's strip is kept."""
    return folder / FOLDER / file_stem(layer) / f"{unit}.webp"


def shown_units(found: Dissection, most: int = UNITS) -> list[UnitKey]:
    """The units that get a strip: detectors first, then by IoU, the best of every layer
    alike.
    """
    share = max(1, most // max(1, len(found.layers)))
    units: list[UnitKey] = []
    for layer in found.layers:
        rows = found.table()
        rows = rows[rows["layer"] == layer.layer].sort_values(
            ["detector", "iou"], ascending=False, kind="stable"
        )
        units += [(layer.layer, int(unit)) for unit in rows["unit"].head(share)]
    return units


def draw_tiles(
    model: Network,
    found: Dissection,
    concepts: ConceptSet,
    folder: Path,
    most: int = UNITS,
) -> dict[str, Any]:
    """Draw and keep the strips that are not there yet; returns how many units are shown
    and how many are left out.

    Memory: one strip (31 kB) for each unit shown.
    """
    units = shown_units(found, most)
    missing = [unit for unit in units if not strip_path(folder, *unit).is_file()]
    if missing:
        for (layer, unit), strip in _strips(model, found, concepts, missing).items():
            write_bytes(strip_path(folder, layer, unit), _webp(strip))
    whole = sum(layer.units for layer in found.layers)
    return {
        "shown": len(units),
        "left_out": whole - len(units),
        "width": WIDTH,
        "height": SIDE,
    }


def _webp(strip: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Wanted:
    """A tile: of which unit, and the place in its strip."""

    unit: UnitKey
    place: int


def _strips(
    model: Network, found: Dissection, concepts: ConceptSet, units: Sequence[UnitKey]
) -> dict[UnitKey, Array]:
    """Strips (SIDE, WIDTH, 3) uint8 by unit; an image is shown to the model once,
    whoever wants it.
    """
    by_image = _wanted(found.top(), set(units))
    strips: dict[UnitKey, Array] = {
        unit: np.full((SIDE, WIDTH, 3), 255, np.uint8) for unit in units
    }
    layers = list(dict.fromkeys(layer for layer, _ in units))
    view = found.facts.get("view", "squash")
    with progress.task("drawing units", len(by_image)) as running:
        for chunk in _chunks(sorted(by_image), max(1, model.batch)):
            views = [model.view(concepts.sample(index), view) for index in chunk]
            maps = model.activations(torch.cat([one.pixels for one in views]), layers)
            for row, (index, shown) in enumerate(zip(chunk, views, strict=True)):
                image = images.resize(
                    (shown.rgb * 255).round().astype(np.uint8),
                    (SIDE, SIDE),
                )
                _cut(
                    strips,
                    by_image[index],
                    image,
                    {layer: maps[layer][row] for layer in layers},
                    found,
                )
            running.advance(len(chunk))
    return strips


def _wanted(top: pd.DataFrame, units: set[UnitKey]) -> dict[int, list[_Wanted]]:
    wanted: dict[int, list[_Wanted]] = {}
    counts: dict[UnitKey, int] = {}
    for layer, number, index in zip(
        top["layer"], top["unit"], top["index"], strict=True
    ):
        unit = (str(layer), int(number))
        place = counts.get(unit, 0)
        if unit in units and place < IMAGES and index >= 0:
            counts[unit] = place + 1
            wanted.setdefault(int(index), []).append(_Wanted(unit, place))
    return wanted


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(
    strips: dict[UnitKey, Array],
    wanted: Sequence[_Wanted],
    image: Array,
    maps: Mapping[str, torch.Tensor],
    found: Dissection,
) -> None:
    """Draw one image into the strips that want it, cut by each unit's mask."""
    upsample = found.facts.get("upsample", "half-pixel")
    for one in wanted:
        layer, unit = one.unit
        values = maps[layer][unit : unit + 1]
        threshold = values.new_tensor([float(found.layer(layer).thresholds[unit])])
        on = np.asarray(unit_masks(values, threshold, (SIDE, SIDE), upsample)[0])
        tile = colours.mask(image, on.astype(bool))
        left = one.place * (SIDE + GAP)
        strips[one.unit][:, left : left + SIDE] = tile
