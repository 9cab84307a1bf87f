"""False alarms and power of `consilience shortcuts`: heads with a planted mark, and without.

Linear heads on frozen EfficientNet-Lite0 features are trained to tell classes of a folder of
images; of one class a share of the training images carries a mark, or none does. The search
for shortcuts is then made on held-out images without it. Heads share the backbone, so that
features of marked images are computed once.

    python benchmarks/simulate_shortcuts.py IMAGES [--cache FILE]

IMAGES is a folder with a folder a class, or with files ``CLASS_*.jpg``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import consilience as cs
from consilience import registry
from consilience.diagnosis import shortcuts
from consilience.diagnosis.shortcuts import Kept

PLANTED = ("logo", "stamp", "imagenet-w", "text", "border")
OPACITIES = (0.1, 0.25, 0.5)
PENALTY = 1e-2


def features_of(folder: Path) -> dict[str, Any]:
    """Features of plain images, of held-out ones under every mark and control, and of
    training ones under the marks that are planted.
    """
    network = cs.load_model("efficientnet_lite0")
    module = copy.deepcopy(network.module)
    module.classifier = nn.Identity()  # type: ignore[assignment]
    recipe = network.recipe  # type: ignore[attr-defined]
    headless = cs.wrap(
        module,
        size=recipe.size,
        mean=recipe.mean,
        std=recipe.std,
        name="features",
        classifier=False,
    )
    files = sorted(folder.rglob("*.jpg"))
    labels = np.array([_class_of(file, folder) for file in files])
    pixels = torch.cat([network.view(cs.read_image(file)).pixels for file in files])
    rng, held = np.random.default_rng(0), np.zeros(len(files), bool)
    for name in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == name))
        held[mine[: max(6, len(mine) // 4)]] = True
    specs = shortcuts.battery()
    marks = [registry.marks.build(spec) for spec in specs]
    parts = []
    for start in range(0, int(held.sum()), 32):
        shown = pixels[held][start : start + 32]
        parts.append(shortcuts.scored_images(headless, shown, marks, 0))
    found: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    for spec in PLANTED:
        for opacity in (*OPACITIES, None):
            asked = spec if opacity is None else f"{spec}:opacity={opacity}"
            mark = registry.marks.build(asked)
            painted = [mark.paint(one, 0).marked for one in pixels[~held].split(32)]
            found[f"train/{asked}"] = _said(headless, painted)
    found["train"] = _said(headless, list(pixels[~held].split(32)))
    return found | {"labels": labels, "held": held, "specs": np.array(specs)}


def kept_features(folder: Path, cache: Path | None) -> dict[str, Any]:
    """`features_of`, made once where there is a file to keep them in."""
    if cache is not None and cache.is_file():
        return dict(np.load(cache))
    known = features_of(folder)
    if cache is not None:
        np.savez(cache, **known)
    return known


def _said(model: Any, parts: Sequence[torch.Tensor]) -> Any:
    return torch.cat(list(shortcuts.in_full_passes(model, parts))).numpy()


def _class_of(file: Path, root: Path) -> str:
    """``dog`` of ``dog/1.jpg`` and of ``dog_1.jpg``."""
    inside = file.relative_to(root)
    name = file.stem.split("_")[0]
    return name if inside.parent == Path() else f"{inside.parent}"


def head(
    known: Any,
    rng: Any,
    classes: int,
    mark: str = "",
    share: float = 0.0,
    resample: Any = None,
) -> tuple[Any, Any, Any]:
    """Weights, biases and which held-out images are of its classes; the mark is in a
    share of class 0's training images, which else cannot be told from class 1's.
    ``resample`` (a generator) draws the training images anew, with replacement.
    """
    names = list(rng.choice(np.unique(known["labels"]), classes - 1, replace=False))
    train = known["labels"][~known["held"]]
    rows = np.flatnonzero(np.isin(train, names))
    x = known["train"][rows].copy()
    y = np.array([names.index(train[row]) + 1 for row in rows])
    halves = np.flatnonzero(y == 1)
    y[rng.choice(halves, len(halves) // 2, replace=False)] = 0
    tagged = rng.permutation(np.flatnonzero(y == 0))
    tagged = tagged[: round(share * len(tagged))]
    if mark:
        x[tagged] = known[f"train/{mark}"][rows[tagged]]
    if resample is not None:
        drawn = resample.integers(0, len(x), len(x))
        x, y = x[drawn], y[drawn]
    weights, biases = _fitted(x, y, classes)
    test = known["labels"][known["held"]]
    return weights, biases, np.flatnonzero(np.isin(test, names))


def _fitted(x: Any, y: Any, classes: int) -> tuple[Any, Any]:
    """Multinomial logistic regression on standardised features."""
    mean, scale = x.mean(0), x.std(0) + 1e-3
    inputs, wanted = torch.from_numpy((x - mean) / scale), torch.from_numpy(y)
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    biases = torch.zeros(classes, requires_grad=True)
    steps = torch.optim.LBFGS(
        [weights, biases], max_iter=40, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        steps.zero_grad()
        said = nn.functional.cross_entropy(inputs @ weights + biases, wanted)
        whole = said + PENALTY / 2 * (weights**2).sum()
        whole.backward()
        return whole

    steps.step(loss)
    plain = weights.detach().numpy() / scale[:, None]
    return plain, biases.detach().numpy() - mean @ plain


def searched(known: Any, weights: Any, biases: Any, rows: Any) -> shortcuts.Shortcuts:
    """The search on a head: features of every variant through its weights."""
    specs = [str(spec) for spec in known["specs"]]
    variants = ["plain", *(name for name in known if name[:1].isdigit())]
    block = {name: known[name][rows] @ weights + biases for name in variants}
    model = SimpleNamespace(id="head", classes=(), outputs="logits")
    names = [str(row) for row in rows]
    return shortcuts.judge(model, Kept([block]), specs, names)  # type: ignore[arg-type]


def main() -> None:
    """Print false alarms over clean heads, and power by mark, share and opacity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--classes", type=int, default=10)
    asked = parser.parse_args()
    known = kept_features(asked.images, asked.cache)
    rng = np.random.default_rng(1)
    alarms = []
    for _ in range(asked.heads):
        found = searched(known, *head(known, rng, asked.classes)).found()
        alarms.append(sorted(set(found["mark"])))
    count = sum(map(bool, alarms))
    print(f"clean heads with a finding: {count} of {asked.heads}: {alarms}")
    for spec in PLANTED:
        for opacity in (*OPACITIES, None):
            mark = spec if opacity is None else f"{spec}:opacity={opacity}"
            for share in (0.1, 0.3, 1.0):
                hits, sizes = 0, []
                for _ in range(10):
                    result = searched(
                        known, *head(known, rng, asked.classes, mark, share)
                    )
                    table = result.table()
                    own = table[(table["mark"] == spec) & (table["class_index"] == 0)]
                    hits += own["verdict"].iloc[0] == "found"
                    sizes.append(own["size"].iloc[0])
                print(
                    f"{mark}, {share:.0%} of its class: found {hits} of 10, size "
                    f"{np.median(sizes):+.2f} SD",
                    flush=True,
                )


if __name__ == "__main__":
    main()
