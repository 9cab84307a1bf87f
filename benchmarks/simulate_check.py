"""Does `consilience check --mark` tell a head that learnt a mark from the one before it?

Heads are those of `simulate_shortcuts`: linear, on frozen EfficientNet-Lite0 features.
A new head is trained on the same images as the old one, with a mark on a share of one
class's; or, where no mark was learnt, on a resample of them, or it is the old one with
weights in bf16. Marks are planted in held-out images.

    python benchmarks/simulate_check.py IMAGES [--cache FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulate_shortcuts import PLANTED, head, kept_features

from consilience.diagnosis.change import Limits
from consilience.diagnosis.marked_change import MarkAnswers, compared

Head = tuple[Any, Any]
LEVEL = Limits().level


def answers(known: Any, one: Head, rows: Any, places: list[int]) -> Any:
    """Scores (n, 1 + marks, K) of held-out images, plain and under marks."""
    weights, biases = one
    shown = ["plain", *(f"{place}/marked" for place in places)]
    return np.stack([known[name][rows] @ weights + biases for name in shown], 1)


def checked(
    known: Any, new: Head, old: Head, rows: Any, specs: list[str], margin: float
) -> MarkAnswers:
    """What the answers of two heads to marks show."""
    there = [str(spec) for spec in known["specs"]]
    places = [there.index(spec) for spec in specs]
    said = [answers(known, one, rows, places) for one in (new, old)]
    return compared(*said, specs, margin, LEVEL)


def in_bf16(one: Head) -> Head:
    """A head with its weights and biases rounded to bf16."""
    rounded = [torch.from_numpy(side).bfloat16().float().numpy() for side in one]
    return rounded[0], rounded[1]


def told(found: list[MarkAnswers]) -> str:
    """How many were beyond, within and neither."""
    tail = 1 - LEVEL
    beyond = sum(one.p_beyond <= tail for one in found)
    within = sum(one.p_within <= tail for one in found)
    return (
        f"beyond {beyond}, within {within}, neither {len(found) - beyond - within} of "
        f"{len(found)}; largest difference {np.median([np.nanmax(one.difference) for one in found]):+.2f} SD (median)"
    )


def main() -> None:
    """Print what is shown of heads that learnt a mark, and of heads that did not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--classes", type=int, default=10)
    asked = parser.parse_args()
    known = kept_features(asked.images, asked.cache)

    def trained(
        seed: int, mark: str = "", share: float = 0.0, anew: bool = False
    ) -> tuple[Head, Any]:
        rng = np.random.default_rng(seed)
        drawn = np.random.default_rng(1000 + seed) if anew else None
        weights, biases, rows = head(known, rng, asked.classes, mark, share, drawn)
        return (weights, biases), rows

    every = [str(spec) for spec in known["specs"]]

    def over_heads(
        change: Callable[[int, Head], Head], specs: list[str], margin: float
    ) -> str:
        found = []
        for seed in range(asked.heads):
            old, rows = trained(seed)
            new = change(seed, old)
            found.append(checked(known, new, old, rows, specs, margin))
        return told(found)

    for margin in (0.25, 0.4):
        for specs, name in ((every, "every mark"), (["logo"], "logo alone")):
            said = over_heads(lambda _, old: in_bf16(old), specs, margin)
            print(f"bf16, {name}, margin {margin:g}: {said}", flush=True)
            said = over_heads(
                lambda seed, _: trained(seed, anew=True)[0], specs, margin
            )
            print(f"resampled, {name}, margin {margin:g}: {said}", flush=True)
            for planted in PLANTED if specs is every else ("logo",):
                for share in (0.5, 1.0):
                    said = over_heads(
                        lambda seed, _, planted=planted, share=share: trained(
                            seed, planted, share
                        )[0],
                        specs,
                        margin,
                    )
                    print(
                        f"{planted} on {share:.0%}, {name}, margin {margin:g}: {said}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
