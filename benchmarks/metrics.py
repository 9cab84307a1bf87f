"""What metrics cost: insertion and deletion beside bare forward passes, and metrics
with and without passes beside Quantus.

    python benchmarks/metrics.py                                  # all, as published
    python benchmarks/metrics.py cost --images 4 --steps 10     # a quick look
    python benchmarks/metrics.py passes maps --peer-images 2

Both sides of a row take turns within one run, on the same images, model and maps;
ratios are within a row only.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO

import numpy as np
import torch
from torch import nn

from consilience import api, registry
from consilience.metrics.faithfulness import drawn
from consilience.metrics.localisation import place_of
from consilience.metrics.perturbation import VIEWS_AT_ONCE
from consilience.models.load import load_model
from consilience.types import Box, Explanation, Sample, Score, View


def images(count: int) -> list[Sample]:
    """Crops of the photographs that scikit-image carries, each at another place."""
    import skimage.data

    whole = [skimage.data.chelsea(), skimage.data.astronaut(), skimage.data.coffee()]
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        photograph = whole[number % len(whole)]
        top, left = (
            int(rng.integers(0, side - 255)) for side in photograph.shape[:2]
        )
        found.append(
            Sample(
                f"crop{number}",
                np.ascontiguousarray(photograph[top : top + 256, left : left + 256]),
            )
        )
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- insertion and deletion beside bare passes


def bare(model, count: int) -> None:
    """``count`` images through the engine in its own batches."""
    chunk = torch.rand(
        model.batch, 3, *model.frame, generator=torch.Generator().manual_seed(0)
    )
    for start in range(0, count, model.batch):
        model.scores(chunk[: min(model.batch, count - start)])


def cost(model, args: argparse.Namespace) -> None:
    """Group after group of images, each metric and the bare passes in turn."""
    metrics = {
        name: registry.metrics.build(f"{name}:steps={args.steps}")
        for name in ("insertion", "deletion")
    }
    samples = images(args.images)
    bare(model, 2 * model.batch)  # the engine is made
    times: dict[str, list[float]] = {name: [] for name in (*metrics, "bare")}
    for start in range(0, len(samples), VIEWS_AT_ONCE):
        part = samples[start : start + VIEWS_AT_ONCE]
        views = [model.view(sample) for sample in part]
        given = [api.explain(model, sample, "gradcam") for sample in part]
        for name, metric in metrics.items():
            times[name].append(timed(lambda: metric.score_batch(model, views, given)))
        times["bare"].append(
            timed(lambda: bare(model, 2 * len(part) * (args.steps + 1)))
        )
    totals = {name: sum(found) for name, found in times.items()}
    each = [(a + b) / c for a, b, c in zip(*times.values(), strict=True)]
    row = [
        f"{len(samples)} images x {args.steps} steps, insertion and deletion",
        f"{2 * len(samples) * (args.steps + 1):,}",
        f"{totals['insertion'] + totals['deletion']:.2f} s",
        f"{totals['bare']:.2f} s",
        f"{(totals['insertion'] + totals['deletion']) / totals['bare']:.3f}",
        f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})",
    ]
    head = [
        "what",
        "passes",
        "metrics",
        "bare passes",
        "ratio",
        f"median of groups of {VIEWS_AT_ONCE}, and range",
    ]
    print("\n## Metrics beside bare passes\n\n" + table(head, [row]))


# ---- beside Quantus


class FromPixels(nn.Module):
    """The network for images in [0, 1], as Quantus edits them."""

    def __init__(self, model) -> None:
        super().__init__()
        self.module, self.normalised = model.module, model.recipe.normalised

    def forward(self, pixels):
        return self.module(self.normalised(pixels))


@dataclass(frozen=True)
class QuantusSlic:
    """The superpixels that Quantus takes."""

    def labels(self, image):
        from quantus.helpers import utils

        return np.asarray(
            utils.get_superpixel_segments(image, "slic"), dtype=np.int64
        )


@dataclass(frozen=True)
class Case:
    """A metric on both sides, and how their numbers correspond."""

    what: str
    ours: object
    theirs: Callable[[], object]
    gap: Callable[[Sequence[Score], object], float]
    note: str = ""


@contextmanager
def same_sets(sets: Sequence[np.ndarray], count: int, pixels: int) -> Iterator[None]:
    """Quantus draws the sets given, whole pixels, for each of ``count`` images."""
    whole = iter(
        [
            np.concatenate([some + channel * pixels for channel in range(3)])
            for some in sets
            for _ in range(count)
        ]
    )
    kept, np.random.choice = np.random.choice, lambda *args, **more: next(whole)  # type: ignore[assignment]
    try:
        yield
    finally:
        np.random.choice = kept


OPTIONS = {
    "normalise": False,
    "abs": False,
    "disable_warnings": True,
    "display_progressbar": False,
}


def asked_of_quantus(
    model, views: Sequence[View], given: Sequence[Explanation]
) -> dict[str, object]:
    """The same images, classes and maps as Quantus takes them."""
    return {
        "model": FromPixels(model).eval(),
        "x_batch": torch.cat([view.pixels for view in views]).numpy(),
        "y_batch": np.array([one.target.index for one in given]),
        "a_batch": np.stack([one.values for one in given])[:, None],
        "softmax": True,
        "channel_first": True,
        "device": "cpu",
    }


def of_passes(
    model,
    views: Sequence[View],
    given: Sequence[Explanation],
    args: argparse.Namespace,
) -> list[Case]:
    """Metrics that cost forward passes."""
    import quantus

    call = asked_of_quantus(model, views, given)
    regions = quantus.RegionPerturbation(
        patch_size=8, regions_evaluation=args.regions, perturb_baseline=0.0, **OPTIONS
    )
    irof = quantus.IROF(
        perturb_func=lambda arr, mask, **_: np.where(mask, 0, arr),
        return_aggregate=False,
        **OPTIONS,
    )  # its own does not take RGB
    pixels = model.frame[0] * model.frame[1]
    size = round(0.05 * pixels)
    keeps = drawn((0,) + (size,) * args.subsets, model.frame, 0)
    sets = [np.flatnonzero(row) for part in keeps.sets(32) for row in part][1:]
    faith = quantus.FaithfulnessCorrelation(
        nr_runs=args.subsets,
        subset_size=3 * size,
        perturb_baseline=0.0,
        return_aggregate=False,
        **OPTIONS,
    )

    def correlation() -> object:
        with same_sets(sets, len(views), pixels):
            return faith(**call, batch_size=len(views))

    return [
        Case(
            f"region perturbation, {args.regions} patches of 8 x 8",
            registry.metrics.build(
                f"region-perturbation:regions={args.regions},patch=8,fill=black"
            ),
            lambda: regions(**call),
            lambda ours, theirs: largest(
                ours, theirs, lambda one: one.curve[1, 0] - one.curve[1, 1:]
            ),
        ),
        Case(
            "IROF, slic",
            registry.metrics.get("irof")(
                segments=QuantusSlic(), fill=registry.fills.build("black"), gap=1e-6
            ),
            lambda: irof(**call, batch_size=1),
            lambda ours, theirs: largest(ours, theirs, their_irof),
            "Quantus repaired for RGB, one image a batch",
        ),
        Case(
            f"faithfulness correlation, {args.subsets} sets of 5 %",
            registry.metrics.build(
                f"faithfulness-correlation:subsets={args.subsets},share=.05,fill=black"
            ),
            correlation,
            lambda ours, theirs: largest(ours, theirs, lambda one: one.value),
            "the same sets on both sides",
        ),
    ]


def of_maps(
    model,
    views: Sequence[View],
    given: Sequence[Explanation],
    args: argparse.Namespace,
) -> list[Case]:
    """Metrics that look at the map alone, or at the map and the object."""
    import quantus

    call = asked_of_quantus(model, views, given)
    objects = call | {
        "s_batch": np.stack([place_of(one).on for one in given])[:, None]
    }
    peers = {
        "pointing-game:tolerance=0": (quantus.PointingGame, objects),
        "relevance-mass": (quantus.RelevanceMassAccuracy, objects),
        "relevance-rank": (quantus.RelevanceRankAccuracy, objects),
        "auc": (quantus.AUC, objects),
        "sparseness": (quantus.Sparseness, call),
        "entropy": (quantus.Complexity, call),
    }
    return [
        Case(
            spec,
            registry.metrics.build(spec),
            partial(peer(**OPTIONS), **words),
            values_apart,
        )
        for spec, (peer, words) in peers.items()
    ]


def values_apart(ours, theirs) -> float:
    return largest(ours, theirs, lambda one: one.value)


def largest(ours, theirs, number: Callable[[Score], object]) -> float:
    """The largest difference over the images of which both sides say something."""
    pairs = [
        (number(one), value)
        for one, value in zip(ours, theirs, strict=True)
        if isinstance(one, Score)
    ]
    return max(
        (float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs),
        default=float("nan"),
    )


def without_ties(explanation: Explanation, seed: int) -> Explanation:
    """A ten-thousandth of noise on a map: where values tie, each side has an order of
    its own.
    """
    noise = (
        np.random.default_rng(seed).random(explanation.values.shape)
        * 1e-4
        * np.ptp(explanation.values)
    )
    return replace(
        explanation, values=(explanation.values + noise).astype(np.float32)
    )


def their_irof(found: Score) -> float:
    """Quantus counts the area over the curve in superpixels and leaves out the image
    itself.
    """
    assert found.curve is not None
    heights = found.curve[1]
    return len(heights) - 1 - float(np.sum((heights[1:-1] + heights[2:]) / 2))


def beside_quantus(
    model, count: int, made: Callable[..., list[Case]], args: argparse.Namespace
) -> None:
    """``count`` images through the metrics of ``made`` on both sides, in turns."""
    if not hasattr(np, "trapz"):
        setattr(np, "trapz", np.trapezoid)  # noqa: B010 - gone from numpy, and Quantus calls it
    samples = images(count)
    views = [model.view(sample) for sample in samples]
    given = [
        without_ties(with_object(api.explain(model, sample, "gradcam")), number)
        for number, sample in enumerate(samples)
    ]
    rows = [
        row(model, views, given, case, args)
        for case in made(model, views, given, args)
    ]
    head = [
        "what",
        "Quantus",
        "ours",
        "ratio",
        "ratio, ours with engine=torch",
        "largest difference",
        "note",
    ]
    print(
        f"\n## {len(samples)} images beside Quantus, milliseconds an image\n\n"
        + table(head, rows)
    )


def row(
    model,
    views: Sequence[View],
    given: Sequence[Explanation],
    case: Case,
    args: argparse.Namespace,
) -> Sequence[str]:
    """One metric's line."""
    eager = model.using(engine="torch")
    bare(model, 2 * model.batch)

    def ours(network) -> list[Score]:
        if hasattr(case.ours, "score_batch"):
            return case.ours.score_batch(network, views, given)
        return [
            case.ours.score(network, view, one)
            for view, one in zip(views, given, strict=True)
        ]

    sides = {
        "theirs": case.theirs,
        "ours": partial(ours, model),
        "torch": partial(ours, eager),
    }
    found: dict[str, object] = {}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.repeats + args.warm):
        for side, run in sides.items():
            with redirect_stderr(StringIO()):
                start = time.perf_counter()
                found[side] = run()
            if number >= args.warm:
                times[side].append((time.perf_counter() - start) * 1000 / len(views))
    theirs, ours, plain = (
        statistics.median(times[side]) for side in ("theirs", "ours", "torch")
    )
    ratios = [f"{theirs / ours:.1f}x", f"{theirs / plain:.1f}x"]
    return [
        case.what,
        f"{theirs:.2f}",
        f"{ours:.2f}",
        *ratios,
        f"{case.gap(found['ours'], found['theirs']):.1e}",
        case.note,
    ]


def with_object(explanation: Explanation) -> Explanation:
    """A box of the explained class, somewhere in the middle."""
    index = explanation.target.index
    sample = replace(
        explanation.sample, label=index, boxes=(Box(index, 40.0, 50.0, 180.0, 200.0),)
    )
    return replace(explanation, sample=sample)


def passes(model, args: argparse.Namespace) -> None:
    beside_quantus(model, args.peer_images, of_passes, args)


def maps(model, args: argparse.Namespace) -> None:
    beside_quantus(model, args.images, of_maps, args)


GROUPS = {"cost": cost, "passes": passes, "maps": maps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", help=f"{', '.join(GROUPS)}; all unless named"
    )
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peer-images", type=int, default=8)
    parser.add_argument("--regions", type=int, default=100)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument(
        "--repeats", type=int, default=3, help="beside Quantus: rounds that count"
    )
    parser.add_argument(
        "--warm", type=int, default=1, help="and rounds before them that do not"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.groups if name not in GROUPS]:
        parser.error(f"no group {unknown[0]}; there is: {', '.join(GROUPS)}")
    model = load_model(args.model)
    machine = platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {model.id}"
    )
    for name in args.groups or GROUPS:
        GROUPS[name](model, args)


if __name__ == "__main__":
    main()
