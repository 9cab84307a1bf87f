"""Methods and metrics scored where the truth is known: on models whose evidence is
planted.

A method is scored by the share of its positive map on the evidence, a metric by how
often it ranks the right map above wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from consilience import api, progress, registry, stats
from consilience.evaluation import planted
from consilience.evaluation.columns import CONTROLS
from consilience.evaluation.planted import World
from consilience.types import (
    ClassTarget,
    ConsilienceError,
    Explanation,
    Metric,
    Model,
    NotApplicable,
    Sample,
    Score,
    View,
)

NAME = "planted"
PLANTED_EXPLAINERS = (
    "gradcam",
    "lime:samples=200,segments=grid(8)",
    "lime:samples=200,segments=grid(8),fill=grey",
    "rise:masks=500,grid=8",
    "occlusion:window=16,stride=8",
    "gradient",
)
"""LIME twice: a mark of one colour looks the same where its cells get their own mean
colour, so the default fill hides it.
"""
PLANTED_METRICS = (
    "insertion:steps=32",
    "deletion:steps=32",
    "average-drop",
    "increase",
    "sufficiency",
    "comprehensiveness",
    "faithfulness-correlation",
    "infidelity",
    "pointing-game:tolerance=0",
    "energy",
    "sparseness",
)
PLANTED_IMAGES = 6


def evaluate_planted(
    by: Sequence[str] = PLANTED_EXPLAINERS,
    metrics: Sequence[str] = PLANTED_METRICS,
    images: int = PLANTED_IMAGES,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of ``methods`` and of ``metrics``, by world in words how the truth was
    ``verified``, and ``notes`` on the methods.

    A method's row has its mean share by world, and ``low`` and ``high`` of the mean
    over all images; a metric's row the share of images (all worlds) on which the right
    map is above each wrong one, ties counting half, and how often it does not apply.
    """
    built: dict[str, Metric] = {
        spec: registry.metrics.build(spec) for spec in metrics
    }
    explainers = dict.fromkeys([*by, *CONTROLS])
    for spec in explainers:
        registry.explainers.build(spec)
    shares: dict[str, dict[str, list[float]]] = {spec: {} for spec in explainers}
    wins: dict[str, dict[str, list[float]]] = {spec: {} for spec in built}
    refused = dict.fromkeys(built, 0)
    verified = []
    with progress.task("planted images", images * len(planted.WORLDS)) as running:
        for world in planted.WORLDS.values():
            samples = world.samples(images, seed)
            verified.append(_verified(world, samples, seed))
            for sample in samples:
                for spec, share in _shares(world.model(), sample, explainers).items():
                    shares[spec].setdefault(world.name, []).append(share)
                _ranked(world.model(), sample, built, seed, wins, refused)
                running.advance()
    return {
        "images": images,
        "seed": seed,
        "worlds": {name: world.what for name, world in planted.WORLDS.items()},
        "notes": list(_notes(by)),
        "verified": verified,
        "methods": [
            _area(images, seed),
            *(_method(spec, found) for spec, found in shares.items()),
        ],
        "metrics": [_metric(spec, wins[spec], refused[spec]) for spec in built],
    }


def _notes(by: Sequence[str]) -> Iterator[str]:
    """What has to be known of a method to read its row."""
    filled = [spec for spec in by if _fill(spec) == "mean"]
    if filled:
        yield (
            f"{', '.join(filled)}: the fill puts each segment's own mean colour in its place. "
            f"A mark of one colour looks the "
            "same after that: nothing is hidden, the score stays, and the map finds nothing. "
            "Ask for a fill that changes the "
            "evidence (fill=grey)."
        )


def _fill(spec: str) -> str:
    fill = getattr(registry.explainers.build(spec), "fill", "")
    return fill if isinstance(fill, str) else registry.spell(fill)


def _verified(world: World, samples: Sequence[Sample], seed: int) -> str:
    found = [planted.verify(world, sample, seed=seed) for sample in samples]
    if not all(one.holds for one in found):
        raise ConsilienceError(
            f"planted world {world.name!r}: an intervention does not show that the evidence "
            f"decides"
        )
    least, most = (
        min(one.elsewhere for one in found),
        max(max(one.without, *one.parts) for one in found),
    )
    return (
        f"{world.name}: {world.what}. Verified on {len(found)} images: without the evidence p "
        f"is at most {most:.3f}, without "
        f"as much of anything else at least {least:.3f}"
    )


# ---- methods


def _shares(
    model: Model, sample: Sample, explainers: Mapping[str, Any]
) -> dict[str, float]:
    """Share of each method's positive map on the evidence; a map without a positive
    value has none of it there.
    """
    energy = registry.metrics.build("energy")
    found = {}
    for spec in explainers:
        try:
            score = api.evaluate(model, api.explain(model, sample, spec, 1), energy)[
                "energy"
            ]
        except NotApplicable as reason:
            score = reason
        found[spec] = score.value if isinstance(score, Score) else 0.0
    return found


def _method(spec: str, found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    values = [value for some in found.values() for value in some]
    whole = stats.mean_interval(values)
    means = {name: float(np.mean(found[name])) for name in found}
    return {
        "method": spec,
        **means,
        "mean": whole.mean,
        "low": whole.low,
        "high": whole.high,
        "n": whole.n,
    }


def _area(images: int, seed: int) -> dict[str, Any]:
    """What a map that knows nothing has: the evidence's share of the frame."""
    areas = {
        name: [
            float(sample.masks["1"].mean()) for sample in world.samples(images, seed)
        ]
        for name, world in planted.WORLDS.items()
    }
    return {**_method("(area of the evidence)", areas)}


# ---- metrics


def _ranked(
    model: Model,
    sample: Sample,
    metrics: Mapping[str, Metric],
    seed: int,
    wins: dict[str, dict[str, list[float]]],
    refused: dict[str, int],
) -> None:
    """Add for one image whether each metric puts the right map above each wrong one: 1,
    0, or a half for a tie.
    """
    view = model.view(sample)
    maps = {"right": planted.true_map(sample), **planted.wrong_maps(sample, seed)}
    explanations = [
        _as_explanation(model, sample, view, name, values)
        for name, values in maps.items()
    ]
    for spec, metric in metrics.items():
        found = dict(
            zip(
                maps,
                api.metric_scores(model, metric, [view] * len(maps), explanations),
                strict=True,
            )
        )
        right = found.pop("right")
        for name, wrong in found.items():
            if isinstance(right, NotApplicable) or isinstance(wrong, NotApplicable):
                refused[spec] += 1
                continue
            gap = (right.value - wrong.value) * (1 if metric.higher_is_better else -1)
            wins[spec].setdefault(name, []).append(
                0.5 if abs(gap) < 1e-9 else float(gap > 0)
            )


def _as_explanation(
    model: Model, sample: Sample, view: View, name: str, values: Any
) -> Explanation:
    target = ClassTarget(1, planted.CLASSES[1], "probability")
    facts = {"view": view.mode, "key": name}
    return Explanation(
        sample,
        model.id,
        f"planted({name})",
        target,
        view.geometry,
        values,
        provenance=facts,
    )


def _metric(
    spec: str, found: Mapping[str, Sequence[float]], refused: int
) -> dict[str, Any]:
    row = {f"above {name}": float(np.mean(values)) for name, values in found.items()}
    values = [value for some in found.values() for value in some]
    first = float(np.mean(values)) if values else float("nan")
    names = ("elsewhere", "inverted", "noise", "centre")
    filled = {
        f"above {name}": row.get(f"above {name}", float("nan")) for name in names
    }
    return {
        "metric": spec,
        **filled,
        "all": first,
        "comparisons": len(values),
        "not applicable": refused,
    }
