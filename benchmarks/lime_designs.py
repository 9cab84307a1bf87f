"""Which design tells LIME's top superpixels best at equal cost? Run by hand:

    python benchmarks/lime_designs.py IMAGES CACHE [--images 10] [--seeds 20] [--passes 500] [--reference 10000]

IMAGES is a folder of photographs, searched through; CACHE keeps the raw scores of each
image, design and seed, so that a run that was stopped goes on, and other options are
answered from what is there. An image's reference is one long run of independent draws.
Printed, by design, over all images and seeds:

    iou       mean IoU of the top ten by |weight| with those of the reference
    weight    part of the reference ten's |weight| that the ten found hold
              (least: the lowest mean of any image)
    error     root mean squared difference of all weights from the reference's, in parts of the independent draws'
    sure      how many of the ten are called sure, and how often one that is belongs to the reference ten
    stable    in how many runs the ten are called stable (looks counted), and in how many of these they are not the reference's
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import consilience as cs
from consilience import api, data, images, registry
from consilience.perturb.designs import draws, groups
from consilience.perturb.probe import Bits, probe
from consilience.perturb.superpixels import segment
from consilience.perturb.surrogate import (
    WRONG,
    Scored,
    certainty,
    falling,
    kernel,
    least_squares,
    looks,
    settled,
)
from consilience.types import Model

DESIGNS = ("independent", "antithetic", "hadamard")
REFERENCE_SEED = 1_000_003


def main() -> None:
    """Score what is not there yet, then print the table."""
    asked = arguments(__doc__, 20, DESIGNS).parse_args()
    found = {design: [] for design in asked.designs.split(",")}
    paths = data.find_images([str(asked.folder)])[: asked.images]
    model = None
    for number, path in enumerate(paths, 1):
        image = Image(path, asked)
        missing = image.missing()
        if missing:
            model = model or cs.load_model(asked.model)
            image.score(model, missing, f"[{number}/{len(paths)}] {path.stem}")
        reference = weights_of(
            image.read("independent", REFERENCE_SEED, asked.reference), asked
        )
        for design in found:
            for seed in range(asked.seeds):
                row = compared(
                    image.read(design, seed, asked.passes), reference, asked
                )
                found[design].append(row | {"image": number})
    report(found, len(paths), asked)


def arguments(
    description: str | None, seeds: int, designs: Sequence[str]
) -> argparse.ArgumentParser:
    """What `lime_cost.py` asks too, with its own defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--passes", type=int, default=500)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument(
        "--designs", default=",".join(designs), help="which of them, joined by commas"
    )
    parser.add_argument("--model", default="efficientnet_lite0")
    return parser


class Image:
    """One photograph with the scores kept of it."""

    def __init__(self, path: Path, asked: argparse.Namespace) -> None:
        self.path, self.asked = path, asked

    def file(self, design: str, seed: int, passes: int) -> Path:
        name = f"{self.path.stem}.{self.asked.model}.{design}.{passes}.{seed}.npz".replace(
            "/", "_"
        ).replace(":", "_")
        return self.asked.cache / name

    def wanted(self) -> list[tuple[str, int, int]]:
        runs = [
            (design, seed, self.asked.passes)
            for design in self.asked.designs.split(",")
            for seed in range(self.asked.seeds)
        ]
        return [("independent", REFERENCE_SEED, self.asked.reference), *runs]

    def missing(self) -> list[tuple[str, int, int]]:
        return [one for one in self.wanted() if not self.file(*one).is_file()]

    def score(
        self, model: Model, missing: list[tuple[str, int, int]], label: str
    ) -> None:
        sample = cs.read_image(self.path)
        view = model.view(sample)
        target = api.target_of_image(
            model, sample, "predicted", api.raw_outputs(model, view)
        ).scored("probability")
        lime = registry.explainers.build("lime")
        segments = segment(lime.segments, images.to_array(view.pixels))
        fill, count = lime.fill.image(view, segments), int(segments.max()) + 1
        self.asked.cache.mkdir(parents=True, exist_ok=True)
        for number, (design, seed, passes) in enumerate(missing, 1):
            print(
                f"{label}: {number}/{len(missing)} {design} {passes} seed {seed}",
                file=sys.stderr,
                flush=True,
            )
            on = draws(design, passes, count, seed)
            scores = probe(model, view, Bits(segments, on), target, fill).numpy()
            part = self.file(design, seed, passes).with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, scores=scores, count=count)
            part.replace(self.file(design, seed, passes))

    def read(
        self, design: str, seed: int, passes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with np.load(self.file(design, seed, passes)) as kept:
            scores, count = kept["scores"].astype(np.float64), int(kept["count"])
        return draws(design, passes, count, seed), scores, groups(design, passes)


def scored(run: tuple[np.ndarray, np.ndarray, np.ndarray], stop: int) -> Scored:
    """The first ``stop`` draws of a run; block and round ends are even, so that no pair
    is cut.
    """
    on, scores, together = run
    head = together[(together < stop).all(axis=1)]
    return Scored(
        on[:stop].astype(float),
        scores[:stop],
        kernel("cosine", on[:stop], 0.25),
        head,
    )


def weights_of(
    run: tuple[np.ndarray, np.ndarray, np.ndarray], asked: argparse.Namespace
) -> np.ndarray:
    return least_squares(scored(run, asked.reference), 0.01).coefficients


def compared(
    run: tuple[np.ndarray, np.ndarray, np.ndarray],
    reference: np.ndarray,
    asked: argparse.Namespace,
) -> dict[str, float]:
    """One run against the reference of its image."""
    k = min(asked.features, len(reference))
    true = set(falling(reference)[:k].tolist())
    data = scored(run, asked.passes)
    fitted = least_squares(data, 0.01)
    mine = falling(fitted.coefficients)[:k].tolist()
    sure, _ = settled(certainty(fitted, data.scores, k, 0).p_top)
    said = stable_after(run, k, len(reference), asked)
    return {
        "iou": len(true & set(mine)) / len(true | set(mine)),
        "weight": np.abs(reference[mine]).sum() / np.abs(reference[list(true)]).sum(),
        "error": float(
            ((fitted.coefficients - reference) ** 2).mean() / (reference**2).mean()
        ),
        "sure": len(sure),
        "right": len(true & set(sure.tolist())),
        "stable": said is not None,
        "wrong": said is not None and said != true,
    }


def stable_after(
    run: tuple[np.ndarray, np.ndarray, np.ndarray],
    k: int,
    count: int,
    asked: argparse.Namespace,
) -> set[int] | None:
    """The superpixels called stable, at whichever look."""
    stops = looks(asked.passes, count)
    for stop in stops:
        data = scored(run, stop)
        fitted = least_squares(data, 0.01)
        if certainty(fitted, data.scores, k, 0).p_set >= 1 - WRONG / len(stops):
            return set(falling(fitted.coefficients)[:k].tolist())
    return None


def report(
    found: dict[str, list[dict[str, float]]], images: int, asked: argparse.Namespace
) -> None:
    print(
        f"{asked.model}, {images} images, {asked.seeds} seeds, {asked.passes} passes against "
        f"{asked.reference}"
    )
    print(
        f"{'design':12} {'iou':>6} {'weight':>6} {'error':>6} {'sure':>6} {'right':>6} "
        f"{'stable':>7} {'wrong':>6} {'least':>6}"
    )
    coins = np.sqrt(np.mean([row["error"] for row in found["independent"]]))
    for design, rows in found.items():
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        total = {key: float(np.sum([row[key] for row in rows])) for key in rows[0]}
        images_own = [
            np.mean([row["weight"] for row in rows if row["image"] == one])
            for one in range(1, images + 1)
        ]
        right = total["right"] / total["sure"] if total["sure"] else float("nan")
        print(
            f"{design:12} {mean['iou']:6.3f} {mean['weight']:6.3f} "
            f"{np.sqrt(mean['error']) / coins:6.2f} {mean['sure']:6.1f} "
            f"{right:6.3f} {total['stable']:4.0f}/{len(rows)} {total['wrong']:6.0f} "
            f"{min(images_own):6.3f}"
        )


if __name__ == "__main__":
    main()
