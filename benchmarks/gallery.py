"""The pictures of the documentation: every explainer on one photograph, and what it costs.

    python benchmarks/gallery.py [NAME ...]

Writes ``docs/gallery/NAME.webp`` and ``docs/gallery/gallery.json``: the map over the
photograph that the demo begins with (scikit-image's cat, CC0) by EfficientNet-Lite0, the
passes of the network, seconds, and those as multiples of one forward pass, which is
measured beside it. What cannot be drawn (a method for transformers on a convolutional
network) is kept as the sentence that says why.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import consilience as cs
from consilience import registry
from consilience.demo import demo_images
from consilience.show.colours import overlay
from consilience.show.figures import painted_map, shown_image

FOLDER = Path(__file__).parents[1] / "docs" / "gallery"
MODEL = "efficientnet_lite0"
FORWARDS = 20
FAINT, DENSE = 0.2, 0.9
"""A map of which nine tenths are below a fifth of its largest value is of single pixels."""
NOT_PIXELS = ("edges", "random", "centre", "constant", "lime", "minimal", "xrai")


def main() -> None:
    """Draw what is named, or everything."""
    model = cs.load_model(MODEL)
    sample = cs.read_image(demo_images()[0])
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "gallery.json"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {"methods": {}}
    for name in sys.argv[1:] or registry.explainers.names():
        print(name, flush=True)
        kept["methods"][name] = drawn(model, sample, name)
        kept |= {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "date": datetime.now(UTC).date().isoformat(),
            "model": MODEL,
        }
        kept["methods"] = dict(sorted(kept["methods"].items()))
        file.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    photograph = shown_image(cs.explain(model, sample, by="centre"))
    Image.fromarray(photograph).save(FOLDER / "photograph.webp", quality=85)


def drawn(model: Any, sample: Any, name: str) -> dict[str, Any]:
    """One explainer's picture and cost."""
    try:
        cs.explain(model, sample, by=name)  # engines, caches, trials
        started = time.perf_counter()
        made = cs.explain(model, sample, by=name)
        seconds = time.perf_counter() - started
    except cs.ConsilienceError as why:
        return {"why": str(why)}
    Image.fromarray(picture(made)).save(
        FOLDER / f"{name.replace('+', 'p')}.webp", quality=80
    )
    forward = forward_seconds(model, sample)
    return {
        "target": made.target.name,
        "resolved": made.provenance.get("resolved", made.explainer),
        "passes": made.provenance.get("passes"),
        "seconds": round(seconds, 4),
        "forwards": round(seconds / forward, 1),
    }


def picture(made: Any) -> Any:
    """The map over the photograph; one of single pixels over a pale one, on which they
    are seen.
    """
    loud = np.abs(made.values) > FAINT * np.abs(made.values).max()
    if loud.mean() > 1 - DENSE or made.name in NOT_PIXELS:
        return painted_map(made)[0]
    grey = shown_image(made).mean(2, keepdims=True).repeat(3, 2)
    pale = (255 - 0.3 * (255 - grey)).astype(np.uint8)
    return overlay(pale, made.values, alpha=1.0)


def forward_seconds(model: Any, sample: Any) -> float:
    """The median of bare forward passes of one image."""
    pixels = model.view(sample).pixels
    taken = []
    for _ in range(FORWARDS):
        started = time.perf_counter()
        with torch.no_grad():
            model.scores(pixels)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[FORWARDS // 2]


if __name__ == "__main__":
    main()
