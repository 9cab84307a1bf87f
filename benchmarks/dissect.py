"""What a dissection costs beside bare forward passes of the same engine over the same
images, and how much memory it takes.

    python benchmarks/dissect.py CONCEPTS [--limit N] [--few N] [--permutations P]

Prints a Markdown table. Every figure is of a process of its own. ``forward`` is twice
the time of ``model.scores`` alone, with the images already read; ``reading`` adds
reading them twice; ``passes`` is everything that the two passes of a dissection do,
from opening files to counts. The converted networks are made before anything is timed.
Peak memory is the process's largest resident size, of a dissection of --few images and
of all, without and with the null; ``bare`` is that of a process that only runs the
forward passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "EfficientNet-Lite0": (
        "efficientnet_lite0",
        ("blocks.2", "blocks.4", "blocks.6"),
    ),
    "ResNet-18": ("resnet18:weights=random", ("layer2", "layer3", "layer4")),
}


def peak() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opened(spec: str, concepts: str, count: int) -> tuple:
    """Model and the first ``count`` images of evenly spaced ones."""
    import consilience as cs

    whole = cs.load_concepts(concepts)
    step = max(1, len(whole) // count)
    return cs.load_model(spec), whole.subset(
        range(0, len(whole), step)[:count]
    ) if count < len(whole) else whole


def forward(spec: str, concepts: str, count: int) -> dict:
    """Two passes of ``model.scores``, with and without reading."""
    from consilience.dissection.measure import batches

    model, found = opened(spec, concepts, count)
    samples = found.samples
    pixels = [
        model.view(sample, "squash").pixels for sample in samples[: model.batch]
    ]
    import torch

    model.scores(torch.cat(pixels))
    alone = 0.0
    for _ in range(2):
        for first in range(0, len(found), model.batch):
            seen = torch.cat(
                [
                    model.view(sample, "squash").pixels
                    for sample in samples[first : first + model.batch]
                ]
            )
            start = time.perf_counter()
            model.scores(seen)
            alone += time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(2):
        for batch in batches(model, found, model.batch, "squash", labels=False):
            model.scores(batch.pixels)
    return {
        "alone": alone,
        "reading": time.perf_counter() - start,
        "peak": peak(),
        "engine": model.facts["engine"],
    }


def dissected(
    spec: str, concepts: str, count: int, layers: list[str], permutations: int
) -> dict:
    """A dissection."""
    from consilience.dissection.measure import dissect

    model, found = opened(spec, concepts, count)
    result = dissect(model, layers, found, permutations=permutations)
    heads = [result.headline(layer) for layer in layers]
    return {
        "seconds": result.facts["seconds"],
        "engine": result.facts["engine"]["engine"],
        "peak": peak(),
        "heads": heads,
    }


def child(*words: str) -> dict:
    """This script on one case, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, concepts: str, count: int, few: int, permutations: int) -> str:
    """One line of the table; what was found goes to the error stream."""
    spec, layers = CASES[name]
    child(
        concepts,
        "--case",
        "dissect",
        "--spec",
        spec,
        "--count",
        "9",
        "--permutations",
        "0",
        "--layers",
        *layers,
    )
    bare = child(concepts, "--case", "forward", "--spec", spec, "--count", str(count))
    found = [
        child(
            concepts,
            "--case",
            "dissect",
            "--spec",
            spec,
            "--count",
            str(n),
            "--permutations",
            str(p),
            "--layers",
            *layers,
        )
        for n, p in ((count, permutations), (few, 0), (count, 0))
    ]
    print(*found[0]["heads"], sep="\n", file=sys.stderr)
    seconds = found[0]["seconds"]
    passes = seconds["quantiles"] + seconds["counting"]
    cells = [
        f"{name}, {' '.join(layers)}",
        found[0]["engine"],
        f"{bare['alone']:.1f} s",
        f"{bare['reading']:.1f} s",
        f"{passes:.1f} s ({seconds['quantiles']:.1f} + {seconds['counting']:.1f})",
        f"{passes / bare['alone']:.2f}",
        f"{passes / bare['reading']:.2f}",
        f"{seconds['null']:.0f} s" if "null" in seconds else "none",
        *(f"{one['peak']:.0f} MB" for one in (found[1], found[2], found[0], bare)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("concepts")
    parser.add_argument(
        "--limit", type=int, default=1_000_000_000, help="images at most"
    )
    parser.add_argument(
        "--few", type=int, default=500, help="images of the smaller memory figure"
    )
    parser.add_argument("--permutations", type=int, default=999)
    parser.add_argument("--only", default="", help="one of the networks")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--spec", default="", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs="*", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case == "forward":
        print(json.dumps(forward(given.spec, given.concepts, given.count)))
        return
    if given.case == "dissect":
        print(
            json.dumps(
                dissected(
                    given.spec,
                    given.concepts,
                    given.count,
                    given.layers,
                    given.permutations,
                )
            )
        )
        return
    import consilience as cs

    count = min(given.limit, len(cs.load_concepts(Path(given.concepts))))
    print(
        f"{count} images.\n\n| network | engine | forward x 2 | reading x 2 | passes | / "
        f"forward | / reading | null | "
        f"peak, {min(given.few, count)} | peak, {count} | with null | bare |\n|{'---|' * 12}"
    )
    for name in CASES:
        if given.only in ("", name):
            print(
                row(
                    name,
                    given.concepts,
                    count,
                    min(given.few, count),
                    given.permutations,
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
