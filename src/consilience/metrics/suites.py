"""Named sets of metrics. A suite is a list of spellings and nothing else; none of them
is ever added up to one score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from consilience import registry
from consilience.registry import unknown
from consilience.types import ConsilienceError

QUICK = (
    "insertion:steps=10",
    "deletion:steps=10",
    "average-drop",
    "increase",
    "sparseness",
)
FAITHFULNESS = (
    "insertion",
    "deletion",
    "deletion:fill=blur",
    "road",
    "pixel-flipping",
    "region-perturbation",
    "irof",
    "average-drop",
    "increase",
    "average-gain",
    "adcc",
    "infidelity",
    "sensitivity-n",
    "faithfulness-correlation",
    "faithfulness-estimate",
    "monotonicity",
    "sufficiency",
    "comprehensiveness",
)
LOCALISATION = (
    "pointing-game",
    "energy",
    "relevance-mass",
    "relevance-rank",
    "iou",
    "best-iou",
    "auc",
    "max-box-acc",
    "grid-pointing",
)
STABILITY = (
    "max-sensitivity",
    "average-sensitivity",
    "local-lipschitz",
    "seed-agreement",
    "flip-consistency",
    "shift-consistency",
)
SANITY = (
    "mprt:steps=4",
    "mprt:order=bottom-up,steps=4",
    "emprt",
    "random-logit:classes=2",
)
COMPLEXITY = ("sparseness", "entropy", "effective-pixels")
PLANTED = "planted"
"""Not metrics of a run's images but images and models of its own; see
`evaluation.planted_suite`.
"""

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quick": QUICK,
        "faithfulness": FAITHFULNESS,
        "localisation": LOCALISATION,
        "sanity": SANITY,
        "stability": STABILITY,
        "full": (*FAITHFULNESS, *LOCALISATION, *STABILITY, *SANITY, *COMPLEXITY),
    }
)
WHAT: Mapping[str, str] = MappingProxyType(
    {
        "quick": "the curves of few steps, what a map keeps of the score, how concentrated it is: about a minute on the demo",
        "faithfulness": "does the score follow what the map says? Edited images, several protocols and fills",
        "localisation": "does the map lie on the object? Needs boxes (--truth); grid-pointing makes mosaics instead",
        "sanity": "does the map change with the network's weights and with the class? Explains again, many times",
        "stability": "does the map stay under noise, other seeds, flips and shifts? Explains again, many times",
        "full": "all of these, and complexity",
        "planted": "methods and metrics scored on models whose evidence is known by construction; takes no images",
    }
)


def asked_metrics(
    metrics: Sequence[str] = (), suite: str | None = None
) -> tuple[str, ...]:
    """Spellings of what is asked: the suite's metrics, then the single ones, each once;
    the quick suite where nothing is named.

    Every spelling is built, so that a wrong name or option is refused before any image
    is read.
    """
    if suite is not None and suite not in SUITES:
        raise ConsilienceError(unknown("suite", suite, (*SUITES, PLANTED)))
    named = SUITES[suite] if suite else ()
    specs = dict.fromkeys([*named, *metrics]) or dict.fromkeys(QUICK)
    full: dict[str, str] = {}
    for spec in specs:
        full.setdefault(registry.spell(registry.metrics.build(spec), full=True), spec)
    return tuple(full.values())
