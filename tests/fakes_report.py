"""A run that never ran: photographs of scikit-image, made-up maps and superpixels, and
numbers that follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import skimage
from PIL import Image
from scipy import ndimage
from scipy.stats import spearmanr
from skimage.segmentation import slic

PHOTOGRAPHS = (
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "astronaut.png",
)
SAID = {
    "chelsea.png": ("tabby, tabby cat", 0.62, "tabby, tabby cat", (110, 105)),
    "coffee.png": ("espresso", 0.913, "espresso", (105, 110)),
    "rocket.jpg": ("missile", 0.481, "projectile, missile", (90, 110)),
    "motorcycle_left.png": ("moped", 0.337, None, (130, 110)),
    "astronaut.png": ("military uniform", 0.094, "space suit", (120, 120)),
}
COLUMNS = ("Grad-CAM", "LIME")


@dataclass
class FakeItem:
    column: str
    values: Any
    mask: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    explainer: str = ""
    mask_rule: str = "top:0.2"
    target_name: str = ""
    score: float = 0.5
    seconds: float = 0.1
    passes: int = 2


@dataclass
class FakeRun:
    folder: Path
    manifest: dict[str, Any]
    samples: list[str]
    predictions: dict[str, dict[str, Any]]
    explanations: pd.DataFrame
    agreement: pd.DataFrame
    summary: pd.DataFrame
    audit: list[Any]
    kept: dict[str, Any]

    def load(self, name: str) -> Any:
        return self.kept[name]


@cache
def photograph(name: str, size: tuple[int, int] = (224, 224)) -> Any:
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(
        image.crop((left, top, left + side, top + side)).resize(
            size[::-1], Image.Resampling.LANCZOS
        )
    )


def blob(
    centre: tuple[float, float], size: tuple[int, int], seed: int, width: float = 38
) -> Any:
    rng = np.random.default_rng(seed)
    coarse = rng.random((7, 7)) * 0.35
    y, x = np.mgrid[: size[0], : size[1]]
    peak = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
    return (
        3.1
        * np.maximum(
            peak + ndimage.zoom(coarse, np.array(size) / 7, order=1) - 0.25, 0
        )
    ).astype(np.float32)


def top(values: Any, fraction: float = 0.2) -> Any:
    return values >= np.quantile(values, 1 - fraction)


def cam_item(
    column: str, centre: tuple[float, float], size: tuple[int, int], seed: int
) -> FakeItem:
    values = blob(centre, size, seed)
    return FakeItem(
        column,
        values,
        top(values),
        explainer=f"gradcam:layer=stage{seed}",
        seconds=0.08,
        passes=1,
    )


def lime_item(
    column: str, image: Any, centre: tuple[float, float], seed: int
) -> FakeItem:
    rng = np.random.default_rng(seed)
    segments = slic(image, n_segments=26, compactness=14, start_label=0)
    count = int(segments.max()) + 1
    calm = ndimage.mean(
        blob(centre, image.shape[:2], seed, 55), segments, np.arange(count)
    )
    weights = (0.05 * calm - 0.03 + rng.normal(0, 0.03, count)).astype(np.float32)
    chosen = np.argsort(-np.abs(weights))[:10]
    refit = np.zeros(count, np.float32)
    refit[chosen] = weights[chosen]
    extras = {"segments": segments, "weights": weights, "refit": refit}
    spec = "lime:samples=700,segments=quickshift(kernel_size=5,max_dist=150,ratio=.3),seed=1"
    return FakeItem(
        column,
        weights[segments],
        (refit > 0)[segments],
        extras,
        spec,
        "superpixels:k=10",
        seconds=4.83,
        passes=700,
    )


def compare(sample: str, a: FakeItem, b: FakeItem) -> dict[str, Any]:
    area_a, area_b = a.mask.mean(), b.mask.mean()
    union = (a.mask | b.mask).sum()
    iou = (a.mask & b.mask).sum() / union if union else np.nan
    chance = (
        area_a * area_b / (area_a + area_b - area_a * area_b) if union else np.nan
    )
    room = min(area_a, area_b) / max(area_a, area_b) - chance if union else 0
    row = {
        "sample": sample,
        "a": a.column,
        "b": b.column,
        "area_a": area_a,
        "area_b": area_b,
        "iou": iou,
        "expected_iou": chance,
    }
    row |= {
        "excess": (iou - chance) / (1 - chance),
        "excess_of_possible": (iou - chance) / room if room else np.nan,
        "p": 0.0123 if iou > chance else 0.61,
    }
    flat = np.ptp(a.values) == 0 or np.ptp(b.values) == 0
    row["spearman"] = (
        np.nan if flat else spearmanr(a.values.ravel(), b.values.ravel()).statistic
    )
    for percent in (10, 20, 30):
        one, two = (
            top(a.values, percent / 100),
            top(b.values + 1e-6 * a.values, percent / 100),
        )
        row[f"iou_at_{percent}"] = (one & two).sum() / (one | two).sum()
    return row | {"mismatch": ""}


def summarise(agreement: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (a, b), part in agreement.groupby(["a", "b"], sort=False):
        n, mean = len(part), part["iou"].mean()
        half = 2.776 * part["iou"].std() / np.sqrt(n) if n > 1 else np.nan
        excess = part["excess"].mean()
        spread = 2.776 * part["excess"].std() / np.sqrt(n) if n > 1 else np.nan
        verdict = (
            "shown" if excess > 0.03 else "below" if excess < -0.03 else "not-shown"
        )
        row = {
            "a": a,
            "b": b,
            "n": n,
            "iou_mean": mean,
            "iou_low": mean - half,
            "iou_high": mean + half,
        }
        row |= {"expected_mean": part["expected_iou"].mean(), "excess_mean": excess}
        row |= {
            "excess_low": excess - spread,
            "excess_high": excess + spread,
            "p_images": 0.0312 if n > 1 else np.nan,
        }
        rows.append(
            row
            | {
                "verdict": verdict if n > 1 else "untestable",
                "why": "" if n > 1 else "one-image",
                "mismatch": "",
            }
        )
    return pd.DataFrame(rows)


def finding(code: str, severity: str, message: str, where: str = "") -> Any:
    return SimpleNamespace(
        code=code,
        severity=severity,
        message=message,
        where=where,
        advice="Look again.",
    )


def stored(
    name: str,
    image: Any,
    centre: tuple[float, float],
    columns: tuple[str, ...],
    seed: int,
) -> Any:
    items = []
    for number, column in enumerate(columns):
        moved = (centre[0] + 9 * number, centre[1] - 7 * number)
        if column.startswith("LIME"):
            items.append(lime_item(column, image, centre, seed + number))
        else:
            items.append(cam_item(column, moved, image.shape[:2], seed + number))
    return SimpleNamespace(name=name, image=image, items=tuple(items), notes=())


def run_of(
    kept: dict[str, Any],
    folder: Path,
    said: dict[str, dict[str, Any]] | None = None,
    **manifest: Any,
) -> FakeRun:
    """A run of stored samples with everything that follows from them."""
    agreement = pd.DataFrame(
        [
            compare(name, a, b)
            for name, one in kept.items()
            for a, b in combinations([i for i in one.items if i.mask is not None], 2)
        ]
    )
    first = next(iter(kept.values()))
    model = "efficientnet_lite0@3f2a9c1d"
    columns = [
        {
            "name": i.column,
            "explainer": i.explainer,
            "model": model,
            "view": "crop",
            "mask": i.mask_rule,
        }
        for i in first.items
    ]
    facts = {
        "engine": "openvino",
        "precision": "f32",
        "device": "cpu",
        "weights": "ImageNet-1k (efficientnet-lite0)",
        "input": 224,
    }
    whole = {
        "schema": 1,
        "version": "0.1.0",
        "created": "2026-11-22T21:40:07+00:00",
        "command": "consilience explain photographs --by gradcam --by lime:samples=700,seed=1 -o RUN",
        "title": "Explanations compared",
        "model": {
            "spec": "efficientnet_lite0",
            "id": model,
            "facts": facts,
            "classes_count": 1000,
        },
        "columns": columns,
        "target": "predicted",
        "view": "crop",
        "seconds": 31.4,
        "failures": [],
        "preset": None,
        "note": "",
        **manifest,
    }
    rows = [
        {"sample": name, "column": i.column, "seconds": i.seconds, "passes": i.passes}
        for name, one in kept.items()
        for i in one.items
    ]
    said = said or {
        name: {"label": "tabby", "probability": 0.5, "true": None, "right": None}
        for name in kept
    }
    summary = summarise(agreement) if len(agreement) else pd.DataFrame()
    return FakeRun(
        folder,
        whole,
        list(kept),
        said,
        pd.DataFrame(rows),
        agreement,
        summary,
        [],
        kept,
    )


def photographs(
    folder: Path, columns: tuple[str, ...] = COLUMNS, **manifest: Any
) -> FakeRun:
    """Five photographs, explained as plausibly as can be without a model."""
    kept, said = {}, {}
    for number, name in enumerate(PHOTOGRAPHS):
        label, probability, true, centre = SAID[name]
        kept[name] = stored(name, photograph(name), centre, columns, 10 * number)
        said[name] = {
            "label": label,
            "probability": probability,
            "true": true,
            "right": None if true is None else true == label,
        }
    run = run_of(kept, folder, said, **manifest)
    run.audit = [
        finding(
            "mask-areas",
            "warning",
            "the masks of LIME cover 21 % to 52 % of an image, those of Grad-CAM 20 %; the "
            "IoU mixes size with place. Read the"
            " IoU at matched areas beside it.",
            "Grad-CAM, LIME",
        ),
        finding(
            "few-images",
            "note",
            "5 images give an interval of about ±0.1 on a mean IoU.",
        ),
    ]
    return run
