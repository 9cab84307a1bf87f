"""Which layer and grid each family of networks gets, and which methods work on it:
writes docs/families.md.

    python benchmarks/families.py [--only resnet,vit] [--rows FILE]

One small member of every family of timm and torchvision, with random weights (nothing
is downloaded), is shown one noisy image. A method counts as working when its map is
finite; what it says otherwise is listed, and so is what was not tried because the
family's time was spent. Rows are kept as they are found, so that a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch

from consilience import api, registry
from consilience.models.load import load_model
from consilience.types import ConsilienceError, Sample

MOST_PARAMETERS = 45e6
MOST_SECONDS = 60.0
TRIED = 12
LARGE = (
    "large",
    "huge",
    "giant",
    "_xl",
    "_l_",
    "_b_",
    "base",
    "xxl",
    "_1b",
    "_3b",
    "gigantic",
    "so400m",
    "_384",
    "_448",
    "_512",
)
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
QUICK = {
    "scorecam": "channels=4",
    "sscam": "channels=2,samples=2",
    "iscam": "channels=2,samples=2",
    "smoothgradcam++": "samples=2",
    "opticam": "steps=2",
}
TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
)


@dataclass
class Found:
    """One row."""

    family: str
    model: str
    layer: str = ""
    grid: str = ""
    works: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    error: str = ""


def cams() -> list[str]:
    """Every method that looks at a layer's map."""
    names = [name for name in registry.explainers.names() if name not in attentions()]
    return [
        name
        for name in names
        if any(
            item.name == "layer"
            for item in registry.options_of(registry.explainers.get(name))
        )
    ]


def attentions() -> list[str]:
    """Every method that needs attention."""
    return [
        name
        for name in registry.explainers.names()
        if getattr(registry.explainers.get(name), "attention", False)
    ]


def smallest(module: str) -> str | None:
    """A small member of a timm module; None where none can be built offline.

    Parameters are counted without memory. Of a family of many, some are looked at:
    those whose names do not say that they are large, shortest names first.
    """
    names = timm.list_models(module=module, exclude_filters="test_*")
    names.sort(
        key=lambda name: (any(word in f"{name}_" for word in LARGE), len(name), name)
    )
    sizes: list[tuple[int, str]] = []
    for name in names:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = sum(
                    p.numel()
                    for p in timm.create_model(name, pretrained=False).parameters()
                )
        except Exception:  # some members do not build without their weights
            continue
        if 0 < size <= MOST_PARAMETERS:
            sizes.append((size, name))
        if len(sizes) == TRIED:
            break
    return min(sizes)[1] if sizes else None


def look(found: Found, image: Sample) -> Found:
    """Try every method that was not yet tried on one network."""
    spec = found.model
    try:
        model = load_model(
            f"{spec}{':' if ':' not in spec else ','}weights=random", engine="torch"
        )
        found.layer = model.target_layer()
        spatial = next(
            layer.spatial for layer in model.layers() if layer.name == found.layer
        )
        found.grid = f"{spatial[0]} x {spatial[1]}" if spatial else "vector"
    except Exception as error:
        found.error = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return found
    start = time.process_time()
    for name in untried(found):
        if time.process_time() - start > MOST_SECONDS:
            found.refused[name] = (
                f"not tried: {MOST_SECONDS:.0f} s of processor a family were spent"
            )
            continue
        try:
            values = api.explain(
                model,
                image,
                f"{name}:{QUICK[name]}" if name in QUICK else name,
                target=1,
            ).values
            if np.isfinite(values).all():
                found.works.append(name)
            else:
                found.refused[name] = "values that are not finite"
        except ConsilienceError as error:
            found.refused[name] = str(error).splitlines()[0]
        except Exception as error:
            found.refused[name] = (
                f"FAULT {type(error).__name__}: {error}".splitlines()[0][:200]
            )
    return found


def untried(found: Found) -> list[str]:
    """Methods that a row says nothing of."""
    tried = {*found.works, *found.refused}
    return (
        []
        if found.error
        else [name for name in (*cams(), *attentions()) if name not in tried]
    )


def kept(file: Path) -> dict[str, Found]:
    """Rows of an earlier try, by family."""
    if not file.is_file():
        return {}
    rows = [
        Found(**json.loads(line))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return {row.family: row for row in rows}


def say(row: Found, seconds: float) -> None:
    """One line, and what went wrong."""
    print(
        f"{row.family:32} {row.model:44} {row.layer:28} {row.grid:9} {len(row.works)} work",
        row.error,
        f"{seconds:.1f} s",
        flush=True,
    )
    for name, reason in row.refused.items():
        if reason.startswith("FAULT"):
            print("   ", name, reason)


def families(only: set[str], known: set[str]) -> Iterator[tuple[str, str]]:
    """Names and specs; no spec for those already known."""
    for name in TORCHVISION:
        if not only or name in only:
            yield f"torchvision {name.rstrip('0123456789_')}", name
    for module in timm.list_modules():
        if only and module not in only:
            continue
        if f"timm {module}" in known:
            yield f"timm {module}", ""
            continue
        member = smallest(module)
        if member is not None:
            yield f"timm {module}", f"timm:{member}"


def working(row: Found, names: list[str]) -> str:
    """Which of these work, in few words; what was not tried counts neither way."""
    tried = [
        name
        for name in names
        if name in row.works
        or not row.refused.get(name, "not tried").startswith("not tried")
    ]
    missing = [name for name in tried if name not in row.works]
    works = [name for name in names if name in row.works]
    said = (
        "all"
        if not missing
        else "none"
        if not works
        else f"all but {', '.join(missing)}"
    )
    if works and len(works) < len(missing):
        said = ", ".join(works)
    rest = [name for name in names if name not in tried]
    if len(rest) == len(names):
        return "not tried"
    return f"{said}; not tried: {', '.join(rest)}" if rest else said


def page(rows: list[Found]) -> str:
    """The table in Markdown."""
    names = cams()
    lines = [
        "# What works with which family of networks",
        "",
        "Made by `make families`: one small member of each family, random weights, one image. "
        "*Layer* is what Grad-CAM and",
        "its kin take when nothing is said (`layer=auto`), *grid* its resolution.",
        f"*All* means: {', '.join(f'`{name}`' for name in names)}.",
        f"*By attention* are: {', '.join(f'`{name}`' for name in attentions())}.",
        "",
        "| family | model | layer | grid | methods | by attention |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        methods = f"none: {row.error}" if row.error else working(row, names)
        lines.append(
            f"| {row.family} | `{row.model}` | `{row.layer}` | {row.grid} | {methods} | "
            f"{working(row, attentions())} |"
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.refused.items():
            plain = (
                re.sub(r"\S+@[0-9a-f]+", "MODEL", reason)
                .replace(row.layer, "LAYER")
                .replace(row.model, "MODEL")
            )
            reasons.setdefault(f"`{name}`: {plain}", []).append(row.model)
    lines += ["", "## Why not", ""]
    for reason, models in reasons.items():
        lines.append(
            f"- {reason} ({len(models)}: "
            f"{', '.join(models[:3])}{' ...' if len(models) > 3 else ''})"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        default="",
        help="families, joined by commas; the page is not written",
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path("families.jsonl"),
        help="where rows are kept (default: %(default)s)",
    )
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    rng = np.random.default_rng(0)
    image = Sample("noise", rng.integers(0, 256, (260, 300, 3), dtype=np.uint8))
    known = {} if only else kept(arguments.rows)
    rows = []
    for family, spec in families(only, {*known}):
        row = known.get(family) or Found(family, spec)
        rows.append(row)
        if family in known and not untried(row):
            continue
        start = time.perf_counter()
        say(look(row, image), time.perf_counter() - start)
        if not only:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        gc.collect()
    if not only:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
