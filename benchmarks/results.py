"""Do Grad-CAM, LIME, RISE and Score-CAM find the object, and do they beat maps that
know nothing? Writes docs/results.md.

    python benchmarks/results.py FOLDER [--limit N] [-o RUN] [--page FILE]

FOLDER holds images with a ``boxes.csv`` (image, class_index, x0, y0, x1, y1), such as
validation images of ImageNet. All is seeded and the page says nothing of the machine:
the same images give the same page wherever it is made, up to what an engine rounds. The
run's folder keeps every image as it is done: a run that was stopped goes on when the
same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilience import data
from consilience.evaluation import Asked, Evaluation, evaluate_images
from consilience.runs.explain import job_from_specs
from consilience.show import console
from consilience.show.evaluation_page import general

MODEL = "efficientnet_lite0"
BY = ("gradcam", "lime:samples=256", "rise:masks={masks}", "scorecam:layer=blocks.6")
MASKS = 500
"""With LIME's 256 and the 320 of Score-CAM's layer (that of Grad-CAM has 1,280
channels) about 1,080 passes an image; maps of other classes cost no further ones.
"""
METRICS = ("pointing-game", "energy")
TARGET, VIEW, SEED = "true", "crop", 0
PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def main() -> None:
    """Evaluate, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folder",
        type=Path,
        help="images with a boxes.csv, there or in images/ below it",
    )
    parser.add_argument(
        "--limit", type=int, help="only the first so many images, for a try"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the run's folder (default: results-run, with --limit results-run-N)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="where the page goes (default: docs/results.md; with --limit, into the run)",
    )
    parser.add_argument(
        "--masks",
        type=int,
        default=MASKS,
        help="masks of RISE (default: %(default)s)",
    )
    given = parser.parse_args()
    run = given.output or Path(
        f"results-run-{given.limit}" if given.limit else "results-run"
    )
    page = given.page or (run / "results.md" if given.limit else PAGE)
    with console.progress_bars():
        found = evaluate(given.folder, run, given.masks, given.limit)
    page.write_text(written(found), encoding="utf-8")
    print(f"{page}\n{run / 'report.html'}")


def evaluate(folder: Path, run: Path, masks: int, limit: int | None) -> Evaluation:
    """The evaluation of the first images, kept in ``run``."""
    images = data.find_images([folder])[:limit]
    by = [spec.format(masks=masks) for spec in BY]
    job = job_from_specs(
        by, [MODEL], TARGET, VIEW, "Do four methods find the object?"
    )
    return evaluate_images(
        Asked(METRICS, seed=SEED), job, images, run, folder / "boxes.csv"
    )


# ---- the page


def written(found: Evaluation) -> str:
    """The page as Markdown."""
    said = found.summary
    parts = [
        HEAD.format(**facts(found)),
        *(section(said, metric) for metric in said["metrics"]),
        orders(said),
        correlation(said),
    ]
    return (
        "\n\n".join(
            [*(part for part in parts if part), FOOT.format(n=said["images"])]
        )
        + "\n"
    )


HEAD = """# Do four methods find the object?

Pointing game and energy in the box of Grad-CAM, LIME, RISE and Score-CAM on {images}, with EfficientNet-Lite0
(`{model}`), beside maps that know nothing of the model. Made by one command,
`python benchmarks/results.py FOLDER`; never edited by hand.

- **Images**: {images} ({first} to {last}), true classes and boxes from ILSVRC's annotations. {failed}
- **Shown**: `view={view}`, {view_words}; boxes are moved into that frame exactly.
- **Target**: the `{target}` class. The model's first class is the true one in {right}.
- **Methods**: {methods}. Seeds as spelled (0 unless given).
- **How many draws**: LIME's come in orthogonal arrays (its default design). RISE's paper takes 4,000 masks and more; here
  {reliability}
- **Controls**: `random` (smooth noise), `centre` (a Gaussian blob), `edges` (the image's own), `constant`, and each method's
  map of another class, drawn for each image with seed {seed}. A control that is as good as a method shows what the method's
  number is worth.
- **Intervals** are 95 % over images: Wilson for the pointing game's 0 and 1, BCa bootstrap for energy (Student's t below 20
  images). **Marked ✗**: a method that is not above every control by one-sided sign-flip tests of the images' differences,
  corrected (Holm) over all methods and controls of the metric; which controls is said below the table."""

FOOT = """## What this does not say

A map that finds the object is not thereby faithful: a model may look elsewhere, and then the honest map does too. Boxes hold
background, so no map need reach an energy of 1, and large centred objects let a blob in the middle point well: read a number as
its distance from the controls. RISE's raw map has the mean score as its level everywhere, so its energy is near the constant
map's by construction. One model, one kind of image, n = {n}.

What a mark in the image does, and what maps say of it: [a watermark is taken for a carton](results-marks.md)."""


def facts(found: Evaluation) -> dict[str, Any]:
    """What the head of the page is filled with."""
    from consilience.runs.folder import Run

    run = Run(found.folder)
    rows, failures = run.explanations, run.manifest["failures"]
    first = rows.drop_duplicates("sample")
    right = int((first["predicted"] == first["true"]).sum())
    return {
        "images": f"{len(run.samples):,} images of ImageNet's validation set",
        "first": run.samples[0],
        "last": run.samples[-1],
        "failed": f"{len(failures)} could not be read."
        if failures
        else "All could be read.",
        "model": run.manifest["model"]["id"],
        "view": VIEW,
        "view_words": "resized and cropped as the model was trained",
        "target": TARGET,
        "right": f"{right} of {len(first)}",
        "methods": ", ".join(
            f"`{column['spec']}`"
            for column in found.summary["columns"]
            if column["kind"] == "method"
        ),
        "reliability": reliability(run),
        "seed": SEED,
    }


def reliability(run: Any) -> str:
    """How well RISE's map at this number of masks would correlate with another of as
    many.
    """
    found = []
    for stored in run:
        found += [
            item.provenance["reliability"]
            for item in stored.items
            if "reliability" in item.provenance
        ]
    middle, low = np.median(found), np.quantile(found, 0.1)
    return (
        f"a second map of as many other masks would correlate with the first at {middle:.2f} "
        f"(median over images; tenth\n"
        f"  percentile {low:.2f}), by Spearman and Brown's formula from the two halves of the "
        f"masks: its rows are those of\n"
        "  RISE at this cost, and more masks may point better."
    )


def section(said: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """One metric: the table, why methods are marked, methods against each other."""
    cells = {
        cell["column"]: cell
        for cell in said["cells"]
        if cell["metric"] == metric["spec"]
    }
    lines = [f"## {metric['label']} (`{metric['spec']}`)", "", metric["what"], ""]
    lines += [
        "| map | mean | 95 % | n | not applicable | above every control |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line(column, cells[column["label"]]) for column in said["columns"]]
    lines += [
        "",
        *reasons(cells),
        *marks(cells),
        *closest(said, metric["spec"]),
        *pairs(said, metric["spec"]),
    ]
    return "\n".join(lines).rstrip()


def line(column: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """One row of a table; controls in italics."""
    name = (
        f"**{column['label']}**"
        if column["kind"] == "method"
        else f"*{column['label']}*"
    )
    bounds = (
        "–" if cell["low"] is None else f"{cell['low']:.3f} to {cell['high']:.3f}"
    )
    sure = (
        {True: "yes", False: "✗"}.get(cell.get("above"), "")
        if column["kind"] == "method"
        else ""
    )
    mean = "–" if cell["mean"] is None else f"{cell['mean']:.3f}"
    return f"| {name} | {mean} | {bounds} | {cell['n']} | {cell['not_applicable']} | {sure} |"


def reasons(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a metric does not apply, by reason, with the maps and the number of images."""
    found: dict[str, list[str]] = {}
    for label, cell in cells.items():
        for row in cell["reasons"]:
            words = general(row["reason"])
            found.setdefault(words, []).append(f"{label} {row['images']}")
    if not found:
        return []
    return [
        "Not applicable: "
        + "; ".join(f"{words} ({', '.join(some)})" for words, some in found.items())
        + ".",
        "",
    ]


def marks(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which controls a marked method is not above."""
    short = {
        label: cell for label, cell in cells.items() if cell.get("above") is False
    }
    few = (
        ""
        if all(cell["reachable"] for cell in short.values())
        else " (so few images could not have shown it)"
    )
    said = [
        f"{label} is not shown to be above {', '.join(cell['not_above'])}{few}."
        for label, cell in short.items()
    ]
    return [" ".join(said), ""] if said else []


def closest(said: Mapping[str, Any], metric: str) -> list[str]:
    """For each method the control that comes nearest."""
    rows = [
        row
        for row in said["against_controls"]
        if row["metric"] == metric and row["mean"] is not None
    ]
    nearest = {row["a"]: row for row in sorted(rows, key=lambda row: -row["mean"])}
    if not nearest:
        return []
    family = rows[0]
    head = [
        "| method | nearest control | mean difference | 95 % | d_z | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    body = [
        compared(nearest[label]) for label in dict.fromkeys(row["a"] for row in rows)
    ]
    return [
        f"Against the nearest control ({family['tests']} tests in the family):",
        "",
        *head,
        *body,
        "",
    ]


def pairs(said: Mapping[str, Any], metric: str) -> list[str]:
    """Methods against each other."""
    rows = [
        row
        for row in said["between"]
        if row["metric"] == metric and row["mean"] is not None
    ]
    head = [
        "| method | other method | mean difference | 95 % | d_z | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    return (
        [
            f"Methods against each other ({rows[0]['tests']} tests, two-sided):",
            "",
            *head,
            *map(compared, rows),
        ]
        if rows
        else []
    )


def compared(row: Mapping[str, Any]) -> str:
    """A paired difference as a row of a table."""
    bounds = "–" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
    size = "–" if row["d_z"] is None else f"{row['d_z']:+.2f}"
    return f"| {row['a']} | {row['b']} | {row['mean']:+.3f} | {bounds} | {size} | {p_of(row['p_holm'])} |"


def orders(said: Mapping[str, Any]) -> str:
    """Mean ranks, how often an order is kept when other images are drawn, and the
    critical difference.
    """
    if not said["orders"]:
        return ""
    lines = ["## Orders", ""]
    for row in said["orders"]:
        table = pd.DataFrame(
            row["kept"], index=row["columns"], columns=row["columns"], dtype=float
        )
        ranks = sorted(zip(row["mean_ranks"], row["columns"], strict=True))
        said_ranks = ", ".join(f"{label} {rank:.2f}" for rank, label in ranks)
        lines += [
            f"**{row['metric']}**, {row['n']} images on which all have a value. Mean ranks (1 "
            f"is best): {said_ranks}.",
            f"Friedman's p {p_of(row['friedman_p'])}; mean ranks less than "
            f"{row['critical_difference']:.2f} apart cannot be",
            f"told apart (Nemenyi, .05). {least_kept(table)}",
            "",
        ]
    return "\n".join(lines).rstrip()


def p_of(p: float | None) -> str:
    """A p value as it is printed."""
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}"


def least_kept(table: pd.DataFrame) -> str:
    """The pair whose order changes most easily when images are drawn again."""
    values = table.to_numpy(float)
    if np.isnan(values).all():
        return "All means are equal."
    a, b = np.unravel_index(np.nanargmin(values), values.shape)
    return (
        f"Drawing the images again, the order of two means is kept least often between "
        f"{table.index[a]} and\n"
        f"{table.columns[b]}: in {values[a, b]:.0%} of resamples."
    )


def correlation(said: Mapping[str, Any]) -> str:
    """Whether the two metrics agree on which images a method explains well."""
    found: Sequence[Mapping[str, Any]] = [
        row for row in said["correlations"] if row["mean"] is not None
    ]
    if not found:
        return ""
    lines = [
        "## Do the metrics agree?",
        "",
        "Spearman over images within each method:",
    ]
    for row in found:
        within = ", ".join(
            f"{label} {value:.2f}"
            for label, value in row["within"].items()
            if value is not None
        )
        lines.append(f"{row['a']} and {row['b']}: mean {row['mean']:.2f} ({within}).")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
