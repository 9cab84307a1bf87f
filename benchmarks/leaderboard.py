"""Methods x metrics x networks: what is true of networks with real weights, and what works
and what it costs on every family. Writes docs/leaderboard.md.

    python benchmarks/leaderboard.py IMAGES [--limit N] [-o FOLDER] [--only true,families]

IMAGES is a folder of photographs (validation images of ImageNet). Networks with real
weights are EfficientNet-Lite0, -Lite1 and -Lite2: `consilience recommend` on each, with
intervals, controls and who beats whom. Of every timm family one small member with random
weights says what works and what one explanation costs, as a multiple of its own bare
forward pass in the same process. Everything is kept as it is made: a run that was
stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilience import api
from consilience.files import read_json_data
from consilience.models.load import load_model
from consilience.runs.folder import Run
from consilience.runs.recommend import CANDIDATES, DATA, METRICS, run_recommend
from consilience.show import console
from consilience.show.words import format_number
from consilience.types import ConsilienceError, Sample

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
FAMILIES = PAGE.with_name("families.md")
NETWORKS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
METHODS = (*CANDIDATES, "eigencam", "guided-backprop", "input-x-gradient")
QUICK = (
    "gradcam",
    "ablationcam",
    "scorecam:channels=8",
    "integrated-gradients:steps=5",
    "guided-backprop",
    "lrp",
    "attnlrp",
    "occlusion:window=56,stride=56",
)
FORWARDS = 5
MOST_SECONDS = 15.0
"""Of processor, a family."""


# ---- what is true


def judged(images: Sequence[Path], folder: Path, name: str) -> None:
    """`recommend` of one network; a finished one is not made again."""
    if (folder / name / DATA).is_file():
        return
    model = load_model(name)
    with console.progress_bars():
        run_recommend(model, images, METHODS, METRICS, folder / name)


def true_tables(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """A table a metric: methods by networks, means with intervals, controls below."""
    told = {name: read_json_data(folder / name / DATA) for name in names}
    evaluated = {
        name: read_json_data(folder / name / "evaluation.json") for name in names
    }
    first = told[names[0]]
    for metric in first["metrics"]:
        spec = metric["spec"]
        better = "higher" if metric["higher_is_better"] else "lower"
        yield f"### {metric['label']} (`{spec}`), {better} is better\n"
        counts = [_units(told[name], spec) for name in names]
        heads = (f"{name}, n = {n}" for name, n in zip(names, counts, strict=True))
        yield f"| | {' | '.join(heads)} |"
        yield f"|---|{'--:|' * len(names)}"
        methods = dict.fromkeys(
            (one["method"], one["spec"])
            for name in names
            for one in told[name]["methods"]
        )
        for label, method in methods:
            cells = [_cell(told[name], method, spec) for name in names]
            yield f"| {label} | {' | '.join(cells)} |"
        for control in _controls(evaluated[names[0]]):
            cells = [_control(evaluated[name], control, spec) for name in names]
            yield f"| *{control}* | {' | '.join(cells)} |"
        yield ""


def _units(found: Mapping[str, Any], spec: str) -> int:
    """Images, or mosaics, that a metric has numbers of."""
    cells = (one["numbers"].get(spec) for one in found["methods"])
    return max((cell["n"] for cell in cells if cell), default=0)


def _cell(found: Mapping[str, Any], method: str, spec: str) -> str:
    one = next((one for one in found["methods"] if one["spec"] == method), None)
    cell = one["numbers"].get(spec) if one else None
    if not cell or not cell["n"]:
        return "–"
    said = f"{format_number(cell['mean'])} ({format_number(cell['low'])} to {format_number(cell['high'])})"
    return f"**{said}**" if cell["above"] else said


def _controls(evaluation: Mapping[str, Any]) -> list[str]:
    return [one["label"] for one in evaluation["columns"] if one["kind"] == "control"]


def _control(evaluation: Mapping[str, Any], label: str, spec: str) -> str:
    cell = next(
        (
            one
            for one in evaluation["cells"]
            if (one["metric"], one["column"]) == (spec, label)
        ),
        None,
    )
    if not cell or not cell["n"]:
        return "–"
    return f"{format_number(cell['mean'])} ({format_number(cell['low'])} to {format_number(cell['high'])})"


def standings(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Who is left on each network, what each method costs, and who beats it."""
    told = {name: read_json_data(folder / name / DATA) for name in names}
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    methods = dict.fromkeys(
        one["method"] for name in names for one in told[name]["methods"]
    )
    for label in methods:
        cells = []
        for name in names:
            one = next(m for m in told[name]["methods"] if m["method"] == label)
            cells.append(_standing(one, told[name]))
        yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    for name in names:
        refused = "; ".join(
            f"`{spec}`: {why}" for spec, why in told[name]["refused"].items()
        )
        if refused:
            yield f"Does not work on {name}: {refused}.\n"


def _standing(one: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    passes = one["passes"] or 0
    cost = f"{passes:,.0f} pass{'' if passes == 1 else 'es'}"
    if one["method"] in found["left"]:
        return f"**left**, {cost}"
    if one["beaten_by"]:
        names = list(one["beaten_by"])
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"beaten by {', '.join(names[:2])}{more}, {cost}"
    return f"not above every control, {cost}"


# ---- what works, and what it costs


def kept(file: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier try, by family."""
    if not file.is_file():
        return {}
    rows = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    return {row["family"]: row for row in rows}


def members() -> list[tuple[str, str]]:
    """A small member of every timm family, as `make families` chose it."""
    rows = re.findall(
        r"^\| (timm \S+) \| `(timm:\S+)` \|",
        FAMILIES.read_text("utf-8"),
        re.MULTILINE,
    )
    return [(family, spec) for family, spec in rows]


def tried(family: str, spec: str, image: Sample) -> dict[str, Any]:
    """A family's row: its member, and of each method the cost or the reason."""
    row: dict[str, Any] = {"family": family, "model": spec, "methods": {}}
    try:
        model = load_model(
            f"{spec}{':' if ':' not in spec else ','}weights=random", engine="torch"
        )
        row["parameters"] = sum(p.numel() for p in model.module.parameters())
        row["forward"] = forward_seconds(model, image)
    except Exception as error:
        return row | {
            "error": f"{type(error).__name__}: {error}".splitlines()[0][:160]
        }
    began = time.process_time()
    for method in QUICK:
        if time.process_time() - began > MOST_SECONDS:
            row["methods"][method] = {"why": "not tried: the family's time was spent"}
            continue
        row["methods"][method] = cost(model, image, method, row["forward"])
    return row


def forward_seconds(model: Any, image: Sample) -> float:
    """The median of bare forward passes, after one to warm up."""
    pixels, taken = model.view(image).pixels, []
    for _ in range(1 + FORWARDS):
        started = time.perf_counter()
        with torch.no_grad():
            model.scores(pixels)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[FORWARDS // 2]


def cost(model: Any, image: Sample, method: str, forward: float) -> dict[str, Any]:
    """The second of two explanations, in forward passes of the network."""
    try:
        for _ in range(2):  # the first makes trials and caches
            started = time.perf_counter()
            made = api.explain(model, image, method, target=1)
            seconds = time.perf_counter() - started
    except ConsilienceError as error:
        return {"why": str(error).splitlines()[0]}
    except Exception as error:
        return {"why": f"FAULT {type(error).__name__}: {error}".splitlines()[0][:200]}
    if not np.isfinite(made.values).all():
        return {"why": "values that are not finite"}
    return {"forwards": seconds / forward}


def family_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Families by methods: costs in forward passes, a dash where it is refused."""
    names = [method.partition(":")[0] for method in QUICK]
    yield f"| family | member | M parameters | forward, ms | {' | '.join(names)} |"
    yield f"|---|---|--:|--:|{'--:|' * len(names)}"
    for row in rows:
        if "error" in row:
            yield f"| {row['family']} | `{row['model']}` | {row['error']} |"
            continue
        cells = [_multiple(row["methods"].get(method, {})) for method in QUICK]
        yield (
            f"| {row['family']} | `{row['model'].removeprefix('timm:')}` | "
            f"{row['parameters'] / 1e6:.1f} | {1000 * row['forward']:.0f} | "
            f"{' | '.join(cells)} |"
        )


def _multiple(cell: Mapping[str, Any]) -> str:
    if "forwards" in cell:
        return (
            f"{cell['forwards']:.1f}"
            if cell["forwards"] < 10
            else f"{cell['forwards']:.0f}"
        )
    return "?" if str(cell.get("why", "not tried")).startswith("not tried") else "–"


def medians(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a method: on how many families it works, and the median cost there."""
    yield "| method | works on | refused | forward passes' worth (median, quartiles) |"
    yield "|---|--:|--:|--:|"
    for method in QUICK:
        cells = [row["methods"][method] for row in rows if method in row["methods"]]
        costs = [one["forwards"] for one in cells if "forwards" in one]
        refused = [
            one
            for one in cells
            if not one.get("why", "not tried").startswith("not tried")
        ]
        if not costs:
            yield f"| `{method}` | 0 | {len(refused)} | |"
            continue
        low, middle, high = np.percentile(costs, (25, 50, 75))
        yield f"| `{method}` | {len(costs)} | {len(refused)} | {middle:.1f} ({low:.1f} to {high:.1f}) |"


# ---- the page


def page(
    folder: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The page in Markdown, of what there is."""
    lines = [
        "# Leaderboard",
        "",
        f"Made by `make leaderboard` on {datetime.now(UTC).date().isoformat()} ({platform.machine()}, {torch.get_num_threads()} threads). No column adds up metrics: they measure different",
        "things, and methods are beaten on one and win on another.",
        "",
    ]
    if names:
        images = len(Run(folder / names[0]).samples)
        lines += [
            "## What is true of networks with real weights",
            "",
            f"`consilience recommend` on {images} photographs of ImageNet's validation set. Means with 95 % intervals; **bold**: shown to be better than every control (in *italics*).",
            "",
            *true_tables(folder, names),
            "### Who is left",
            "",
            'A method is beaten where another is shown to be better on some metric and is not shown to be worse on any (one Holm family a network). "Left" are those that are not, and that',
            "are above every control on something.",
            "",
            *standings(folder, names),
        ]
    if rows:
        lines += [
            "## What works on every family, and what it costs",
            "",
            f"One small member of {len(rows)} of {len(members())} families, random weights, one image: what one explanation costs in bare forward passes of the same network in the same process"
            " (with other work on the machine: a cost is good to a factor of two).",
            "",
            *medians(rows),
            "",
            "What samples is asked little here (the options stand beside it): its cost grows with its draws. –: refused, with the reason in one line (the reasons are on [the page of families](families.md)); ?: not tried.",
            "",
            *family_table(rows),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("build/leaderboard")
    )
    parser.add_argument("--only", default="true,families")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    file = asked.output / "families.jsonl"
    if "families" in asked.only.split(","):
        known = kept(file)
        rng = np.random.default_rng(0)
        image = Sample("noise", rng.integers(0, 256, (260, 300, 3), dtype=np.uint8))
        for family, spec in members():
            if family in known:
                continue
            row = tried(family, spec, image)
            print(family, spec, row.get("error", ""), flush=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            gc.collect()
    if "true" in asked.only.split(","):
        images = sorted(
            asked.images.rglob("*.jp*g"), key=lambda path: path.name.lower()
        )
        for name in NETWORKS:
            judged(images[: asked.limit], asked.output, name)
    names = [name for name in NETWORKS if (asked.output / name / DATA).is_file()]
    PAGE.write_text(page(asked.output, names, list(kept(file).values())), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
