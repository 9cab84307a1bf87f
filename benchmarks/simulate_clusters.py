"""How often `consilience clusters` finds groups that are there, and that are not.

A linear head on EfficientNet-Lite0's last map is trained to tell a category, half of whose
images carry a mark, from the same category without it and from others; or nothing is marked.
The class's own evidence maps (the head's weights over the last map, with their signs) are
then grouped.

    python benchmarks/simulate_clusters.py IMAGES

IMAGES is a folder with a folder a class, or with files ``CLASS_*.jpg``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulate_shortcuts import _class_of, _fitted
from sklearn.metrics import adjusted_rand_score

import consilience as cs
from consilience import registry
from consilience.diagnosis.clusters import cluster_maps, on_grid

MARKS = ("logo", "imagenet-w", "stamp")
LAYER = "bn2.act"


def activations(folder: Path) -> dict[str, Any]:
    """The last map of every image, plain and marked."""
    network = cs.load_model("efficientnet_lite0")
    files = sorted(folder.rglob("*.jpg"))
    pixels = torch.cat([network.view(cs.read_image(file)).pixels for file in files])
    found: dict[str, Any] = {
        "labels": np.array([_class_of(f, folder) for f in files])
    }
    for spec in ("", *MARKS):
        mark = registry.marks.build(spec) if spec else None
        parts = [
            network.activations(
                part if mark is None else mark.paint(part, 0).marked, [LAYER]
            )[LAYER].half()
            for part in pixels.split(32)
        ]
        found[spec] = torch.cat(parts).numpy()
    return found


def maps_of(known: Any, rng: Any, mark: str, classes: int = 8) -> tuple[Any, Any]:
    """Evidence maps of a category's images, and which of them are marked."""
    names = rng.choice(np.unique(known["labels"]), classes - 1, replace=False)
    rows = np.flatnonzero(np.isin(known["labels"], names))
    own = np.flatnonzero(known["labels"] == names[0])
    marked = rng.permutation(len(own)) < len(own) // 2
    maps = known[""][own].astype(np.float32)
    if mark:
        maps[marked] = known[mark][own[marked]]
    x = known[""][rows].astype(np.float32).mean((2, 3))
    y = 1 + np.array([list(names).index(known["labels"][row]) for row in rows])
    features = np.concatenate([x, maps.mean((2, 3))])
    wanted = np.concatenate([y, np.zeros(len(own), int)])
    weights, _ = _fitted(features, wanted, classes)
    return np.einsum("nchw,c->nhw", maps, weights[:, 0]), marked


def main() -> None:
    """Print how often groups were shown, and whether they were the marked half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--heads", type=int, default=40)
    asked = parser.parse_args()
    known = activations(asked.images)
    for mark in ("", *MARKS):
        rng, shown, agreed = np.random.default_rng(1), 0, []
        heads = asked.heads if not mark else asked.heads // 2
        for _ in range(heads):
            maps, marked = maps_of(known, rng, mark)
            grids = np.stack([on_grid(one) for one in maps])
            found = cluster_maps(grids, [str(n) for n in range(len(maps))], nulls=99)
            shown += found.count > 1
            if found.count > 1:
                agreed.append(adjusted_rand_score(marked, found.labels))
        said = f", adjusted Rand {np.round(np.median(agreed), 2)}" if agreed else ""
        print(f"{mark or 'no mark'}: groups in {shown} of {heads}{said}", flush=True)


if __name__ == "__main__":
    main()
