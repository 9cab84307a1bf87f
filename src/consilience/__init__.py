"""Explain what a vision model looks at, compare explanations, and say
whether to believe them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.agreement.overlap import Agreement, agree
    from consilience.api import compare_layers, evaluate, explain
    from consilience.data import read_image
    from consilience.dissection.concepts import load_concepts
    from consilience.dissection.measure import dissect
    from consilience.explanations import Explanations
    from consilience.models.callable import wrap_callable
    from consilience.models.load import load_model
    from consilience.models.network import wrap
    from consilience.models.tasks import wrap_detector, wrap_segmentation
    from consilience.runs.check import check
    from consilience.runs.clusters import clusters
    from consilience.runs.explain import How, merge_run, run
    from consilience.runs.folder import Run
    from consilience.runs.jobfile import run_job
    from consilience.runs.recommend import recommend
    from consilience.runs.shortcuts import shortcuts
    from consilience.show.notebook import show, slider
    from consilience.types import (
        Box,
        ConsilienceError,
        Explanation,
        NotApplicable,
        Sample,
        Score,
    )

# Resolved on first use, so that the command line answers before torch is imported.
_HOME = {
    "Agreement": "agreement.overlap",
    "Box": "types",
    "ConsilienceError": "types",
    "Explanation": "types",
    "Explanations": "explanations",
    "How": "runs.explain",
    "NotApplicable": "types",
    "Run": "runs.folder",
    "Sample": "types",
    "Score": "types",
    "agree": "agreement.overlap",
    "check": "runs.check",
    "clusters": "runs.clusters",
    "compare_layers": "api",
    "dissect": "dissection.measure",
    "evaluate": "api",
    "explain": "api",
    "load_concepts": "dissection.concepts",
    "load_model": "models.load",
    "read_image": "data",
    "merge_run": "runs.explain",
    "recommend": "runs.recommend",
    "run": "runs.explain",
    "run_job": "runs.jobfile",
    "shortcuts": "runs.shortcuts",
    "show": "show.notebook",
    "slider": "show.notebook",
    "wrap": "models.network",
    "wrap_callable": "models.callable",
    "wrap_detector": "models.tasks",
    "wrap_segmentation": "models.tasks",
}

__all__ = [
    "Agreement",
    "Box",
    "ConsilienceError",
    "Explanation",
    "Explanations",
    "How",
    "NotApplicable",
    "Run",
    "Sample",
    "Score",
    "agree",
    "check",
    "clusters",
    "compare_layers",
    "dissect",
    "evaluate",
    "explain",
    "load_concepts",
    "load_model",
    "merge_run",
    "read_image",
    "recommend",
    "run",
    "run_job",
    "shortcuts",
    "show",
    "slider",
    "wrap",
    "wrap_callable",
    "wrap_detector",
    "wrap_segmentation",
]


_OLDER: dict[str, str] = {}
"""Public names that went out of use, with what to use instead: `older` says so."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("consilience")
    if name in _OLDER:
        from consilience.older import say_older

        say_older(f"consilience.{name}", f"consilience.{_OLDER[name]}")
        return __getattr__(_OLDER[name])
    if name not in _HOME:
        raise AttributeError(
            f"module 'consilience' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    from consilience.models.importing import uncollected

    with uncollected():
        home = import_module(f"consilience.{_HOME[name]}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
