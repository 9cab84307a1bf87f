"""What one explanation costs: time, in units of a forward and backward pass, and memory
above the model's own.

    python benchmarks/costs.py [NAME ...]

Gradient, path and relevance explainers on EfficientNet-Lite0 or ResNet-18, attention on
a ViT-Tiny (random weights where none are at hand: they do not change the cost). Each
runs in a process of its own; times are medians of three after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
from memory import watched

LITE, RESNET, VIT = (
    "efficientnet_lite0",
    "timm:resnet18,weights=random",
    "timm:vit_tiny_patch16_224,weights=random",
)
CASES = {
    **dict.fromkeys(
        (
            "gradient",
            "input-x-gradient",
            "smoothgrad",
            "squaregrad",
            "vargrad",
            "integrated-gradients",
        ),
        LITE,
    ),
    **dict.fromkeys(
        (
            "expected-gradients",
            "guided-ig:steps=50",
            "blur-ig",
            "xrai",
            "guided-backprop",
            "deeplift",
        ),
        LITE,
    ),
    **dict.fromkeys(("lrp", "excitation-backprop", "deconvnet"), RESNET),
    **dict.fromkeys(
        ("gradcam", "attention", "rollout", "gradient-rollout", "generic-attention"),
        VIT,
    ),
    **dict.fromkeys(("transformer-attribution", "legrad", "attnlrp"), VIT),
}


def one(spec: str, name: str) -> dict[str, float]:
    from bench import image

    from consilience import api
    from consilience.models.load import load_model
    from consilience.types import PIXELS, ClassTarget

    model = load_model(name, engine="torch")
    view, target = model.view(image()), ClassTarget(1, "")

    def explain() -> None:
        api.explain(model, image(), spec, target=1)

    model.trace(view.pixels, [PIXELS], target)
    megabytes = watched(explain)
    ours = median(explain)
    bare = median(lambda: model.trace(view.pixels, [PIXELS], target))
    return {"seconds": ours, "passes": ours / bare, "megabytes": megabytes}


def median(call) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="explainers (default: all)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    print(
        "| explainer | network | time | forward and backward passes | MB above the model's "
        "own |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for spec, name in CASES.items():
        if arguments.names and spec not in arguments.names:
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--one", spec, name],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(
                f"| `{spec}` | {name} | {done.stderr.strip().splitlines()[-1]} |",
                flush=True,
            )
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        network = name.removeprefix("timm:").partition(",")[0]
        print(
            f"| `{spec}` | {network} | {found['seconds']:.2f} s | {found['passes']:.1f} | "
            f"{found['megabytes']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
